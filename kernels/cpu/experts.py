"""Layers with experts on a CPU: `experts.cpp`, called through ctypes as in `library.py`.

The library is compiled or loaded at the first call, so models without experts never wait for it.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from nanovllm.kernels import ops, reference
from nanovllm.kernels.cpu import build
from nanovllm.kernels.cpu import library as cpu_library

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}

_TOPK_SOFTMAX = build.ArgumentStruct(
    "TopkSoftmax",
    pointers="weight expert logits",
    integers="num_tokens num_experts top_k normalize logits_stride dtype num_threads",
)
_EXPERTS = build.ArgumentStruct(
    "Experts",
    pointers="out x weight expert gate_up down residual",
    integers="num_tokens num_chosen num_experts size inner_size is_expert_parallel dtype "
    "num_threads",
)
_EXPERT_LINEAR = build.ArgumentStruct(
    "ExpertLinear",
    pointers="out x expert weight",
    integers="num_pairs x_repeats num_experts num_outputs depth dtype num_threads",
)
_STRUCTS = (_TOPK_SOFTMAX, _EXPERTS, _EXPERT_LINEAR)


@functools.cache
def _load() -> ctypes.CDLL:
    """Compile the library or find it in the cache, and load it. Raises as `build.load` does."""
    library = build.load(Path(__file__).with_suffix(".cpp"), _STRUCTS)
    for name in ("topk_softmax", "experts", "expert_linear"):
        function = getattr(library, f"nanovllm_{name}")
        function.argtypes, function.restype = (ctypes.c_char_p,), ctypes.c_int64
    library.nanovllm_topk_softmax.restype = None
    cpu_library.lend_threads(cpu_library.load(), library)
    return library


def topk_softmax(logits_TE: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """`reference.experts.topk_softmax` in one pass over the logits."""
    code = _DTYPE_CODES.get(logits_TE.dtype)
    num_tokens, num_experts = logits_TE.shape
    if code is None or not 0 < top_k <= num_experts:
        return reference.experts.topk_softmax(logits_TE, top_k, normalize)
    if logits_TE.stride(1) != 1:
        logits_TE = logits_TE.contiguous()
    weight_TK = torch.empty((num_tokens, top_k))
    expert_TK = torch.empty((num_tokens, top_k), dtype=torch.int32)
    _load().nanovllm_topk_softmax(
        _TOPK_SOFTMAX.pack(
            weight_TK.data_ptr(),
            expert_TK.data_ptr(),
            logits_TE.data_ptr(),
            num_tokens,
            num_experts,
            top_k,
            normalize,
            logits_TE.stride(0),
            code,
            torch.get_num_threads(),
        )
    )
    return weight_TK, expert_TK


def _is_dense(tensor: Tensor | None, dtype: torch.dtype) -> bool:
    return tensor is None or (tensor.dtype is dtype and tensor.is_contiguous())


def experts(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    residual_TD: Tensor | None = None,
    local_X: Tensor | None = None,
) -> Tensor:
    """`reference.experts.experts` for fp32 and bf16; each chosen expert's weights are read once.

    (Once for each 8,192 pairs of a token and an expert, or fewer if rows are large.)
    Raises IndexError for an expert that is not there.
    """
    dtype, code = x_TD.dtype, _DTYPE_CODES.get(x_TD.dtype)
    if code is None or not (
        _is_dense(gate_up_EGD, dtype)
        and _is_dense(down_EDF, dtype)
        and _is_dense(residual_TD, dtype)
    ):
        return reference.experts.experts(
            x_TD, weight_TK, expert_TK, gate_up_EGD, down_EDF, residual_TD, local_X
        )
    if local_X is not None:
        expert_TK = local_X[expert_TK.long()]
    x_TD, weight_TK, expert_TK = x_TD.contiguous(), weight_TK.float().contiguous(), _ids(expert_TK)
    out_TD = torch.empty_like(x_TD)
    num_experts, size, inner_size = down_EDF.shape
    done = _load().nanovllm_experts(
        _EXPERTS.pack(
            out_TD.data_ptr(),
            x_TD.data_ptr(),
            weight_TK.data_ptr(),
            expert_TK.data_ptr(),
            gate_up_EGD.data_ptr(),
            down_EDF.data_ptr(),
            0 if residual_TD is None else residual_TD.data_ptr(),
            *expert_TK.shape,
            num_experts,
            size,
            inner_size,
            local_X is not None,
            code,
            torch.get_num_threads(),
        )
    )
    return out_TD if done else _refuse(expert_TK, num_experts)


def expert_linear(x: Tensor, expert_TK: Tensor, weight_EOD: Tensor) -> Tensor:
    """`reference.experts.expert_linear` for fp32 and bf16. Raises IndexError as `experts` does."""
    dtype, code = x.dtype, _DTYPE_CODES.get(x.dtype)
    if code is None or not _is_dense(weight_EOD, dtype):
        return reference.experts.expert_linear(x, expert_TK, weight_EOD)
    x, expert_TK = x.contiguous(), _ids(expert_TK)
    num_experts, num_outputs, depth = weight_EOD.shape
    out_TKO = x.new_empty((*expert_TK.shape, num_outputs))
    done = _load().nanovllm_expert_linear(
        _EXPERT_LINEAR.pack(
            out_TKO.data_ptr(),
            x.data_ptr(),
            expert_TK.data_ptr(),
            weight_EOD.data_ptr(),
            expert_TK.numel(),
            expert_TK.shape[1] if x.dim() == 2 else 1,
            num_experts,
            num_outputs,
            depth,
            code,
            torch.get_num_threads(),
        )
    )
    return out_TKO if done else _refuse(expert_TK, num_experts)


def _ids(expert_TK: Tensor) -> Tensor:
    return expert_TK.to(torch.int32).contiguous()


def _refuse(expert_TK: Tensor, num_experts: int) -> Tensor:
    low, high = int(expert_TK.min()), int(expert_TK.max())
    raise IndexError(f"experts {low} to {high} are chosen, and there are {num_experts}")


KERNELS = {kernel.__name__: kernel for kernel in (topk_softmax, experts, expert_linear)}


def register() -> None:
    """Make these the ops' CPU kernels. Later calls do nothing."""
    ops.register_kernels("CPU", KERNELS)
