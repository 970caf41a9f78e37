"""Products of blocks of codes of GGUF files: `ggml.cpp`, called through ctypes as in `library.py`.

Rows of x are quantized to int8 as for packed codes: see `packed`. If inputs must be exact, the
meaning in plain torch runs.

The library is compiled or loaded at the first call, so other models never wait for it.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from nanovllm.kernels import ops, reference
from nanovllm.kernels.cpu import build, packed
from nanovllm.kernels.cpu import library as cpu_library


@functools.cache
def _load() -> ctypes.CDLL:
    """Compile the library or find it in the cache, and load it. Raises as `build.load` does."""
    library = build.load(Path(__file__).with_suffix(".cpp"), (packed.PACKED,))
    for function in (library.nanovllm_ggml_linear, library.nanovllm_ggml_lookup):
        function.argtypes, function.restype = (ctypes.c_char_p,), ctypes.c_int64
    cpu_library.lend_threads(cpu_library.load(), library)
    return library


def covers(x: Tensor, block: Tensor, ggml_type: int) -> bool:
    """True if the kernel reads these tensors as they are."""
    kind = reference.ggml.TYPES.get(ggml_type)
    return (
        kind is not None
        and not packed.are_exact()
        and x.numel() > 0
        and x.dtype in packed.INPUT_CODES
        and block.dtype is torch.uint8
        and block.stride(-1) == 1
        and block.shape[-1] * kind.columns == x.shape[-1] * kind.num_bytes
    )


def ggml_linear(
    x_TD: Tensor,
    block_OB: Tensor,
    ggml_type: int,
    bias_O: Tensor | None,
    residual_TO: Tensor | None = None,
    *,
    ordered: bool = False,
) -> Tensor:
    """`reference.ggml.ggml_linear`, with x quantized to int8. If `ordered`, any number of rows
    takes the kernel of few."""
    shape = (*x_TD.shape[:-1], block_OB.shape[0])
    if (
        x_TD.dim() != 2
        or not covers(x_TD, block_OB, ggml_type)
        or not packed.is_dense(bias_O, x_TD.dtype)
        or (
            residual_TO is not None
            and (residual_TO.dtype is not x_TD.dtype or residual_TO.shape != shape)
        )
    ):
        return reference.ggml.ggml_linear(x_TD, block_OB, ggml_type, bias_O, residual_TO)
    if x_TD.stride(1) != 1:
        x_TD = x_TD.contiguous()
    residual_TO = None if residual_TO is None else residual_TO.contiguous()
    weight = packed.Weight(block_OB, None, None, None, ggml_type, 0)
    out_TO = x_TD.new_empty(shape)
    depth = x_TD.shape[1]
    _load().nanovllm_ggml_linear(
        packed.arguments_of(out_TO, x_TD, None, weight, depth, bias_O, residual_TO, ordered=ordered)
    )
    return out_TO


def ggml_expert_linear(x: Tensor, expert_TK: Tensor, block_EOB: Tensor, ggml_type: int) -> Tensor:
    """`reference.ggml.ggml_expert_linear`; raises IndexError for an expert that is not there."""
    if not covers(x, block_EOB, ggml_type):
        return reference.ggml.ggml_expert_linear(x, expert_TK, block_EOB, ggml_type)
    x, expert_TK = x.contiguous(), expert_TK.to(torch.int32).contiguous()
    weight = packed.Weight(block_EOB, None, None, None, ggml_type, 0)
    out_TKO = x.new_empty((*expert_TK.shape, block_EOB.shape[1]))
    arguments = packed.arguments_of(out_TKO, x, expert_TK, weight, x.shape[-1])
    if not _load().nanovllm_ggml_linear(arguments):
        packed.refuse(expert_TK, block_EOB.shape[0])
    return out_TKO


def ggml_lookup(row_T: Tensor, block_VB: Tensor, ggml_type: int, dtype: torch.dtype) -> Tensor:
    """`reference.ggml.ggml_lookup`; raises IndexError for a row that is not there."""
    is_read = ggml_type in reference.ggml.TYPES and dtype in packed.INPUT_CODES
    if not is_read or row_T.dim() != 1 or block_VB.stride(1) != 1:
        return reference.ggml.ggml_lookup(row_T, block_VB, ggml_type, dtype)
    depth = reference.ggml.depth_of(block_VB, ggml_type)
    out_TD = torch.empty((len(row_T), depth), dtype=dtype)
    row_T1 = row_T.to(torch.int32).contiguous().unsqueeze(1)
    weight = packed.Weight(block_VB, None, None, None, ggml_type, 0)
    arguments = packed.arguments_of(out_TD, out_TD, row_T1, weight, depth)
    if len(row_T) and not _load().nanovllm_ggml_lookup(arguments):
        raise packed.missing_row(row_T, len(block_VB))
    return out_TD


KERNELS = {one.__name__: one for one in (ggml_linear, ggml_expert_linear, ggml_lookup)}


def register() -> None:
    """Make these the ops' CPU kernels. Later calls do nothing."""
    ops.register_kernels("CPU", KERNELS)
