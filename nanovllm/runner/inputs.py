"""Pads the tokens that rows feed to the fixed-size arrays of a bucket.

A bucket has T tokens and R rows. Padding rows are the last row of the state and feed no tokens.
Padding tokens come after the last row's tokens and belong to no row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class SpanArrays(NamedTuple):
    """The fields of a `Span` on the host."""

    row_idx_R: np.ndarray
    num_tokens_R: np.ndarray
    token_T: np.ndarray


def span_arrays(
    rows: Sequence[int],
    nums: Sequence[int],
    token_ids: np.ndarray,
    *,
    num_rows: int,
    num_tokens: int,
    pad_row: int,
) -> SpanArrays:
    """Pad a step in which `rows` of the state feed `nums` of `token_ids` each.

    R = `num_rows`, T = `num_tokens`.
    """
    row_idx_R = np.full(num_rows, pad_row, np.int64)
    num_tokens_R = np.zeros(num_rows, np.int64)
    token_T = np.zeros(num_tokens, np.int64)
    row_idx_R[: len(rows)], num_tokens_R[: len(nums)] = rows, nums
    token_T[: len(token_ids)] = token_ids
    return SpanArrays(row_idx_R, num_tokens_R, token_T)
