"""What lives on the device between steps, and the pure functions by which a decode step advances it.

S rows, one per running request, and a last one that only padding uses: it stays at position 0 of block 0, which no
request owns. R rows of a step | P blocks per row | V vocabulary | F = 4 sampling fields.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops, step
from nanovllm.models.dense import Batch

PAD_BLOCK = 0
SAMPLING_FIELDS = ("temperature", "top_p", "min_p", "top_k")


class DeviceState(NamedTuple):
    token_S: Tensor  # newest token, not yet in the cache
    pos_S: Tensor  # its position
    block_table_SP: Tensor
    sampling_SF: Tensor  # SAMPLING_FIELDS
    seed_S: Tensor

    @property
    def pad_row(self) -> int:
        return self.token_S.shape[0] - 1


def new_state(num_rows: int, blocks_per_row: int, device: torch.device) -> DeviceState:
    rows = num_rows + 1
    return DeviceState(
        token_S=torch.zeros(rows, dtype=torch.int64, device=device),
        pos_S=torch.zeros(rows, dtype=torch.int64, device=device),
        block_table_SP=torch.full(
            (rows, blocks_per_row), PAD_BLOCK, dtype=torch.int32, device=device
        ),
        sampling_SF=torch.zeros(rows, len(SAMPLING_FIELDS), dtype=torch.float32, device=device),
        seed_S=torch.zeros(rows, dtype=torch.int64, device=device),
    )


def decode_batch(block_size: int, state: DeviceState, row_idx_R: Tensor) -> tuple[Tensor, Batch]:
    """Each row's newest token, and where it stands: everything a decode step needs follows from the state."""
    token_R, *batch = step.decode_inputs(
        state.token_S, state.pos_S, state.block_table_SP, row_idx_R, block_size
    )
    return token_R, Batch(*batch)


def sample_and_advance(state: DeviceState, row_idx_R: Tensor, logits_RV: Tensor) -> Tensor:
    """Choose each row's next token by its temperature alone, write it back, step its position; returns token_R."""
    token_R = ops.sample(
        logits_RV, *step.sampling_inputs(state.pos_S, state.sampling_SF, state.seed_S, row_idx_R)
    )
    advance(state, row_idx_R, token_R)
    return token_R


def advance(state: DeviceState, row_idx_R: Tensor, token_R: Tensor) -> None:
    """Make token_R the newest tokens of their rows; the padding row stays where it is."""
    step.advance(state.token_S, state.pos_S, row_idx_R, token_R)
