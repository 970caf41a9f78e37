"""The decoder with latent attention and experts: DeepSeek-V2, DeepSeek-V3, GLM-4.7-Flash.

The letters of shapes are those of `latent` and `moe`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm.models import dense, latent, moe
from nanovllm.models.config import ModelConfig, MoeConfig, dense_config
from nanovllm.models.experts import Experts
from nanovllm.models.formats import Weight
from nanovllm.models.latent import LatentConfig, LatentSizes
from nanovllm.models.model import Batch, LatentCache, LayerCall, LayerKind, Model, Param
from nanovllm.models.moe import ExpertNames


class DenseLayer(NamedTuple):
    """Weights of one decoder layer with an MLP."""

    attn_norm_D: Tensor
    first_ED: Weight
    first_bias_E: Tensor | None
    q_norm_A: Tensor | None
    q_up_QA: Weight | None
    kv_norm_L: Tensor
    kv_up_XL: Tensor
    out_DQ: Weight
    out_bias_D: Tensor | None
    mlp_norm_D: Tensor
    gate_up_GD: Weight
    gate_up_bias_G: Tensor | None
    down_DF: Weight
    down_bias_D: Tensor | None


class SparseLayer(NamedTuple):
    """Weights of one decoder layer with experts: see `moe.SparseWeights`."""

    attn_norm_D: Tensor
    first_ED: Weight
    first_bias_E: Tensor | None
    q_norm_A: Tensor | None
    q_up_QA: Weight | None
    kv_norm_L: Tensor
    kv_up_XL: Tensor
    out_DQ: Weight
    out_bias_D: Tensor | None
    mlp_norm_D: Tensor
    router_ED: Tensor
    router_bias_E: Tensor | None
    experts: Experts
    shared_gate_1D: Tensor | None
    gate_up_GD: Weight
    down_DF: Weight


def latent_config(
    hf: Any, *, architecture: str, dtype: torch.dtype, max_model_len: int | None, moe: MoeConfig
) -> LatentConfig:
    """The config of an architecture of this decoder, from transformers' config. Raises ValueError
    for settings that this engine does not support."""
    if hf.num_key_value_heads != hf.num_attention_heads:
        raise ValueError(
            f"num_key_value_heads is {hf.num_key_value_heads}, but all heads have their own keys: "
            f"it must be num_attention_heads, {hf.num_attention_heads}"
        )
    if hf.head_dim != hf.qk_rope_head_dim:
        raise ValueError(
            f"head_dim is {hf.head_dim}: it must be qk_rope_head_dim, {hf.qk_rope_head_dim}"
        )
    has_bias, rank = bool(hf.attention_bias), hf.q_lora_rank
    if has_bias and rank is None:
        raise ValueError("attention_bias True is not supported with q_lora_rank null")
    if rank is not None and rank < 1:
        raise ValueError(f"q_lora_rank is {rank}: it must be null or at least 1")
    if moe.shared_size < 1:
        raise ValueError(f"n_shared_experts is {hf.n_shared_experts}: it must be at least 1")
    config = dense_config(
        hf,
        architecture=architecture,
        dtype=dtype,
        max_model_len=max_model_len,
        qkv_bias=has_bias,
        out_bias=has_bias,
        moe=moe,
    )
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    sizes = LatentSizes(
        latent=hf.kv_lora_rank,
        rotated=hf.qk_rope_head_dim,
        plain=hf.qk_nope_head_dim,
        value=hf.v_head_dim,
        queries=rank or 0,
        scale=latent.attention_scale(hf, hf.qk_nope_head_dim + hf.qk_rope_head_dim),
        is_interleaved=getattr(hf, "rope_interleave", True),
    )
    return LatentConfig(**{**values, "head_dim": sizes.rotated}, latent=sizes)


def latent_model(
    cfg: LatentConfig, names: ExpertNames, is_sparse: Sequence[bool], not_read: tuple[str, ...]
) -> Model:
    """The model of a config; `is_sparse` has an entry for each layer, and `not_read` are prefixes
    of tensors (`proposing_layers`)."""
    keeps = latent.paged_latent(cfg)
    kinds = [LayerKind("sparse" if sparse else "dense", keeps, sparse) for sparse in is_sparse]
    return Model(
        config=cfg,
        layer_kinds=tuple(kinds),
        embed=dense.embed,
        layer=layer,
        head=dense.head,
        outer_params=dense.outer_params,
        layer_params=partial(layer_params, names),
        layer_type=layer_type,
        read_elsewhere=not_read,
    )


# regions -----------------------------------------------------------------------------------------


def layer(
    cfg: LatentConfig,
    call: LayerCall,
    w: DenseLayer | SparseLayer,
    kv: LatentCache,
    cos_sin_MH: Tensor,
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    """One decoder layer, dense or sparse: see `dense.layer`."""
    if isinstance(w, SparseLayer):
        moe.predict(cfg, call, w, kv, batch, h_TD)
    h_TD = latent.attention(cfg, call, w, kv, cos_sin_MH, batch, h_TD)
    if isinstance(w, DenseLayer):
        return dense.mlp(cfg, w, h_TD)
    return moe.sparse_mlp(cfg, w, kv, batch, h_TD)


# parameters --------------------------------------------------------------------------------------


def layer_type(kind: LayerKind) -> type[DenseLayer] | type[SparseLayer]:
    return SparseLayer if kind.sparse else DenseLayer


def layer_params(
    names: ExpertNames, cfg: ModelConfig, kind: LayerKind, layer_idx: int
) -> dict[str, Param]:
    """Parameters of one decoder layer, by the fields of `layer_type(kind)`."""
    assert isinstance(cfg, LatentConfig)
    first = latent.attention_params(cfg, layer_idx)
    if kind.sparse:
        return {**first, **moe.sparse_mlp_params(cfg, names, layer_idx)}
    return {**first, **dense.mlp_params(cfg, layer_idx)}
