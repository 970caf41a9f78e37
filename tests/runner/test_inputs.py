"""Packed prefill arrays: real tokens go to their own slots, padding to the padding block and the padding row."""

from __future__ import annotations

import numpy as np
import pytest

from nanovllm import SamplingParams
from nanovllm.runner.inputs import PrefillArrays, prefill_arrays
from nanovllm.schedule.request import Request
from nanovllm.schedule.scheduler import Chunk

BLOCK, PAD_ROW, PER_ROW = 4, 9, 6


def request(row: int, num_prompt: int, blocks: list[int], outputs: tuple[int, ...] = ()) -> Request:
    prompt_ids = [100 * (row + 1) + i for i in range(num_prompt)]
    made = Request(row, prompt_ids, SamplingParams(), 0, 8, frozenset())
    made.row, made.blocks, made.output_ids = row, blocks, list(outputs)
    return made


def arrays(chunks: list[Chunk], num_tokens: int = 19, num_rows: int = 5) -> PrefillArrays:
    return prefill_arrays(
        chunks,
        num_tokens=num_tokens,
        num_rows=num_rows,
        block_size=BLOCK,
        blocks_per_row=PER_ROW,
        pad_row=PAD_ROW,
    )


def test_chunks_are_packed_one_after_another() -> None:
    whole = request(3, 5, [7, 2])
    later = request(1, 11, [4, 8, 3])
    made = arrays([Chunk(whole, 0, 5, True), Chunk(later, 4, 6, False)])
    assert made.token_T[:11].tolist() == [400, 401, 402, 403, 404, 204, 205, 206, 207, 208, 209]
    assert made.pos_T[:11].tolist() == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9]
    assert made.slot_T[:11].tolist() == [28, 29, 30, 31, 8, 32, 33, 34, 35, 12, 13]
    assert made.seq_len_R.tolist() == [5, 10, 0, 0, 0]
    assert made.q_start_S.tolist() == [0, 5, 11, 11, 11, 11]
    assert (
        made.block_table_RP.tolist()
        == [[7, 2, 0, 0, 0, 0], [4, 8, 3, 0, 0, 0]] + [[0] * PER_ROW] * 3
    )
    assert made.row_idx_R.tolist() == [3, 1, PAD_ROW, PAD_ROW, PAD_ROW]
    assert made.last_R.tolist() == [4, 10, 0, 0, 0]


def test_only_last_chunks_sample_into_their_own_row() -> None:
    made = arrays(
        [Chunk(request(3, 5, [7, 2]), 0, 5, True), Chunk(request(1, 11, [4, 8, 3]), 4, 6, False)]
    )
    assert made.sample_row_R.tolist() == [3, PAD_ROW, PAD_ROW, PAD_ROW, PAD_ROW]


def test_restarted_requests_feed_their_outputs_too() -> None:
    made = arrays([Chunk(request(0, 3, [5, 6], outputs=(11, 12)), 0, 5, True)])
    assert made.token_T[:5].tolist() == [100, 101, 102, 11, 12]


@pytest.mark.parametrize("num_tokens", [1, 19, 99, 989])
def test_padding_writes_to_the_padding_block_only(num_tokens: int) -> None:
    made = arrays([Chunk(request(2, 1, [3]), 0, 1, True)], num_tokens=num_tokens)
    assert (
        (made.slot_T[1:] < BLOCK).all() and (made.slot_T >= 0).all() and made.slot_T[0] == 3 * BLOCK
    )
    assert not made.token_T[1:].any() and not made.pos_T[1:].any()


@pytest.mark.parametrize("num_tokens", [1, 19, 99])
def test_a_step_of_padding_alone_has_no_rows(num_tokens: int) -> None:
    made = arrays([], num_tokens=num_tokens)
    assert not made.q_start_S.any() and not made.seq_len_R.any() and not made.block_table_RP.any()
    assert (made.sample_row_R == PAD_ROW).all() and (made.slot_T < BLOCK).all()
    assert made.token_T.dtype == np.int64 and made.seq_len_R.dtype == np.int32
