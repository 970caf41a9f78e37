"""BERT: an encoder with learned positions, token types, and norms after each half of a layer.

T tokens | R sequences | X tokens after the last layer | M positions | U token types | D hidden
N heads | H head size | E = 3·N·H | F ffn | V vocabulary | C labels
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models import dense, encoders
from nanovllm.models.config import ModelConfig, require_type
from nanovllm.models.encoders import EncoderConfig, linear_params, norm_params
from nanovllm.models.formats import Weight, linear, lookup
from nanovllm.models.model import Batch, LayerCall, LayerKind, Model
from nanovllm.models.param import Param
from nanovllm.models.pooling import Pooler, PoolInputs, no_head, no_norm

NAME = "BertModel"


class BertLayer(NamedTuple):
    """Weights of one layer."""

    qkv_ED: Weight
    qkv_bias_E: Tensor
    out_DQ: Weight
    out_bias_D: Tensor
    attn_norm_D: Tensor
    attn_norm_bias_D: Tensor
    up_FD: Weight
    up_bias_F: Tensor
    down_DF: Weight
    down_bias_D: Tensor
    mlp_norm_D: Tensor
    mlp_norm_bias_D: Tensor


class BertOuter(NamedTuple):
    """Weights outside the layers. The last four are those of a head of classes."""

    embed_VD: Weight
    position_MD: Tensor
    type_UD: Tensor
    embed_norm_D: Tensor
    embed_norm_bias_D: Tensor
    inner_DD: Weight | None = None
    inner_bias_D: Tensor | None = None
    score_CD: Weight | None = None
    score_bias_C: Tensor | None = None


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `BertConfig`."""
    require_type(hf, NAME, "bert")
    return bert_model(hf, NAME, "bert.", ("bert.pooler.dense", "classifier"), dtype, max_model_len)


def bert_model(
    hf: Any,
    name: str,
    prefix: str,
    head: tuple[str, str],
    dtype: torch.dtype,
    max_model_len: int | None,
    first_position: int = 0,
) -> Model:
    """A model of BERT's form. `head` names the two layers of a head of classes."""
    kind = getattr(hf, "position_embedding_type", None) or "absolute"
    if kind != "absolute":
        raise ValueError(f"position_embedding_type {kind!r} is not supported: only 'absolute' is")
    cfg = encoders.encoder_config(
        hf,
        architecture=name,
        dtype=dtype,
        max_model_len=max_model_len,
        activation=hf.hidden_act,
        norm_eps=hf.layer_norm_eps,
        first_position=first_position,
    )
    sizes = hf.max_position_embeddings, hf.type_vocab_size
    outer = _OuterParams(prefix, *sizes)
    return Model(
        config=cfg,
        layer_kinds=(encoders.encoder_kind(cfg, "encoder"),) * cfg.num_layers,
        embed=embed,
        layer=layer,
        head=no_head,
        outer_params=outer,
        layer_params=_LayerParams(prefix),
        layer_type=layer_type,
        read_elsewhere=_unread(prefix),
        pooler=Pooler(
            pooling="cls",
            embed=embed,
            norm=no_norm,
            head=no_head,
            outer_type=BertOuter,
            size=cfg.hidden_size,
            is_causal=False,
            has_types=hf.type_vocab_size > 1,
            prefix=prefix,
            scored=_Scored(head),
        ),
    )


def _unread(prefix: str) -> tuple[str, ...]:
    """The beginnings of names of tensors that a model without a head does not read."""
    own = ("pooler.", "embeddings.position_ids")
    return (*own, *(prefix + one for one in own), "cls.", "classifier.", "lm_head.")


# regions -----------------------------------------------------------------------------------------


def embed(cfg: EncoderConfig, params: BertOuter, inputs: PoolInputs) -> Tensor:
    """The normalised sum of the embeddings of tokens, positions and types: [T, D]."""
    token_TD = lookup(params.embed_VD, inputs.token_T, cfg.dtype)
    num_positions = params.position_MD.shape[0] - cfg.first_position
    position_MD = params.position_MD.narrow(0, cfg.first_position, num_positions)
    type_TD = params.type_UD.narrow(0, 0, 1)
    if inputs.type_T is not None:
        type_TD = torch.nn.functional.embedding(inputs.type_T, params.type_UD)
    h_TD = token_TD + type_TD + torch.nn.functional.embedding(inputs.pos_T, position_MD)
    normed: Tensor = ops.layer_norm(
        h_TD, params.embed_norm_D, params.embed_norm_bias_D, cfg.norm_eps
    )
    return normed


def layer(
    cfg: EncoderConfig,
    call: LayerCall,
    w: BertLayer,
    kv: None,
    cos_sin_MH: Tensor,
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    """One layer; with `batch.keep_R` the result is [R, D]. It keeps nothing and rotates nothing."""
    qkv = dense.heads(cfg, linear(h_TD, w.qkv_ED, w.qkv_bias_E))
    o_TQ = encoders.attend(cfg, call, batch, qkv)
    o_TQ, h_TD = dense.kept(batch, o_TQ, h_TD)
    h_TD = linear(o_TQ, w.out_DQ, w.out_bias_D, h_TD)
    h_TD = ops.layer_norm(h_TD, w.attn_norm_D, w.attn_norm_bias_D, cfg.norm_eps)
    inner_TF = encoders.activated(cfg, linear(h_TD, w.up_FD, w.up_bias_F))
    h_TD = linear(inner_TF, w.down_DF, w.down_bias_D, h_TD)
    normed: Tensor = ops.layer_norm(h_TD, w.mlp_norm_D, w.mlp_norm_bias_D, cfg.norm_eps)
    return normed


def score(cfg: EncoderConfig, params: BertOuter, x_RD: Tensor) -> Tensor:
    """Logits [R, C] of a head of classes: a layer with tanh, then one more."""
    assert params.inner_DD is not None and params.score_CD is not None
    inner_RD = torch.tanh(linear(x_RD, params.inner_DD, params.inner_bias_D))
    return linear(inner_RD, params.score_CD, params.score_bias_C)


# parameters --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _OuterParams:
    """`Model.outer_params`."""

    prefix: str
    num_positions: int
    num_types: int
    head: tuple[str, str] = ("", "")
    num_labels: int = 0

    def __call__(self, cfg: ModelConfig) -> dict[str, Param]:
        prefix, hidden = self.prefix + "embeddings.", cfg.hidden_size
        words, places, types = (
            f"{prefix}{name}_embeddings.weight" for name in ("word", "position", "token_type")
        )
        declared = {
            "embed_VD": Param.one("table", words, cfg.vocab_size, hidden),
            "position_MD": Param.one("plain", places, self.num_positions, hidden),
            "type_UD": Param.one("plain", types, self.num_types, hidden),
            **norm_params("embed_norm", prefix + "LayerNorm", hidden),
        }
        if self.num_labels:
            inner, outer = self.head
            declared |= linear_params("inner", "DD", inner, hidden, hidden)
            declared |= linear_params("score", "CD", outer, self.num_labels, hidden)
        return declared


@dataclass(frozen=True)
class _LayerParams:
    """`Model.layer_params`."""

    prefix: str

    def __call__(self, cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
        prefix, hidden = f"{self.prefix}encoder.layer.{layer_idx}.", cfg.hidden_size
        parts = tuple(f"{prefix}attention.self.{name}" for name in ("query", "key", "value"))
        sizes = (hidden,) * 3
        weights, biases = (tuple(f"{one}.{end}" for one in parts) for end in ("weight", "bias"))
        attn, output = f"{prefix}attention.output", f"{prefix}output"
        return {
            "qkv_ED": Param.stack("linear", weights, sizes, hidden),
            "qkv_bias_E": Param.stack("bias", biases, sizes),
            **linear_params("out", "DQ", f"{attn}.dense", hidden, hidden),
            **norm_params("attn_norm", f"{attn}.LayerNorm", hidden),
            **linear_params("up", "FD", f"{prefix}intermediate.dense", cfg.ffn_size, hidden),
            **linear_params("down", "DF", f"{output}.dense", hidden, cfg.ffn_size),
            **norm_params("mlp_norm", f"{output}.LayerNorm", hidden),
        }


def layer_type(kind: LayerKind) -> type[BertLayer]:
    return BertLayer


@dataclass(frozen=True)
class _Scored:
    """`Pooler.scored`."""

    head: tuple[str, str]

    def __call__(self, model: Model, num_labels: int) -> Model:
        outer: Callable[..., Any] = model.outer_params
        assert isinstance(outer, _OuterParams)
        pooler = replace(model.pooler, head=score, size=num_labels, pooling="cls")
        unread = {*model.read_elsewhere} - {"classifier.", "pooler.", outer.prefix + "pooler."}
        return replace(
            model,
            outer_params=replace(outer, head=self.head, num_labels=num_labels),
            pooler=pooler,
            read_elsewhere=tuple(sorted(unread)),
        )
