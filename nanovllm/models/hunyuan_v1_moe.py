"""Hunyuan with experts (Hunyuan-A13B): the attention of the dense models, and a shared expert."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nanovllm.models import hunyuan_v1_dense, moe
from nanovllm.models.config import ModelConfig, MoeConfig, dense_config, require_type
from nanovllm.models.group_router import GroupRouter
from nanovllm.models.model import Batch, LayerCache, LayerCall, LayerKind, Model, Param

NAME = "HunYuanMoEV1ForCausalLM"
NAMES = moe.QWEN_NAMES._replace(
    router="mlp.gate.wg.weight", shared="mlp.shared_mlp", shared_gate=None
)


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `HunYuanMoEV1Config`."""
    require_type(hf, NAME, "hunyuan_v1_moe")
    config = dense_config(
        hunyuan_v1_dense.with_stretched_base(hf),
        architecture=NAME,
        dtype=dtype,
        max_model_len=max_model_len,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        qk_norm=True,
        moe=MoeConfig(
            num_experts=_of_all_layers(hf, "num_experts"),
            top_k=_of_all_layers(hf, "moe_topk"),
            expert_size=hf.intermediate_size,
            normalize=True,
            shared_size=hf.intermediate_size,
            router=GroupRouter("softmax"),
        ),
    )
    plain = moe.moe_model(config, NAMES, (True,) * hf.num_hidden_layers)
    return replace(
        plain, layer=layer, layer_params=layer_params, kv_scales=hunyuan_v1_dense.kv_scales
    )


def _of_all_layers(hf: Any, name: str) -> int:
    """A number that a config may have once or for each layer. Raises ValueError for layers that
    differ."""
    value = getattr(hf, name)
    values = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(values) != 1:
        raise ValueError(f"{name} is {value}: only one number for all layers is supported")
    return int(values.pop())


def layer(
    cfg: ModelConfig,
    call: LayerCall,
    w: moe.SparseLayer,
    kv: LayerCache,
    cos_sin_MH: Tensor,
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    """One decoder layer: see `dense.layer`."""
    moe.predict(cfg, call, w, kv, batch, h_TD)
    h_TD = hunyuan_v1_dense.attention(cfg, call, w, kv, cos_sin_MH, batch, h_TD)
    return moe.sparse_mlp(cfg, w, kv, batch, h_TD)


def layer_params(cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
    """Parameters of one decoder layer, with this family's names of norms."""
    return hunyuan_v1_dense.named(NAMES.layer_params(cfg, kind, layer_idx), layer_idx)
