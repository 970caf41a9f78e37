"""Gemma-3 (text): norms before and after attention and MLP, GeGLU, two rotary tables.

Its norms multiply by 1 + w: the 1 is added when weights are read. So is the factor √D of the
embedding table. The letters of shapes are those of `dense`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models import dense
from nanovllm.models.config import ModelConfig, require_type, windows_by_layer_type
from nanovllm.models.formats import Weight, linear
from nanovllm.models.layer_ropes import config_with_ropes, layer_ropes
from nanovllm.models.model import Batch, LayerCache, LayerCall, LayerKind, Model, Param
from nanovllm.models.param import PlusOne, Times
from nanovllm.models.scaled import check_factor

NAME = "Gemma3ForCausalLM"


@dataclass(frozen=True)
class GemmaConfig(ModelConfig):
    """Logits are cap · tanh(logits / cap), or unchanged if `logit_cap` is None."""

    GRAPH_FIELDS: ClassVar[tuple[str, ...]] = (*ModelConfig.GRAPH_FIELDS, "logit_cap")

    logit_cap: float | None = None


class Gemma3Layer(NamedTuple):
    """Weights of one decoder layer."""

    attn_norm_D: Tensor
    qkv_ED: Weight
    qkv_bias_E: Tensor | None
    q_norm_H: Tensor
    k_norm_H: Tensor
    out_DQ: Weight
    out_bias_D: Tensor | None
    after_attn_norm_D: Tensor
    mlp_norm_D: Tensor
    gate_up_GD: Weight
    down_DF: Weight
    after_mlp_norm_D: Tensor


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `Gemma3TextConfig`.

    Layers of type "sliding_attention" have a window and their own rotary table. Raises ValueError
    for settings that this engine does not support.
    """
    require_type(hf, NAME, "gemma3_text")
    _refuse(hf)
    config = config_with_ropes(
        hf,
        architecture=NAME,
        dtype=dtype,
        max_model_len=max_model_len,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        qk_norm=True,
    )
    config = config.with_attention_scale(1 / math.sqrt(hf.query_pre_attn_scalar))
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return replace(
        dense.dense_model(config, windows_by_layer_type(hf), layer_ropes(hf)),
        config=GemmaConfig(**values, logit_cap=hf.final_logit_softcapping),
        layer=layer,
        head=head,
        outer_params=outer_params,
        layer_params=layer_params,
        layer_type=layer_type,
        embed_factor=embed_factor(config),
    )


def _refuse(hf: Any) -> None:
    """Raise ValueError for settings of this family that no region computes."""
    if hf.hidden_activation != "gelu_pytorch_tanh":
        raise ValueError(
            f"hidden_activation {hf.hidden_activation!r} is not supported by {NAME}: only "
            "'gelu_pytorch_tanh' is"
        )
    if hf.attn_logit_softcapping is not None:
        raise ValueError(
            f"attn_logit_softcapping {hf.attn_logit_softcapping} is not supported: only null is"
        )
    if hf.use_bidirectional_attention:
        raise ValueError("use_bidirectional_attention True is not supported: only False is")
    check_factor("query_pre_attn_scalar", hf.query_pre_attn_scalar)
    if hf.final_logit_softcapping is not None:
        check_factor("final_logit_softcapping", hf.final_logit_softcapping)


def embed_factor(cfg: ModelConfig) -> float:
    """√D, rounded to the model's dtype as in transformers."""
    return float(torch.tensor(math.sqrt(cfg.hidden_size), dtype=cfg.dtype))


# regions -----------------------------------------------------------------------------------------


def layer(
    cfg: ModelConfig,
    call: LayerCall,
    w: Gemma3Layer,
    kv: LayerCache,
    cos_sin_MH: Tensor,
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    """One decoder layer: see `dense.layer`."""
    x_TD = ops.rms_norm(h_TD, w.attn_norm_D, cfg.norm_eps)
    q_TNH, k_TKH, v_TKH = dense.heads(cfg, linear(x_TD, w.qkv_ED, w.qkv_bias_E))
    q_TNH = ops.rms_norm(q_TNH, w.q_norm_H, cfg.norm_eps)
    k_TKH = ops.rms_norm(k_TKH, w.k_norm_H, cfg.norm_eps)
    o_TQ = dense.attend(cfg, call, kv, cos_sin_MH, batch, (q_TNH, k_TKH, v_TKH))
    o_TQ, h_TD = dense.kept(batch, o_TQ, h_TD)
    a_TD = dense.summed_linear(cfg, o_TQ, w.out_DQ, w.out_bias_D, None)
    h_TD = h_TD + ops.rms_norm(a_TD, w.after_attn_norm_D, cfg.norm_eps)
    x_TD = ops.rms_norm(h_TD, w.mlp_norm_D, cfg.norm_eps)
    gate_TF, up_TF = linear(x_TD, w.gate_up_GD, None).chunk(2, dim=-1)
    inner_TF = torch.nn.functional.gelu(gate_TF, approximate="tanh") * up_TF
    m_TD = dense.summed_linear(cfg, inner_TF, w.down_DF, None, None)
    return h_TD + ops.rms_norm(m_TD, w.after_mlp_norm_D, cfg.norm_eps)


def head(cfg: GemmaConfig, final_norm_D: Tensor, head_VD: Weight, h_RD: Tensor) -> Tensor:
    """`dense.head`, with a soft cap on the logits if the config has one."""
    logits_RV = dense.head(cfg, final_norm_D, head_VD, h_RD)
    if cfg.logit_cap is None:
        return logits_RV
    return torch.tanh(logits_RV / cfg.logit_cap) * cfg.logit_cap


# parameters --------------------------------------------------------------------------------------


def layer_type(kind: LayerKind) -> type[Gemma3Layer]:
    return Gemma3Layer


def outer_params(cfg: ModelConfig) -> dict[str, Param]:
    """`dense.outer_params`. A tied head is the table with its factor, which the final norm
    undoes."""
    declared, factor = dense.outer_params(cfg), embed_factor(cfg)
    of_norm = PlusOne(1 / factor if cfg.tied_embeddings else 1.0)
    declared["embed_VD"] = declared["embed_VD"]._replace(adapt=Times(factor))
    declared["final_norm_D"] = declared["final_norm_D"]._replace(adapt=of_norm)
    return declared


def layer_params(cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
    """Parameters of one decoder layer, by the fields of `Gemma3Layer`."""
    prefix = f"model.layers.{layer_idx}."
    norms = {
        "after_attn_norm_D": "post_attention_layernorm",
        "mlp_norm_D": "pre_feedforward_layernorm",
        "after_mlp_norm_D": "post_feedforward_layernorm",
    }
    declared = dense.layer_params(cfg, kind, layer_idx)
    for name, source in norms.items():
        declared[name] = Param.one("norm", f"{prefix}{source}.weight", cfg.hidden_size)
    return {
        name: param._replace(adapt=PlusOne()) if param.kind == "norm" else param
        for name, param in declared.items()
    }
