"""Ministral 3: a Mistral whose queries grow with their positions, by steps of the logarithm.

A query at position p is multiplied by 1 + β · log(1 + ⌊p / L⌋), where L is the length before its
context was extended. Source: transformers' Ministral 3, after Llama 4. The letters of shapes are
those of `dense`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models import dense
from nanovllm.models.config import ModelConfig, dense_config, require_type
from nanovllm.models.formats import linear
from nanovllm.models.model import Batch, LayerCache, LayerCall, Model

NAME = "Ministral3ForCausalLM"
BETA, STEP = "llama_4_scaling_beta", "original_max_position_embeddings"


@dataclass(frozen=True)
class GrowingConfig(ModelConfig):
    """Queries are multiplied by 1 + growth · log(1 + ⌊position / growth_step⌋)."""

    GRAPH_FIELDS: ClassVar[tuple[str, ...]] = (*ModelConfig.GRAPH_FIELDS, "growth", "growth_step")

    growth: float = 0.0
    growth_step: int = 1


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `Ministral3Config`.

    Where no position is beyond the first step, the layers are those of a Mistral.
    """
    require_type(hf, NAME, "ministral3")
    growth, step = _growth(hf)
    plain = copy.copy(hf)
    # transformers writes these beside the parameters of yarn, and reads neither for the frequencies
    own = (BETA, "max_position_embeddings")
    plain.rope_parameters = {
        name: value for name, value in hf.rope_parameters.items() if name not in own
    }
    config = dense_config(plain, architecture=NAME, dtype=dtype, max_model_len=max_model_len)
    text = dense.dense_model(config, (hf.sliding_window or 0,) * hf.num_hidden_layers)
    if not growth or config.max_position <= step:
        return text
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return replace(
        text, config=GrowingConfig(**values, growth=growth, growth_step=step), layer=layer
    )


def _growth(hf: Any) -> tuple[float, int]:
    """β and L. Raises ValueError for values without a meaning."""
    beta, step = (hf.rope_parameters.get(name) for name in (BETA, STEP))
    if beta is None:
        return 0.0, 1
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta < 1 << 10:
        raise ValueError(f"{BETA} is {beta!r}: it must be a number from 0 to {1 << 10}")
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        raise ValueError(f"{BETA} is {beta}, but {STEP} is {step!r}: it must be at least 1")
    return float(beta), step


def layer(
    cfg: GrowingConfig,
    call: LayerCall,
    w: dense.Layer,
    kv: LayerCache,
    cos_sin_MH: Tensor,
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    """One decoder layer: see `dense.layer`. Positions are those of tokens, since without a tower no
    step has rows of a rotary table in their place."""
    x_TD = ops.rms_norm(h_TD, w.attn_norm_D, cfg.norm_eps)
    q_TNH, k_TKH, v_TKH = dense.heads(cfg, linear(x_TD, w.qkv_ED, w.qkv_bias_E))
    q_TNH, k_TKH = dense.rotate(cos_sin_MH, batch, q_TNH, k_TKH)
    steps_T = torch.div(batch.rope_pos_T, cfg.growth_step, rounding_mode="floor")
    factor_T11 = (1.0 + cfg.growth * torch.log1p(steps_T.float()))[:, None, None]
    q_TNH = q_TNH * factor_T11.to(q_TNH.dtype)
    o_TQ = dense.attend_rotated(cfg, call, kv, batch, (q_TNH, k_TKH, v_TKH))
    o_TQ, h_TD = dense.kept(batch, o_TQ, h_TD)
    return dense.mlp(cfg, w, dense.summed_linear(cfg, o_TQ, w.out_DQ, w.out_bias_D, h_TD))
