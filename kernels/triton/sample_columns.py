"""The plain sampler of several ranks: each one has some columns of the logits.

A rank finds the best score of its own columns as `sample.py` does. Then the score and its token go
to all ranks as two words of the memory that all can read (`peer_words.py`), and each rank
takes the best. Without such memory the group gathers one number for each row.

N ranks | R rows | W columns of a rank | P spans of a row
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels import collectives, peers
from nanovllm.kernels.peers import Peers
from nanovllm.kernels.triton.common import launch_options, wait_for_earlier_kernels
from nanovllm.kernels.triton.peer_access import counter_at, load_table
from nanovllm.kernels.triton.peer_words import receive, send, words_offset
from nanovllm.kernels.triton.sample import LAST, NO_TOKEN, best_of_spans


@triton.jit(do_not_specialize=["num_rows", "num_spans"])
def best_of_ranks_kernel(
    best_ptr,  # [R, P] fp32
    best_token_ptr,  # [R, P] int32
    out_ptr,  # [R] int64, written
    peers_ptr,  # see `Peers.table`
    num_rows,
    num_spans,
    NUM_RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    SPANS_P: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes the same rows of all ranks. It sends their scores, then their tokens."""
    regions, _, rank, own, stop_address = load_table(peers_ptr, NUM_RANKS)
    wait_for_earlier_kernels(PDL)
    program = tl.program_id(0)
    i_R = tl.arange(0, ROWS)
    row_R = program * ROWS + i_R
    span_P = tl.arange(0, SPANS_P)
    at_RP = row_R[:, None] * num_spans + span_P[None, :]
    mask_RP = (row_R[:, None] < num_rows) & (span_P[None, :] < num_spans)
    best_RP = tl.load(best_ptr + at_RP, mask=mask_RP, other=float("-inf"))
    token_RP = tl.load(best_token_ptr + at_RP, mask=mask_RP, other=LAST)
    best_R = tl.max(best_RP, 1)
    token_R = tl.min(tl.where(best_RP == best_R[:, None], token_RP, LAST), 1)
    counter_ptr = counter_at(own, program)
    counter = tl.load(counter_ptr)
    number_R = i_R * 0 + counter + 2
    sent_R = words_offset(program, counter, rank) + i_R * 8
    for other in tl.static_range(NUM_RANKS):
        send(regions[other] + sent_R, best_R.to(tl.int32, bitcast=True), number_R)
        send(regions[other] + sent_R + ROWS * 8, token_R, number_R)
    for other in tl.static_range(NUM_RANKS):
        at_R = own + words_offset(program, counter, other) + i_R * 8
        theirs_R = receive(at_R, number_R, stop_address).to(tl.float32, bitcast=True)
        their_token_R = receive(at_R + ROWS * 8, number_R, stop_address)
        is_better_R = (theirs_R > best_R) | ((theirs_R == best_R) & (their_token_R < token_R))
        best_R = tl.where(is_better_R, theirs_R, best_R)
        token_R = tl.where(is_better_R, their_token_R, token_R)
    # a row without a score above −inf has no best token
    token_R = tl.where(token_R == LAST, NO_TOKEN, token_R).to(tl.int64)
    tl.store(out_ptr + row_R, token_R, mask=row_R < num_rows)
    tl.debug_barrier()  # all threads have read the counter
    tl.store(counter_ptr, counter + 2)


def rows_of_program(num_rows: int) -> int:
    """How many rows a program takes: few, so that many programs work at the same time."""
    rows = triton.next_power_of_2(triton.cdiv(num_rows, peers.MAX_PROGRAMS))
    assert 2 * rows <= peers.PROGRAM_WORDS, num_rows
    return rows


def best_through(best_RP: Tensor, best_token_RP: Tensor, regions: Peers) -> Tensor:
    """The tokens [R] of the best scores of all ranks; both inputs are those of `best_of_spans`."""
    num_rows, num_spans = best_RP.shape
    token_R = torch.empty(num_rows, dtype=torch.int64, device=best_RP.device)
    rows = rows_of_program(num_rows)
    best_of_ranks_kernel[(triton.cdiv(num_rows, rows),)](
        best_RP,
        best_token_RP,
        token_R,
        regions.table,
        num_rows,
        num_spans,
        NUM_RANKS=regions.num_ranks,
        ROWS=rows,
        SPANS_P=triton.next_power_of_2(num_spans),
        num_warps=1 if rows * num_spans <= 32 else 4,
        **launch_options(best_RP.device),
    )
    return token_R


def sample_columns(
    logits_RW: Tensor, temperature_R: Tensor, seed_R: Tensor, pos_R: Tensor, num_columns: int
) -> Tensor:
    """`collectives.sample_columns`; a token is the one that `sample` gives for whole logits."""
    num_rows, width = logits_RW.shape
    if num_rows == 0:
        return torch.empty(0, dtype=torch.int64, device=logits_RW.device)
    part = collectives.own_columns(width, num_columns)
    best_RP, token_RP = best_of_spans(logits_RW, temperature_R, seed_R, pos_R, part)
    regions = collectives.current().peers
    if regions is not None:
        return best_through(best_RP, token_RP, regions)
    token_RP = token_RP.where(best_RP > float("-inf"), NO_TOKEN.value)
    return collectives.best_of_ranks(collectives.ordered(best_RP, token_RP).amax(1))
