"""The ops by which a decode step advances itself: their schemas and their plain-torch meaning.

They are index arithmetic on a few numbers per row. As ops each is one launch; as plain torch they are two dozen, and as
generated code they would be the only reason to start a compiler.

S rows of the device state | R rows of a step | P blocks per row | F sampling fields, the first of them the temperature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels import ops


def decode_inputs_meaning(
    token_S: Tensor, pos_S: Tensor, block_table_SP: Tensor, row_idx_R: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Each row's newest token, and where it stands: (token_R, pos_R, slot_R, block_table_RP, seq_len_R, q_start).

    slot = block_table[pos // block_size] · block_size + pos % block_size; seq_len = pos + 1; q_start = 0 … R.
    """
    pos_R = pos_S[row_idx_R]
    table_RP = block_table_SP[row_idx_R]
    block_R = table_RP.gather(1, (pos_R // block_size).unsqueeze(1)).squeeze(1)
    slot_R = block_R.long() * block_size + pos_R % block_size
    q_start = torch.arange(row_idx_R.shape[0] + 1, dtype=torch.int32, device=row_idx_R.device)
    return token_S[row_idx_R], pos_R, slot_R, table_RP, (pos_R + 1).int(), q_start


def sampling_inputs_meaning(
    pos_S: Tensor, sampling_SF: Tensor, seed_S: Tensor, row_idx_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(temperature_R, seed_R, position of the token to be chosen)."""
    return sampling_SF[row_idx_R, 0], seed_S[row_idx_R], pos_S[row_idx_R] + 1


def advance_meaning(token_S: Tensor, pos_S: Tensor, row_idx_R: Tensor, token_R: Tensor) -> None:
    """token_S[row] = token, pos_S[row] += 1, in place. The last row of the state, which only padding uses (any number of
    times in one step), stays at token 0 of position 0; other rows occur once."""
    is_real_R = row_idx_R != token_S.shape[0] - 1
    token_S.index_copy_(0, row_idx_R, torch.where(is_real_R, token_R, 0))
    pos_S.index_copy_(0, row_idx_R, torch.where(is_real_R, pos_S[row_idx_R] + 1, 0))


def _decode_inputs_fake(
    token_S: Tensor, pos_S: Tensor, block_table_SP: Tensor, row_idx_R: Tensor, block_size: int
) -> tuple[Tensor, ...]:
    rows, int32 = row_idx_R.shape[0], torch.int32
    return (
        *(row_idx_R.new_empty(rows) for _ in range(3)),
        row_idx_R.new_empty((rows, block_table_SP.shape[1]), dtype=int32),
        row_idx_R.new_empty(rows, dtype=int32),
        row_idx_R.new_empty(rows + 1, dtype=int32),
    )


decode_inputs = ops._define(
    "decode_inputs(Tensor token, Tensor pos, Tensor block_table, Tensor row_idx, int block_size) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    decode_inputs_meaning,
    _decode_inputs_fake,
)
sampling_inputs = ops._define(
    "sampling_inputs(Tensor pos, Tensor sampling, Tensor seed, Tensor row_idx) -> (Tensor, Tensor, Tensor)",
    sampling_inputs_meaning,
    lambda pos, sampling, seed, row_idx: (
        sampling.new_empty(row_idx.shape[0]),
        row_idx.new_empty(row_idx.shape[0]),
        row_idx.new_empty(row_idx.shape[0]),
    ),
)
advance = ops._define(
    "advance(Tensor(a!) token, Tensor(b!) pos, Tensor row_idx, Tensor new_token) -> ()",
    advance_meaning,
    lambda token, pos, row_idx, new_token: None,
)

MEANINGS: dict[str, Callable[..., Any]] = {
    "decode_inputs": decode_inputs_meaning,
    "sampling_inputs": sampling_inputs_meaning,
    "advance": advance_meaning,
}
