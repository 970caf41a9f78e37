"""All padding of prefill steps: chunks of requests become the fixed-size arrays of a bucket.

T tokens and R rows of the bucket. Padding tokens write to the padding block and belong to no row; padding rows have no
tokens and the state's padding row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanovllm.runner.state import PAD_BLOCK
from nanovllm.schedule.scheduler import Chunk


@dataclass(frozen=True)
class PrefillArrays:
    """Host side of one prefill step."""

    token_T: np.ndarray
    pos_T: np.ndarray
    slot_T: np.ndarray
    seq_len_R: np.ndarray
    q_start_S: np.ndarray
    block_table_RP: np.ndarray
    row_idx_R: np.ndarray  # state row of each request
    sample_row_R: (
        np.ndarray
    )  # the same where the chunk is its prompt's last, the padding row elsewhere
    last_R: np.ndarray  # index into T of each row's last token; 0 for padding rows


def prefill_arrays(
    chunks: Sequence[Chunk],
    *,
    num_tokens: int,
    num_rows: int,
    block_size: int,
    blocks_per_row: int,
    pad_row: int,
) -> PrefillArrays:
    """Pack chunks one after another into T = `num_tokens` and R = `num_rows`."""
    token_T = np.zeros(num_tokens, np.int64)
    pos_T = np.zeros(num_tokens, np.int64)
    slot_T = np.arange(num_tokens, dtype=np.int64) % block_size + PAD_BLOCK * block_size
    seq_len_R = np.zeros(num_rows, np.int32)
    q_start_S = np.zeros(num_rows + 1, np.int32)
    block_table_RP = np.full((num_rows, blocks_per_row), PAD_BLOCK, np.int32)
    row_idx_R = np.full(num_rows, pad_row, np.int64)
    sample_row_R = np.full(num_rows, pad_row, np.int64)
    last_R = np.zeros(num_rows, np.int64)
    end = 0
    for row, chunk in enumerate(chunks):
        request, start = chunk.request, end
        end += chunk.num_tokens
        positions = np.arange(chunk.start, chunk.start + chunk.num_tokens)
        blocks = np.asarray(request.blocks, np.int64)
        token_T[start:end] = request.known_ids[chunk.start : chunk.start + chunk.num_tokens]
        pos_T[start:end] = positions
        slot_T[start:end] = blocks[positions // block_size] * block_size + positions % block_size
        seq_len_R[row] = chunk.start + chunk.num_tokens
        q_start_S[row + 1 :] = end
        block_table_RP[row, : len(blocks)] = blocks
        row_idx_R[row] = request.row
        sample_row_R[row] = request.row if chunk.is_last else pad_row
        last_R[row] = end - 1
    return PrefillArrays(
        token_T,
        pos_T,
        slot_T,
        seq_len_R,
        q_start_S,
        block_table_RP,
        row_idx_R,
        sample_row_R,
        last_R,
    )
