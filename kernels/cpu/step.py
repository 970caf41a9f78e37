"""The ops of `step.py` on a CPU: `cpu_step.cpp`, called through ctypes as `cpu_kernels.py` does it."""

from __future__ import annotations

import ctypes
import functools
import struct
from pathlib import Path

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.kernels.cpu import build as cpp_build

_DECODE_INPUTS_ARGS = struct.Struct("@10P 3q")
_SAMPLING_INPUTS_ARGS = struct.Struct("@7P 2q")
_ADVANCE_ARGS = struct.Struct("@4P 2q")


@functools.cache
def _load() -> ctypes.CDLL:
    library = cpp_build.load(Path(__file__).with_suffix(".cpp"))
    for name in ("nanovllm_decode_inputs", "nanovllm_sampling_inputs", "nanovllm_advance"):
        function = getattr(library, name)
        function.argtypes, function.restype = (ctypes.c_char_p,), None
    return library


def decode_inputs(
    token_S: Tensor, pos_S: Tensor, block_table_SP: Tensor, row_idx_R: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `step.decode_inputs_meaning`."""
    num_rows, num_blocks = row_idx_R.shape[0], block_table_SP.shape[1]
    token_R, pos_R, slot_R = (torch.empty_like(row_idx_R) for _ in range(3))
    table_RP = torch.empty((num_rows, num_blocks), dtype=torch.int32)
    seq_len_R, q_start = (
        torch.empty(num_rows, dtype=torch.int32),
        torch.empty(num_rows + 1, dtype=torch.int32),
    )
    written = (token_R, pos_R, slot_R, table_RP, seq_len_R, q_start)
    read = (token_S, pos_S, block_table_SP, row_idx_R)
    pointers = [tensor.data_ptr() for tensor in (*written, *read)]
    _load().nanovllm_decode_inputs(
        _DECODE_INPUTS_ARGS.pack(*pointers, num_rows, num_blocks, block_size)
    )
    return written


def sampling_inputs(
    pos_S: Tensor, sampling_SF: Tensor, seed_S: Tensor, row_idx_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `step.sampling_inputs_meaning`."""
    num_rows, num_fields = row_idx_R.shape[0], sampling_SF.shape[1]
    written = (torch.empty(num_rows), torch.empty_like(row_idx_R), torch.empty_like(row_idx_R))
    pointers = [tensor.data_ptr() for tensor in (*written, pos_S, sampling_SF, seed_S, row_idx_R)]
    _load().nanovllm_sampling_inputs(_SAMPLING_INPUTS_ARGS.pack(*pointers, num_rows, num_fields))
    return written


def advance(token_S: Tensor, pos_S: Tensor, row_idx_R: Tensor, token_R: Tensor) -> None:
    """See `step.advance_meaning`."""
    pointers = [tensor.data_ptr() for tensor in (token_S, pos_S, row_idx_R, token_R)]
    _load().nanovllm_advance(
        _ADVANCE_ARGS.pack(*pointers, row_idx_R.shape[0], token_S.shape[0] - 1)
    )


def register() -> None:
    """Compile or load the library and make its kernels the ops' CPU kernels; a second call changes nothing."""
    _load()
    ops.register_kernels(
        "CPU",
        {"decode_inputs": decode_inputs, "sampling_inputs": sampling_inputs, "advance": advance},
    )
