"""Registers the kernels of `kernels.cpp` for torch's dispatch key CPU."""

from __future__ import annotations

from collections.abc import Callable

from nanovllm.kernels import ops
from nanovllm.kernels.cpu.attention import (
    latent_attention,
    latent_span_attention,
    paged_attention,
    qk_norm_rope_store,
)
from nanovllm.kernels.cpu.library import load
from nanovllm.kernels.cpu.linear import linear, linear_int8
from nanovllm.kernels.cpu.norm_act import (
    add_rms_norm,
    layer_norm,
    rms_norm,
    rms_norm_each,
    silu_mul,
)
from nanovllm.kernels.cpu.sample import apply_token_bitmask, sample, sample_columns, sample_of
from nanovllm.kernels.varlen_attention import segment_attention_cpu, varlen_attention_cpu

KERNELS: dict[str, Callable[..., object]] = {
    "add_rms_norm": add_rms_norm,
    "apply_token_bitmask": apply_token_bitmask,
    "latent_attention": latent_attention,
    "latent_span_attention": latent_span_attention,
    "paged_attention": paged_attention,
    "qk_norm_rope_store": qk_norm_rope_store,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "rms_norm_each": rms_norm_each,
    "linear": linear,
    "linear_int8": linear_int8,
    "sample": sample,
    "sample_of": sample_of,
    "sample_columns": sample_columns,
    "segment_attention": segment_attention_cpu,
    "varlen_attention": varlen_attention_cpu,
    "silu_mul": silu_mul,
}


def register() -> None:
    """Compile or load the library and register its kernels. A second call changes nothing."""
    load()
    ops.register_kernels("CPU", KERNELS)
