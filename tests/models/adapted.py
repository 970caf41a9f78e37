"""A tiny architecture whose layers have adapters: each adds a bias of its own to their results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from nanovllm.models import dense, registry
from nanovllm.models.config import ModelConfig, dense_config
from nanovllm.models.formats import Weight
from nanovllm.models.model import Batch, LayerCache, LayerCall, LayerKind, Model, Param

NAME, VOCAB_SIZE, NUM_ADAPTERS = "AdaptedForCausalLM", 128, 2


class Layer(NamedTuple):
    """The fields of `dense.Layer`, and a row for each adapter: zeros for 0, none."""

    attn_norm_D: Tensor
    qkv_ED: Weight
    qkv_bias_E: Tensor | None
    q_norm_H: Tensor | None
    k_norm_H: Tensor | None
    out_DQ: Weight
    out_bias_D: Tensor | None
    mlp_norm_D: Tensor
    gate_up_GD: Weight
    gate_up_bias_G: Tensor | None
    down_DF: Weight
    down_bias_D: Tensor | None
    adapter_AD: Tensor


def layer(
    cfg: ModelConfig,
    call: LayerCall,
    w: Layer,
    kv: LayerCache,
    cos_sin_MH: Tensor,
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    plain: Any = w  # it has all fields of a plain layer
    h_TD = dense.layer(cfg, call, plain, kv, cos_sin_MH, batch, h_TD)
    adapter_T = batch.adapter_T
    if adapter_T is None:
        return h_TD
    if batch.keep_R is not None:
        adapter_T = adapter_T.index_select(0, batch.keep_R)
    return h_TD + w.adapter_AD.index_select(0, adapter_T)


def layer_params(cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
    table = Param.one("bias", f"adapters.{layer_idx}", 1 + NUM_ADAPTERS, cfg.hidden_size)
    return {**dense.layer_params(cfg, kind, layer_idx), "adapter_AD": table}


def adapted(
    hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None, num: int = NUM_ADAPTERS
) -> Model:
    cfg = dense_config(hf, architecture=NAME, dtype=dtype, max_model_len=max_model_len)
    return replace(
        dense.dense_model(cfg),
        layer=layer,
        layer_params=layer_params,
        layer_type=lambda kind: Layer,
        num_adapters=num,
    )


@contextmanager
def checkpoint(folder: Path) -> Iterator[Path]:
    """A checkpoint of the architecture, which the registry knows meanwhile."""
    config = {
        "model_type": "llama", "architectures": [NAME], "vocab_size": VOCAB_SIZE, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256,
        "tie_word_embeddings": False, "eos_token_id": 3,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    from transformers import AutoConfig

    generator = torch.Generator().manual_seed(5)
    model = adapted(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    drawn = {
        source: torch.randn(part, *param.shape[1:], generator=generator) * 0.3
        + (param.kind == "norm")
        for group in model.declared
        for param in group.values()
        for source, part in zip(param.sources, param.parts)
    }
    for name, values in drawn.items():
        if name.startswith("adapters."):
            values[0] = 0.0
            values[1:] *= 5.0
    save_file(drawn, folder / "model.safetensors")
    registry.ARCHITECTURES[NAME] = adapted
    try:
        yield folder
    finally:
        del registry.ARCHITECTURES[NAME]
