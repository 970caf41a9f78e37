"""Words: numbers that ranks write to each other's memory together with the number of a launch.

A word is eight bytes that are written at once: four of data, and the launch's number. A rank writes
its words to the regions of all ranks, and reads from its own until all have this launch's number.
So no flags and no order of writes are needed. Twice the bytes cross the link, so this is for few
numbers. NCCL's protocol LL is the same.

W words
"""

from __future__ import annotations

import triton
import triton.language as tl

from nanovllm.kernels import peers
from nanovllm.kernels.triton.common import INTERPRETED
from nanovllm.kernels.triton.peer_access import MAX_PROGRAMS, MAX_RANKS

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
        # It polls the words, and once in 1024 times the host's memory, which takes longer.
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
