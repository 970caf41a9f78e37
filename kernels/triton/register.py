"""Registers our Triton kernels for CUDA (sm_75 and newer) and for ROCm.

torch calls both CUDA. Importing this module needs triton: import it once the platform is known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels import ops, reference
from nanovllm.kernels.reference.latent_attention import Parts
from nanovllm.kernels.triton import drafts
from nanovllm.kernels.triton.adapter_tiles import adapter_tiles
from nanovllm.kernels.triton.all_reduce import (
    all_reduce,
    all_reduce_,
    all_reduce_norm,
    gather_columns,
)
from nanovllm.kernels.triton.attention_decode import paged_attention_decode
from nanovllm.kernels.triton.attention_prefill import paged_attention_prefill
from nanovllm.kernels.triton.attention_prefill_hopper import paged_attention_prefill_hopper, suits
from nanovllm.kernels.triton.causal_conv import causal_conv
from nanovllm.kernels.triton.clamped import clamped_experts
from nanovllm.kernels.triton.experts import expert_linear, experts, gelu_experts, offloaded_experts
from nanovllm.kernels.triton.gated_delta import gated_delta
from nanovllm.kernels.triton.gated_delta_step import gated_delta_step
from nanovllm.kernels.triton.group_topk import group_topk
from nanovllm.kernels.triton.latent_decode import latent_attention_decode
from nanovllm.kernels.triton.latent_inputs import head_linear, latent_inputs
from nanovllm.kernels.triton.latent_prefill import latent_attention_prefill
from nanovllm.kernels.triton.layer_norm import layer_norm
from nanovllm.kernels.triton.linear import fused_linear, linear_
from nanovllm.kernels.triton.lora import add_lora, add_lora_, add_lora_silu
from nanovllm.kernels.triton.lora_row import lora_linear
from nanovllm.kernels.triton.norm_act import add_rms_norm, rms_norm, silu_mul
from nanovllm.kernels.triton.offload import fetch_experts, stream_experts
from nanovllm.kernels.triton.ordered_attention import ordered_attention
from nanovllm.kernels.triton.ordered_experts import ordered_experts
from nanovllm.kernels.triton.ordered_gemm import ordered_linear
from nanovllm.kernels.triton.rope_store import qk_norm_rope_store, rope, store_kv
from nanovllm.kernels.triton.sample import sample, sample_of
from nanovllm.kernels.triton.sample_columns import sample_columns
from nanovllm.kernels.triton.ssd import ssd
from nanovllm.kernels.triton.ssd_step import ssd_step
from nanovllm.kernels.triton.token_bitmask import apply_token_bitmask
from nanovllm.kernels.triton.topk_softmax import norm_router_topk, topk_softmax
from nanovllm.kernels.triton.topk_topp import apply_top_k_top_p
from nanovllm.kernels.triton.varlen_attention import segment_attention, varlen_attention
from nanovllm.kernels.triton.zero_padding import zero_padding_


def paged_attention(
    q_TNH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    max_q_len: int,
    scale: float,
    window: int,
    k_scale_K: Tensor | None = None,
    v_scale_K: Tensor | None = None,
    sinks_N: Tensor | None = None,
    end_T: Tensor | None = None,
) -> Tensor:
    """`reference.attention.paged_attention`; decode (max_q_len 1) and prefill are different
    kernels, and long prefills on Hopper have one of their own."""
    if max_q_len == 1:
        return paged_attention_decode(
            q_TNH,
            k_cache_CBKH,
            v_cache_CBKH,
            block_table_RP,
            seq_len_R,
            scale,
            window,
            None,
            k_scale_K,
            v_scale_K,
            sinks_N,
        )
    is_plain = sinks_N is None and end_T is None
    if is_plain and suits(q_TNH, k_cache_CBKH, v_cache_CBKH, max_q_len, window):
        return paged_attention_prefill_hopper(
            q_TNH, k_cache_CBKH, v_cache_CBKH, block_table_RP, seq_len_R, q_start_S, scale
        )
    return paged_attention_prefill(
        q_TNH,
        k_cache_CBKH,
        v_cache_CBKH,
        block_table_RP,
        seq_len_R,
        q_start_S,
        max_q_len,
        scale,
        window,
        None,
        k_scale_K,
        v_scale_K,
        sinks_N,
        end_T,
    )


def latent_attention(
    q_TNZ: Tensor,
    cache_CBZ: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    max_q_len: int,
    scale: float,
    latent_size: int,
) -> Tensor:
    """`reference.latent_attention.latent_attention`; decode (max_q_len 1) and steps of several
    tokens a row are different kernels."""
    if max_q_len == 1:
        return latent_attention_decode(
            q_TNZ, cache_CBZ, block_table_RP, seq_len_R, scale, latent_size
        )
    return latent_attention_prefill(
        q_TNZ, cache_CBZ, block_table_RP, seq_len_R, q_start_S, max_q_len, scale, latent_size
    )


def latent_span_attention(*args: Any) -> Tensor:
    """`reference.latent_attention.latent_span_attention` by the kernels of the two forms."""
    parts = Parts(latent_attention_prefill, paged_attention_prefill, head_linear)
    meaning: Any = reference.latent_attention.latent_span_attention
    result: Tensor = meaning(*args, parts)
    return result


KERNELS: dict[str, Callable[..., Any]] = {
    "all_reduce": all_reduce,
    "all_reduce_": all_reduce_,
    "all_reduce_norm": all_reduce_norm,
    "gather_columns": gather_columns,
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "layer_norm": layer_norm,
    "silu_mul": silu_mul,
    "rope": rope,
    "store_kv": store_kv,
    "qk_norm_rope_store": qk_norm_rope_store,
    "paged_attention": paged_attention,
    "ordered_attention": ordered_attention,
    "ordered_experts": ordered_experts,
    "ordered_linear": ordered_linear,
    "head_linear": head_linear,
    "latent_attention": latent_attention,
    "latent_inputs": latent_inputs,
    "latent_span_attention": latent_span_attention,
    "segment_attention": segment_attention,
    "varlen_attention": varlen_attention,
    "zero_padding_": zero_padding_,
    "adapter_tiles": adapter_tiles,
    "add_lora": add_lora,
    "add_lora_": add_lora_,
    "add_lora_silu": add_lora_silu,
    "lora_linear": lora_linear,
    "fused_linear": fused_linear,
    "linear_": linear_,
    "sample": sample,
    "sample_columns": sample_columns,
    "sample_of": sample_of,
    "apply_top_k_top_p": apply_top_k_top_p,
    "apply_token_bitmask": apply_token_bitmask,
    "causal_conv": causal_conv,
    "gated_delta": gated_delta,
    "gated_delta_step": gated_delta_step,
    "ssd": ssd,
    "ssd_step": ssd_step,
    "topk_softmax": topk_softmax,
    "group_topk": group_topk,
    "norm_router_topk": norm_router_topk,
    "clamped_experts": clamped_experts,
    "gelu_experts": gelu_experts,
    "experts": experts,
    "expert_linear": expert_linear,
    "fetch_experts": fetch_experts,
    "stream_experts": stream_experts,
    "offloaded_experts": offloaded_experts,
    **drafts.KERNELS,
}


def register() -> None:
    """Register the kernels for the dispatch key CUDA; a second call changes nothing."""
    ops.register_kernels("CUDA", KERNELS)


def supported(device: torch.device) -> bool:
    """True if these kernels can run on the device. docs/gpus.md lists devices that were tried."""
    return device.type == "cuda" and (
        torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (7, 5)
    )
