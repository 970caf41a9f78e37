"""ModernBERT: an encoder with rotated heads, gated MLPs, and windows in most layers.

T tokens | R sequences | X tokens after the last layer | M positions | D hidden | H head size
E = 3·N·H | F ffn | G = 2F | V vocabulary | C labels
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models import dense, encoders
from nanovllm.models.config import ModelConfig, Rope, require_type
from nanovllm.models.encoders import EncoderConfig
from nanovllm.models.formats import Weight, linear, lookup
from nanovllm.models.layer_ropes import FULL, SLIDING, layer_ropes
from nanovllm.models.model import Batch, LayerCall, LayerKind, Model
from nanovllm.models.param import Param
from nanovllm.models.pooling import Pooler, PoolInputs, no_head

NAME = "ModernBertModel"
PREFIX = "model."
FIRST = "first"  # the name of the kind of the first layer, whose input is normalised already


class ModernBertLayer(NamedTuple):
    """Weights of one layer; the first has no `attn_norm_D`."""

    attn_norm_D: Tensor | None
    qkv_ED: Weight
    out_DQ: Weight
    mlp_norm_D: Tensor
    gate_up_GD: Weight
    down_DF: Weight


class ModernBertOuter(NamedTuple):
    """Weights outside the layers. The last four are those of a head of classes."""

    embed_VD: Weight
    embed_norm_D: Tensor
    final_norm_D: Tensor
    inner_DD: Weight | None = None
    inner_norm_D: Tensor | None = None
    score_CD: Weight | None = None
    score_bias_C: Tensor | None = None


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `ModernBertConfig`. Raises ValueError for biases."""
    require_type(hf, NAME, "modernbert")
    for name in ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"):
        if getattr(hf, name):
            raise ValueError(f"{name} True is not supported by {NAME}: only False is")
    if hf.classifier_activation != hf.hidden_activation:
        raise ValueError(
            f"classifier_activation {hf.classifier_activation!r} is not supported by {NAME}: it "
            f"must be that of the layers, {hf.hidden_activation!r}"
        )
    full, sliding = (_rope(hf, layer_type) for layer_type in (FULL, SLIDING))
    cfg = encoders.encoder_config(
        hf,
        architecture=NAME,
        dtype=dtype,
        max_model_len=max_model_len,
        activation=hf.hidden_activation,
        norm_eps=hf.norm_eps,
        inv_freq=full.inv_freq,
        rope_scale=full.scale,
        other_ropes=(sliding,),
    )
    return Model(
        config=cfg,
        layer_kinds=_kinds(hf, cfg),
        embed=embed,
        layer=layer,
        head=no_head,
        outer_params=_OuterParams(),
        layer_params=layer_params,
        layer_type=layer_type,
        layer_ropes=layer_ropes(hf),
        read_elsewhere=("head.", "decoder.", "classifier."),
        pooler=Pooler(
            pooling="cls",
            embed=embed,
            norm=norm,
            head=no_head,
            outer_type=ModernBertOuter,
            size=cfg.hidden_size,
            is_causal=False,
            prefix=PREFIX,
            scored=_Scored(hf.classifier_pooling),
        ),
    )


def _rope(hf: Any, layer_type: str) -> Rope:
    """The rotary table of layers of one type. Raises ValueError for one that is scaled."""
    parameters = hf.rope_parameters[layer_type]
    if parameters["rope_type"] != "default":
        raise ValueError(f"rope_type {parameters['rope_type']!r} is not supported by {NAME}")
    size = hf.hidden_size // hf.num_attention_heads
    exponent = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    return Rope(tuple((1.0 / parameters["rope_theta"] ** exponent).tolist()))


def _kinds(hf: Any, cfg: EncoderConfig) -> tuple[LayerKind, ...]:
    """A token of a sliding layer sees local_attention // 2 tokens on each side."""
    kinds = {
        FULL: encoders.encoder_kind(cfg, "full"),
        SLIDING: encoders.encoder_kind(cfg, "sliding", hf.local_attention // 2 + 1),
    }
    found = [kinds[layer_type] for layer_type in hf.layer_types]
    first = found[0]
    return (replace(first, name=f"{FIRST}_{first.name}"), *found[1:])


# regions -----------------------------------------------------------------------------------------


def embed(cfg: EncoderConfig, params: ModernBertOuter, inputs: PoolInputs) -> Tensor:
    """The normalised embeddings of tokens: [T, D]."""
    h_TD = lookup(params.embed_VD, inputs.token_T, cfg.dtype)
    normed: Tensor = ops.layer_norm(h_TD, params.embed_norm_D, None, cfg.norm_eps)
    return normed


def layer(
    cfg: EncoderConfig,
    call: LayerCall,
    w: ModernBertLayer,
    kv: None,
    cos_sin_MH: Tensor,
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    """One layer; with `batch.keep_R` the result is [R, D]. It keeps nothing."""
    x_TD = h_TD
    if w.attn_norm_D is not None:
        x_TD = ops.layer_norm(h_TD, w.attn_norm_D, None, cfg.norm_eps)
    q_TNH, k_TNH, v_TNH = dense.heads(cfg, linear(x_TD, w.qkv_ED, None))
    q_TNH, k_TNH = dense.rotate(cos_sin_MH, batch, q_TNH, k_TNH)
    o_TQ = encoders.attend(cfg, call, batch, (q_TNH, k_TNH, v_TNH))
    o_TQ, h_TD = dense.kept(batch, o_TQ, h_TD)
    h_TD = linear(o_TQ, w.out_DQ, None, h_TD)
    x_TD = ops.layer_norm(h_TD, w.mlp_norm_D, None, cfg.norm_eps)
    gate_TF, up_TF = linear(x_TD, w.gate_up_GD, None).chunk(2, dim=-1)
    return linear(encoders.activated(cfg, gate_TF) * up_TF, w.down_DF, None, h_TD)


def norm(cfg: EncoderConfig, params: ModernBertOuter, h_XD: Tensor) -> Tensor:
    """The norm after the last layer."""
    normed: Tensor = ops.layer_norm(h_XD, params.final_norm_D, None, cfg.norm_eps)
    return normed


def score(cfg: EncoderConfig, params: ModernBertOuter, x_RD: Tensor) -> Tensor:
    """Logits [R, C] of a head of classes."""
    assert params.inner_DD is not None and params.score_CD is not None
    inner_RD = encoders.activated(cfg, linear(x_RD, params.inner_DD, None))
    inner_RD = ops.layer_norm(inner_RD, params.inner_norm_D, None, cfg.norm_eps)
    return linear(inner_RD, params.score_CD, params.score_bias_C)


# parameters --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _OuterParams:
    """`Model.outer_params`."""

    num_labels: int = 0

    def __call__(self, cfg: ModelConfig) -> dict[str, Param]:
        hidden, prefix = cfg.hidden_size, PREFIX + "embeddings."
        declared = {
            "embed_VD": Param.one(
                "table", f"{prefix}tok_embeddings.weight", cfg.vocab_size, hidden
            ),
            "embed_norm_D": Param.one("norm", f"{prefix}norm.weight", hidden),
            "final_norm_D": Param.one("norm", f"{PREFIX}final_norm.weight", hidden),
        }
        if self.num_labels:
            declared |= {
                "inner_DD": Param.one("linear", "head.dense.weight", hidden, hidden),
                "inner_norm_D": Param.one("norm", "head.norm.weight", hidden),
                **encoders.linear_params("score", "CD", "classifier", self.num_labels, hidden),
            }
        return declared


def layer_params(cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
    """Parameters of one layer, by the fields of `ModernBertLayer`."""
    prefix, hidden, ffn = f"{PREFIX}layers.{layer_idx}.", cfg.hidden_size, cfg.ffn_size
    declared = {
        "qkv_ED": Param.one("linear", f"{prefix}attn.Wqkv.weight", 3 * hidden, hidden),
        "out_DQ": Param.one("linear", f"{prefix}attn.Wo.weight", hidden, hidden),
        "mlp_norm_D": Param.one("norm", f"{prefix}mlp_norm.weight", hidden),
        "gate_up_GD": Param.one("linear", f"{prefix}mlp.Wi.weight", 2 * ffn, hidden),
        "down_DF": Param.one("linear", f"{prefix}mlp.Wo.weight", hidden, ffn),
    }
    if not kind.name.startswith(FIRST):
        declared["attn_norm_D"] = Param.one("norm", f"{prefix}attn_norm.weight", hidden)
    return declared


def layer_type(kind: LayerKind) -> type[ModernBertLayer]:
    return ModernBertLayer


@dataclass(frozen=True)
class _Scored:
    """`Pooler.scored`. pooling: that of the checkpoint's head."""

    pooling: str

    def __call__(self, model: Model, num_labels: int) -> Model:
        pooler = replace(model.pooler, head=score, size=num_labels, pooling=self.pooling)
        return replace(
            model,
            outer_params=_OuterParams(num_labels),
            pooler=pooler,
            read_elsewhere=("decoder.",),
        )
