"""Registers our Triton kernels of packed weights for CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nanovllm.kernels import ops
from nanovllm.kernels.triton.clamped import packed_clamped_experts
from nanovllm.kernels.triton.packed_experts import (
    fp8_expert_linear,
    fp8_experts,
    packed_expert_linear,
    packed_experts,
)
from nanovllm.kernels.triton.packed_linear import (
    fp8_linear,
    fused_fp8_linear,
    fused_packed_linear,
    packed_linear,
)
from nanovllm.kernels.triton.packed_lookup import packed_lookup

KERNELS: dict[str, Callable[..., Any]] = {
    "packed_lookup": packed_lookup,
    "packed_linear": packed_linear,
    "packed_expert_linear": packed_expert_linear,
    "packed_clamped_experts": packed_clamped_experts,
    "packed_experts": packed_experts,
    "fused_packed_linear": fused_packed_linear,
    "fp8_linear": fp8_linear,
    "fp8_expert_linear": fp8_expert_linear,
    "fp8_experts": fp8_experts,
    "fused_fp8_linear": fused_fp8_linear,
}


def register() -> None:
    """Register the kernels for the dispatch key CUDA; a second call changes nothing."""
    ops.register_kernels("CUDA", KERNELS)
