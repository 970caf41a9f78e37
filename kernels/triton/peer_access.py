"""How the kernels of sums over ranks use the regions of `peers.py`: addresses, flags and waits.

Code with NVIDIA instructions is for GPUs; the interpreter, whose ranks are processes, uses plain
loads and stores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nanovllm.kernels import peers
from nanovllm.kernels.triton.common import INTERPRETED

MAX_PROGRAMS = tl.constexpr(peers.MAX_PROGRAMS)
MAX_RANKS = tl.constexpr(peers.MAX_RANKS)
SLAB_BYTES = tl.constexpr(peers.SLAB_BYTES)
COUNTERS_AT = tl.constexpr(peers.COUNTERS_AT)
DATA_AT = tl.constexpr(peers.DATA_AT)


@triton.jit
def load_table(table_ptr, NUM_RANKS: tl.constexpr):
    """The regions' addresses, one by one and as a tensor, and this rank, its region and `stop`.

    No kernel writes the table, so it is read before the results of earlier kernels are there.
    """
    regions = ()
    for rank in tl.static_range(NUM_RANKS):
        regions += (tl.load(table_ptr + rank),)
    region_N = tl.load(table_ptr + tl.arange(0, NUM_RANKS))
    rank = tl.load(table_ptr + NUM_RANKS)
    own = tl.load(table_ptr + NUM_RANKS + 1)
    stop_address = tl.load(table_ptr + NUM_RANKS + 2)
    return regions, region_N, rank, own, stop_address


@triton.jit
def pointer(address, dtype: tl.constexpr):
    """A pointer to an address that is a multiple of 16."""
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def counter_at(own, program):
    """A pointer to a program's counter in this rank's region."""
    return (own + COUNTERS_AT + program * 4).to(tl.pointer_type(tl.int32))


@triton.jit
def slab_offset(program, counter):
    """Where the data of a program's launch begin in each region, in bytes."""
    half = ((counter >> 1) & 1).to(tl.int64)
    return DATA_AT + (half * MAX_PROGRAMS + program) * SLAB_BYTES


@triton.jit
def raise_flags(region_N, rank, program, value):
    """Sets this rank's flag in all regions, after all that the program has written before."""
    flag_N = region_N + (program * MAX_RANKS + rank) * 4
    value_N = (flag_N * 0).to(tl.int32) + value
    tl.debug_barrier()
    if INTERPRETED:
        tl.store(flag_N.to(tl.pointer_type(tl.int32)), value_N)
    else:
        # One warp is enough: the barrier and the release order what all threads have written.
        tl.inline_asm_elementwise(
            "{ .reg .pred first; .reg .b32 thread; mov.u32 thread, %tid.x;"
            " setp.lt.u32 first, thread, 32; @first st.release.sys.global.b32 [$1], $2;"
            " mov.b32 $0, 0; }",
            "=r,l,r", [flag_N, value_N], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def wait_for_flags(own, stop_address, program, value, NUM_RANKS: tl.constexpr):
    """Waits until all ranks have raised their flags for this program to `value` or beyond.

    What was written before a flag is visible afterwards. Numbers wrap around, so differences are
    compared. One warp polls and the others wait at the barrier: warps that poll without a pause can
    delay the release of the flags of their own program.
    """
    flag_N = own + (program * MAX_RANKS + tl.arange(0, NUM_RANKS)) * 4
    if INTERPRETED:
        flag_ptr = flag_N.to(tl.pointer_type(tl.int32))
        stop_ptr = stop_address.to(tl.pointer_type(tl.int32))
        while tl.min(tl.load(flag_ptr) - value, 0) < 0 and tl.load(stop_ptr) == 0:
            pass
    else:
        tl.inline_asm_elementwise(
            """{
            .reg .pred other, reached, again;
            .reg .b32 thread, number, spins;
            mov.u32 thread, %tid.x;
            mov.b32 spins, 0;
            mov.b32 $0, 0;
            setp.ge.u32 other, thread, 32;
            @other bra done;
            look:  // at the flags; once in 1024 times at the host's memory, which takes longer
            ld.acquire.sys.global.b32 number, [$1];
            sub.s32 number, number, $2;
            setp.ge.s32 reached, number, 0;
            @reached bra done;
            add.u32 spins, spins, 1;
            and.b32 number, spins, 1023;
            setp.ne.u32 again, number, 0;
            @again bra look;
            ld.acquire.sys.global.b32 number, [$3];
            setp.eq.s32 again, number, 0;
            @again bra look;
            done:
            bar.warp.sync 0xffffffff;
            }""",
            "=&r,l,r,l",
            [flag_N, (flag_N * 0).to(tl.int32) + value, flag_N * 0 + stop_address],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def plus(y_I, residual_I, HAS_RESIDUAL: tl.constexpr):
    """y + residual in fp32, rounded to y's dtype."""
    if HAS_RESIDUAL:
        return (y_I.to(tl.float32) + residual_I.to(tl.float32)).to(y_I.dtype)
    else:
        return y_I
