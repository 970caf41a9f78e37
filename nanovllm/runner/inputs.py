"""All padding: what rows feed becomes the fixed-size arrays of a bucket.

T tokens and R rows of the bucket. Padding rows are the state's last row and feed nothing; padding
tokens come after the last row's and belong to no row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class SpanArrays(NamedTuple):
    """Host side of a `Span`, field by field."""

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
    """Rows of the state that feed `nums` of `token_ids` each, in R = `num_rows`, T = `num_tokens`."""
    row_idx_R = np.full(num_rows, pad_row, np.int64)
    num_tokens_R = np.zeros(num_rows, np.int64)
    token_T = np.zeros(num_tokens, np.int64)
    row_idx_R[: len(rows)], num_tokens_R[: len(nums)] = rows, nums
    token_T[: len(token_ids)] = token_ids
    return SpanArrays(row_idx_R, num_tokens_R, token_T)
