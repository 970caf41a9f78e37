"""A bucket's arrays: real tokens are written to their rows' slots, padding to block 0."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nanovllm.kernels import reference
from nanovllm.runner.inputs import SpanArrays, span_arrays

BLOCK, PAD_ROW, PER_ROW = 4, 9, 6


def arrays(rows: list[int], nums: list[int], num_tokens: int = 19, num_rows: int = 5) -> SpanArrays:
    token_ids = np.arange(100, 100 + sum(nums))
    return span_arrays(
        rows, nums, token_ids, num_rows=num_rows, num_tokens=num_tokens, pad_row=PAD_ROW
    )


def slots(made: SpanArrays) -> tuple[list[int], list[int]]:
    """Returns a step's (slot_T, row_T). Every row owns block 3 and is at position 0."""
    zeros_S = torch.zeros(PAD_ROW + 1, dtype=torch.int64)
    table_SP = torch.full((PAD_ROW + 1, PER_ROW), 3, dtype=torch.int32)
    table_SP[PAD_ROW] = 0
    span = (torch.from_numpy(array) for array in made)
    found = reference.step.span_inputs(zeros_S, zeros_S, zeros_S, table_SP, *span, BLOCK)
    return found[2].tolist(), found[6].tolist()


def test_rows_are_packed_one_after_another() -> None:
    made = arrays([3, 1], [5, 6])
    assert made.row_idx_R.tolist() == [3, 1, PAD_ROW, PAD_ROW, PAD_ROW]
    assert made.num_tokens_R.tolist() == [5, 6, 0, 0, 0]
    assert made.token_T.tolist() == [*range(100, 111), *[0] * 8]


@pytest.mark.parametrize("num_tokens", [1, 19, 99, 989])
def test_padding_writes_to_the_padding_block_only(num_tokens: int) -> None:
    slot_T, row_T = slots(arrays([2], [1], num_tokens=num_tokens))
    assert slot_T[0] == 3 * BLOCK and row_T[0] == 2
    assert all(0 <= slot < BLOCK for slot in slot_T[1:]) and set(row_T[1:]) <= {PAD_ROW}


@pytest.mark.parametrize("num_tokens", [1, 19, 99])
def test_a_step_of_padding_alone_has_no_rows(num_tokens: int) -> None:
    made = arrays([], [], num_tokens=num_tokens)
    assert not made.num_tokens_R.any() and (made.row_idx_R == PAD_ROW).all()
    slot_T, row_T = slots(made)
    assert all(0 <= slot < BLOCK for slot in slot_T) and set(row_T) == {PAD_ROW}
    assert {array.dtype for array in made} == {np.dtype(np.int64)}
