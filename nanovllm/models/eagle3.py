"""EAGLE-3 heads: one layer over the embedding of a token beside three hidden states of the model.

The three states become one (`fc`); the layer's queries, keys and values are products of the
normalised embedding beside the normalised state. Source: Li et al. 2025,
https://arxiv.org/abs/2503.01840.

J = 3·I | other letters are those of `dense` and `draft_head`
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models import dense
from nanovllm.models.config import ModelConfig, dense_config
from nanovllm.models.draft_head import (
    HEAD,
    TARGETS,
    HeadModel,
    Outer,
    beside,
    renamed,
    store_context,
    target_param,
)
from nanovllm.models.formats import Weight, linear
from nanovllm.models.model import Batch, LayerCache, LayerCall, LayerKind, Param

NUM_STATES = 3
# Two spellings of the layer's tensors, and what a checkpoint may leave to the other model.
PREFIXES = ("midlayer.", "layers.0.")
TABLE, FIRST = "embed_tokens.weight", "self_attn.q_proj"


@dataclass(frozen=True)
class Eagle3Config(ModelConfig):
    """The config of a head. `vocab_size` is that of the other model, `state_size` is I.

    With `norms_residual` the normalised state is added to the result of attention, else the state
    itself. With `norms_output` the state for the next token is the normalised output.
    """

    GRAPH_FIELDS: ClassVar[tuple[str, ...]] = (
        *ModelConfig.GRAPH_FIELDS, "norms_residual", "norms_output", "state_size",
    )  # fmt: skip

    state_size: int = 0
    num_drafted: int = 0  # X
    norms_residual: bool = False
    norms_output: bool = False
    norms_all: bool = False  # one norm over the three states beside each other, before `fc`
    norms_each: bool = False  # a norm of each of them


class Extra(NamedTuple):
    """Weights beside the layer. `target_X` are the model's ids of the tokens that are drafted."""

    fc_DJ: Weight
    all_norm_J: Tensor | None
    each_norm_J: Tensor | None
    target_X: Tensor | None


class Layer(NamedTuple):
    """Weights of the layer: qkv has the inputs [embedding | state]."""

    norms_J: Tensor  # of the embedding, and of the state
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


def model(
    hf: Any,
    names: Container[str],
    *,
    num_layers: int,
    dtype: torch.dtype,
    max_model_len: int | None,
) -> HeadModel:
    """The head of a config (`startup.head_config`) for a model of `num_layers`.

    `names` are the checkpoint's tensors: which of the spellings it has, and whether it has a table,
    a head and a map of its own. Raises ValueError for a config that no region computes.
    """
    if hf.num_hidden_layers != 1:
        raise ValueError(
            f"num_hidden_layers of an EAGLE-3 head is {hf.num_hidden_layers}: only 1 is supported"
        )
    prefix = next((one for one in PREFIXES if f"{one}{FIRST}.weight" in names), PREFIXES[0])
    has_bias = bool(getattr(hf, "attention_bias", False))
    plain = dense_config(
        hf,
        architecture="Eagle3",
        dtype=dtype,
        max_model_len=max_model_len,
        qkv_bias=has_bias,
        out_bias=has_bias,
        mlp_bias=bool(getattr(hf, "mlp_bias", False)),
        qk_norm=f"{prefix}self_attn.q_norm.weight" in names,
    )
    values = {field.name: getattr(plain, field.name) for field in fields(plain)}
    config = Eagle3Config(
        **{**values, "tied_embeddings": False},
        state_size=hf.state_size,
        num_drafted=hf.draft_vocab_size,
        norms_residual=hf.norm_before_residual,
        norms_output=hf.norm_output,
        norms_all=hf.norm_before_fc,
        norms_each=hf.fc_norm,
    )
    maps = TARGETS in names or config.num_drafted < config.vocab_size
    has_head = HEAD in names or config.num_drafted < config.vocab_size
    if plain.tied_embeddings and TABLE in names and not has_head:
        raise ValueError("tie_word_embeddings True is not supported for an EAGLE-3 head")
    has_table = TABLE in names or config.hidden_size != config.state_size
    lent = ("embed_VD",) * (not has_table) + ("head_VD",) * (not has_head)
    return HeadModel(
        config=config,
        layer_kinds=(LayerKind("eagle3", dense.paged_kv(config)),),
        embed=dense.embed,
        layer=layer,
        head=dense.head,
        enter=enter,
        again=again,
        store=store,
        reads=read_layers(hf.read_layers, num_layers),
        outer_params=partial(outer_params, lent, maps),
        layer_params=partial(layer_params, prefix),
        layer_type=layer_type,
        extra_type=Extra,
        lent=lent,
        read_elsewhere=("t2d",),
    )


def read_layers(asked: tuple[int, ...] | None, num_layers: int) -> tuple[int, ...]:
    """The layers after which the states are read: by default those before layers 2, L / 2 and
    L − 3, or what is left of them in a small model."""
    if asked is not None:
        return asked
    before = (2, num_layers // 2, num_layers - 3)
    return tuple(min(max(one - 1, 0), num_layers - 1) for one in before)


# regions -----------------------------------------------------------------------------------------


def enter(cfg: Eagle3Config, w: Outer, token_T: Tensor, states_TJ: Tensor) -> Tensor:
    """The layer's input [T, 2D]: embeddings beside what `fc` makes of the three states."""
    extra: Extra = w.extra
    if extra.all_norm_J is not None:
        states_TJ = ops.rms_norm(states_TJ, extra.all_norm_J, cfg.norm_eps)
    if extra.each_norm_J is not None:
        norms_3I = extra.each_norm_J.unflatten(0, (NUM_STATES, -1))
        states_TJ = ops.rms_norm_each(states_TJ, norms_3I, cfg.norm_eps)
    return beside(dense.embed(cfg, w.embed_VD, token_T), linear(states_TJ, extra.fc_DJ, None))


def again(cfg: Eagle3Config, w: Outer, token_R: Tensor, h_RD: Tensor) -> Tensor:
    """The layer's input [R, 2D] from its own output."""
    if cfg.norms_output:
        h_RD = ops.rms_norm(h_RD, w.final_norm_D, cfg.norm_eps)
    return beside(dense.embed(cfg, w.embed_VD, token_R), h_RD)


def layer(
    cfg: Eagle3Config,
    call: LayerCall,
    w: Layer,
    kv: LayerCache,
    cos_sin_MH: Tensor,
    batch: Batch,
    x_TJ: Tensor,
) -> Tensor:
    """The layer: [T, D], see `dense.layer`."""
    both_TJ = _normed(cfg, w, x_TJ)
    residual_TD = (both_TJ if cfg.norms_residual else x_TJ).chunk(2, dim=-1)[1]
    q_TNH, k_TKH, v_TKH = dense.heads(cfg, linear(both_TJ, w.qkv_ED, w.qkv_bias_E))
    if w.q_norm_H is not None and w.k_norm_H is not None:
        q_TNH = ops.rms_norm(q_TNH, w.q_norm_H, cfg.norm_eps)
        k_TKH = ops.rms_norm(k_TKH, w.k_norm_H, cfg.norm_eps)
    o_TQ = dense.attend(cfg, call, kv, cos_sin_MH, batch, (q_TNH, k_TKH, v_TKH))
    o_TQ, h_TD = dense.kept(batch, o_TQ, residual_TD)
    h_TD = dense.summed_linear(cfg, o_TQ, w.out_DQ, w.out_bias_D, h_TD)
    return dense.mlp(cfg, w, h_TD)


def store(
    cfg: Eagle3Config,
    w: Layer,
    kv: LayerCache,
    cos_sin_MH: Tensor,
    place: tuple[Tensor, Tensor],
    x_TJ: Tensor,
) -> tuple[()]:
    """See `HeadModel`."""
    return store_context(cfg, w, kv, cos_sin_MH, place, _normed(cfg, w, x_TJ))


def _normed(cfg: Eagle3Config, w: Layer, x_TJ: Tensor) -> Tensor:
    """The input [T, 2D] with each half normalised."""
    normed_TJ: Tensor = ops.rms_norm_each(x_TJ, w.norms_J.unflatten(0, (2, -1)), cfg.norm_eps)
    return normed_TJ


# parameters --------------------------------------------------------------------------------------


def layer_type(kind: LayerKind) -> type[Layer]:
    return Layer


def outer_params(lent: tuple[str, ...], maps: bool, cfg: ModelConfig) -> dict[str, Param]:
    """Parameters beside the layer, by the fields of `Params` and of `Extra`. A head that `maps` has
    numbers of its own for tokens."""
    assert isinstance(cfg, Eagle3Config)
    hidden, num, states = cfg.hidden_size, cfg.num_drafted, NUM_STATES * cfg.state_size
    declared = {
        "embed_VD": Param.vocab("table", TABLE, cfg.vocab_size, hidden),
        "head_VD": Param.vocab("linear", HEAD, num, hidden),
        "final_norm_D": Param.one("norm", "norm.weight", hidden),
        "fc_DJ": Param.one("linear", "fc.weight", hidden, states),
    }
    if cfg.norms_all:
        declared["all_norm_J"] = Param.one("norm", "input_norm.weight", states)
    if cfg.norms_each:
        each = tuple(f"fc_norm.{i}.weight" for i in range(NUM_STATES))
        declared["each_norm_J"] = _norms(each, cfg.state_size)
    if maps:
        declared["target_X"] = target_param(cfg, num)
    return {name: param for name, param in declared.items() if name not in lent}


def _norms(names: tuple[str, ...], size: int) -> Param:
    """Weights of norms beside each other, which every rank has."""
    return Param.stack("norm", names, (size,) * len(names))._replace(shard_axis=None)


def layer_params(
    prefix: str, cfg: ModelConfig, kind: LayerKind, layer_idx: int
) -> dict[str, Param]:
    """Parameters of the layer, whose tensors begin with `prefix`, by the fields of `Layer`."""
    hidden = cfg.hidden_size
    declared = dense.layer_params(cfg, kind, layer_idx)
    qkv = declared["qkv_ED"]
    declared["qkv_ED"] = qkv._replace(shape=(qkv.shape[0], 2 * hidden))
    (own,) = declared.pop("attn_norm_D").sources
    names = own, "model.layers.0.hidden_norm.weight"
    declared["norms_J"] = _norms(names, hidden)
    return {name: renamed(param, "model.layers.0.", prefix) for name, param in declared.items()}
