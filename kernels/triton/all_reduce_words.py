"""Sums over ranks of very small tensors: every rank writes its numbers to all others.

A word is eight bytes that are written at once: four of a tensor, and the number of the launch. A
rank writes its words to the regions of all ranks, and reads from its own until all have this
launch's number. So there are no flags to wait for, nothing has to be written before anything else,
and the link is crossed once instead of twice. Twice the bytes cross it, so this is for small
tensors. NCCL's protocol LL works like this.

N ranks | W words of a program's tile
"""

from __future__ import annotations

import triton
import triton.language as tl

from nanovllm.kernels import peers
from nanovllm.kernels.triton.common import INTERPRETED, wait_for_earlier_kernels
from nanovllm.kernels.triton.peer_access import (
    MAX_PROGRAMS,
    MAX_RANKS,
    counter_at,
    load_table,
    plus,
)

WORDS_AT = tl.constexpr(peers.WORDS_AT)
PROGRAM_WORDS = tl.constexpr(peers.PROGRAM_WORDS)


@triton.jit
def words_offset(program, counter, rank):
    """Where the words of a rank for a program's launch begin in each region, in bytes."""
    half = ((counter >> 1) & 1).to(tl.int64)
    return WORDS_AT + (((half * MAX_PROGRAMS + program) * MAX_RANKS) + rank) * (PROGRAM_WORDS * 8)


@triton.jit
def send(address_W, data_W, number_W):
    """Writes words to a region."""
    if INTERPRETED:
        word_W = (number_W.to(tl.int64) << 32) | (data_W.to(tl.int64) & 0xFFFFFFFF)
        tl.store(address_W.to(tl.pointer_type(tl.int64)), word_W)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .b64 word; mov.b64 word, {$2, $3}; st.relaxed.sys.global.b64 [$1], word;"
            " mov.b32 $0, 0; }",
            "=r,l,r,r", [address_W, data_W, number_W], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def receive(address_W, number_W, stop_address):
    """The data of words, once they have arrived; anything once `stop` is set."""
    if INTERPRETED:
        word_ptr = address_W.to(tl.pointer_type(tl.int64))
        stop_ptr = stop_address.to(tl.pointer_type(tl.int32))
        word_W = tl.load(word_ptr)
        while (
            tl.max(((word_W >> 32).to(tl.int32) != number_W).to(tl.int32), 0) > 0
            and tl.load(stop_ptr) == 0
        ):
            word_W = tl.load(word_ptr)
        return word_W.to(tl.int32)
    else:
        # It looks at the words, and once in 1024 times at the host's memory, which takes longer.
        return tl.inline_asm_elementwise(
            """{
            .reg .pred again;
            .reg .b32 number, spins;
            .reg .b64 word;
            mov.b32 spins, 0;
            look:
            ld.relaxed.sys.global.b64 word, [$1];
            mov.b64 {$0, number}, word;
            setp.eq.u32 again, number, $2;
            @again bra done;
            add.u32 spins, spins, 1;
            and.b32 number, spins, 1023;
            setp.ne.u32 again, number, 0;
            @again bra look;
            ld.relaxed.sys.global.b32 number, [$3];
            setp.eq.s32 again, number, 0;
            @again bra look;
            done:
            }""",
            "=&r,l,r,l", [address_W, number_W, address_W * 0 + stop_address],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def low(data_W, dtype: tl.constexpr):
    """The first of two numbers of 16 bits, or the only one of 32."""
    if dtype.primitive_bitwidth == 32:
        return data_W.to(dtype, bitcast=True)
    else:
        return (data_W & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def high(data_W, dtype: tl.constexpr):
    """The second of two numbers of 16 bits."""
    return (data_W >> 16).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def joined(low_W, high_W):
    """The data of words of one number, or of two with 16 bits."""
    if low_W.dtype.primitive_bitwidth == 32:
        return low_W.to(tl.int32, bitcast=True)
    else:
        low_W = low_W.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return low_W | (high_W.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def words_kernel(
    x_ptr,  # [num_elements], whose bytes are a multiple of 4
    residual_ptr,  # [num_elements], read if HAS_RESIDUAL
    out_ptr,  # [num_elements], written; may be x
    peers_ptr,  # see `Peers.table`
    num_elements,
    NUM_RANKS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    regions, _, rank, own, stop_address = load_table(peers_ptr, NUM_RANKS)
    wait_for_earlier_kernels(PDL)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    EACH: tl.constexpr = 32 // dtype.primitive_bitwidth
    program = tl.program_id(0)
    i_W = tl.arange(0, TILE // EACH)
    at_W = program * (TILE // EACH) + i_W
    mask_W = at_W < num_elements // EACH
    counter_ptr = counter_at(own, program)
    counter = tl.load(counter_ptr)
    number_W = (i_W * 0) + counter + 2
    x_W = tl.load(x_ptr.to(tl.pointer_type(tl.int32)) + at_W, mask=mask_W, other=0)
    sent = words_offset(program, counter, rank)
    for other in tl.static_range(NUM_RANKS):
        send(regions[other] + sent + i_W * 8, x_W, number_W)
    residual_W = x_W
    if HAS_RESIDUAL:
        residual_ptr_W = residual_ptr.to(tl.pointer_type(tl.int32)) + at_W
        residual_W = tl.load(residual_ptr_W, mask=mask_W, other=0)
    first = own + words_offset(program, counter, 0)
    data_W = receive(first + i_W * 8, number_W, stop_address)
    low_W = low(data_W, dtype).to(tl.float32)
    high_W = low_W
    if EACH == 2:
        high_W = high(data_W, dtype).to(tl.float32)
    for other in tl.static_range(1, NUM_RANKS):
        data_W = receive(first + (other * PROGRAM_WORDS + i_W) * 8, number_W, stop_address)
        low_W += low(data_W, dtype).to(tl.float32)
        if EACH == 2:
            high_W += high(data_W, dtype).to(tl.float32)
    low_W = plus(low_W.to(dtype), low(residual_W, dtype), HAS_RESIDUAL)
    if EACH == 2:
        sum_W = joined(low_W, plus(high_W.to(dtype), high(residual_W, dtype), HAS_RESIDUAL))
    else:
        sum_W = joined(low_W, low_W)
    tl.store(out_ptr.to(tl.pointer_type(tl.int32)) + at_W, sum_W, mask=mask_W)
    tl.debug_barrier()  # all threads have read the counter
    tl.store(counter_ptr, counter + 2)
