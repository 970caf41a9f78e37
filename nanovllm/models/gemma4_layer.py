"""The layers of Gemma 4: their regions and parameters.

Full layers have larger heads than layers with a window, and perhaps keys that are their values too.
Values are normalised without a weight, products of queries and keys have no factor, and a scalar
multiplies each layer's result. The last layers may read the caches of earlier ones. An MLP may have
experts beside it, and a layer an input of its own.

P numbers of a layer's own input | L layers | X = L · P | E experts. The other letters of shapes are
those of `dense`; H and K are the layer's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.kernels.reference.norm_act import gelu_mul
from nanovllm.models import dense, gemma3, moe
from nanovllm.models.config import ModelConfig
from nanovllm.models.experts import Experts, gelu
from nanovllm.models.experts.expert_parallel import ExpertParallel
from nanovllm.models.experts.stacked import Stacked
from nanovllm.models.formats import Weight, linear, lookup, own_lookup
from nanovllm.models.layer_state import PagedKV
from nanovllm.models.model import Batch, LayerCache, LayerCall, LayerKind, Param
from nanovllm.models.param import Times
from nanovllm.models.scaled import Factors

NORMS = {
    "after_attn_norm_D": "post_attention_layernorm",
    "mlp_norm_D": "pre_feedforward_layernorm",
    "after_mlp_norm_D": "post_feedforward_layernorm",
}
SPARSE_NORMS = {
    "after_dense_norm_D": "post_feedforward_layernorm_1",
    "experts_norm_D": "pre_feedforward_layernorm_2",
    "after_experts_norm_D": "post_feedforward_layernorm_2",
}
EXPERTS = moe.ExpertNames(
    router="router.proj.weight", one="experts.{expert}.{matrix}.weight", gate="gate_proj",
    up="up_proj", down="down_proj", stacked=("experts.gate_up_proj", "experts.down_proj"),
)  # fmt: skip


class PerLayer(NamedTuple):
    """Weights from which a model makes an input of P numbers for each of L layers; X = L · P."""

    per_layer_table_VX: Weight
    per_layer_proj_XD: Weight
    per_layer_norm_P: Tensor


@dataclass(frozen=True)
class Gemma4Config(gemma3.GemmaConfig):
    """`num_kv_heads` and `head_dim` are those of layers with a window, and of all ranks those of
    full layers have other names. With `keys_are_values` full layers have no projection of values.
    MLPs of layers that read the caches of others are `reader_width` times as wide. `input_size` is
    that of a layer's own input, made of tables with `input_vocab` rows; 0 without. There the tokens
    of images and sound, `media_tokens`, count as `pad_token`.
    """

    GRAPH_FIELDS: ClassVar[tuple[str, ...]] = (
        *gemma3.GemmaConfig.GRAPH_FIELDS, "input_vocab", "media_tokens", "pad_token",
    )  # fmt: skip
    MAX_HEAD: ClassVar[int] = 512

    keys_are_values: bool = False
    full_num_kv_heads: int = 1
    full_head_dim: int = 8
    reader_width: int = 1
    input_size: int = 0
    input_vocab: int = 0
    media_tokens: tuple[int, ...] = ()
    pad_token: int = 0

    @property
    def of_full(self) -> Gemma4Config:
        """The config of a model whose layers are all full."""
        return replace(self, num_kv_heads=self.full_num_kv_heads, head_dim=self.full_head_dim)


class Gemma4Layer(NamedTuple):
    """Weights of one decoder layer. `qkv_ED` has no rows for what the layer does not compute:
    values that are the keys, or both where the layer reads the cache of another."""

    attn_norm_D: Tensor
    qkv_ED: Weight
    qkv_bias_E: Tensor | None
    q_norm_H: Tensor
    k_norm_H: Tensor | None
    out_DQ: Weight
    out_bias_D: Tensor | None
    after_attn_norm_D: Tensor
    mlp_norm_D: Tensor
    gate_up_GD: Weight
    down_DF: Weight
    after_mlp_norm_D: Tensor
    scalar_1: Tensor
    # with experts
    router_norm_D: Tensor | None
    router_ED: Tensor | None
    expert_scale_E: Tensor | None
    after_dense_norm_D: Tensor | None
    experts_norm_D: Tensor | None
    after_experts_norm_D: Tensor | None
    experts: Experts | None
    # with an input of its own
    input_gate_PD: Weight | None
    input_proj_DP: Weight | None
    input_norm_D: Tensor | None


# regions -----------------------------------------------------------------------------------------


def layer_inputs(cfg: Gemma4Config, w: PerLayer, token_T: Tensor, h_TD: Tensor) -> Tensor:
    """The inputs [L, T, P] of layers: a row of each layer's table, and a part of the normalised
    product of the first hidden state."""
    table = w.per_layer_table_VX
    for media_token in cfg.media_tokens:
        token_T = torch.where(token_T == media_token, cfg.pad_token, token_T)
    if cfg.num_ranks == 1:
        own_TX = lookup(table, token_T, cfg.dtype)
    else:
        num_rows = -(-cfg.input_vocab // cfg.num_ranks)
        own_TX = ops.all_reduce(own_lookup(table, token_T, num_rows, cfg.dtype))
    made_TX, norm_P = linear(h_TD, w.per_layer_proj_XD, None), w.per_layer_norm_P
    made_TLP, own_TLP = (one.unflatten(1, (-1, norm_P.shape[0])) for one in (made_TX, own_TX))
    sum_TLP = ops.rms_norm(made_TLP, norm_P, cfg.norm_eps) + own_TLP
    return sum_TLP.transpose(0, 1).contiguous()


def layer(
    cfg: Gemma4Config,
    call: LayerCall,
    w: Gemma4Layer,
    kv: LayerCache,
    cos_sin_MH: Tensor,
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    """One decoder layer: see `dense.layer`."""
    o_TQ = attention(cfg, call, w, kv, cos_sin_MH, batch, h_TD)
    input_TP = batch.input_TP
    if input_TP is None:
        o_TQ, h_TD = dense.kept(batch, o_TQ, h_TD)
    else:
        o_TQ, h_TD, input_TP = dense.kept(batch, o_TQ, h_TD, input_TP)
    a_TD = dense.summed_linear(cfg, o_TQ, w.out_DQ, w.out_bias_D, None)
    h_TD = h_TD + ops.rms_norm(a_TD, w.after_attn_norm_D, cfg.norm_eps)
    x_TD = ops.rms_norm(h_TD, w.mlp_norm_D, cfg.norm_eps)
    inner_TF = gelu_mul(linear(x_TD, w.gate_up_GD, None))
    m_TD = dense.summed_linear(cfg, inner_TF, w.down_DF, None, None)
    if w.experts is not None:
        m_TD = with_experts(cfg, w, h_TD, m_TD)
    h_TD = h_TD + ops.rms_norm(m_TD, w.after_mlp_norm_D, cfg.norm_eps)
    if input_TP is not None:
        h_TD = with_input(cfg, w, h_TD, input_TP)
    return h_TD * w.scalar_1


def attention(
    cfg: Gemma4Config,
    call: LayerCall,
    w: Gemma4Layer,
    kv: LayerCache,
    cos_sin_MH: Tensor,
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    """The heads' results [T, Q], of the layer's own cache or of that which it reads."""
    assert isinstance(call.kind.keeps, PagedKV)
    if not call.kind.window:  # tokens of images see later ones in layers with a window alone
        batch = batch._replace(end_T=None)
    x_TD = ops.rms_norm(h_TD, w.attn_norm_D, cfg.norm_eps)
    qkv_TE = linear(x_TD, w.qkv_ED, w.qkv_bias_E)
    if call.kind.keeps.source is not None:
        q_TNH = qkv_TE.unflatten(1, (cfg.num_heads, -1))
        q_TNH = ops.rms_norm(q_TNH, w.q_norm_H, cfg.norm_eps)
        q_TNH = ops.rope(q_TNH, cos_sin_MH, batch.rope_pos_T)
        return dense.attend_stored(cfg, call, kv, batch, q_TNH, scale=1.0)
    assert w.k_norm_H is not None
    q_TNH, k_TKH, v_TKH = heads(cfg, call.kind.keeps, qkv_TE)
    q_TNH = ops.rms_norm(q_TNH, w.q_norm_H, cfg.norm_eps)
    k_TKH = ops.rms_norm(k_TKH, w.k_norm_H, cfg.norm_eps)
    q_TNH, k_TKH = dense.rotate(cos_sin_MH, batch, q_TNH, k_TKH)
    return dense.attend_rotated(cfg, call, kv, batch, (q_TNH, k_TKH, v_TKH), scale=1.0)


def heads(cfg: Gemma4Config, keeps: PagedKV, qkv_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, N, H], keys [T, K, H] and normalised values of a layer's packed projection.

    They are packed again, since one op norms, rotates and stores what comes from one tensor.
    """
    num, num_kv, size = cfg.num_heads, keeps.num_kv_heads, keeps.key_size
    parts = qkv_TE.view(qkv_TE.shape[0], -1, size)
    # the last heads are the values, or the keys where these are the values too
    v_TKH = unit_norm(parts[:, -num_kv:], cfg.norm_eps)
    packed_TE = torch.cat((parts[:, : num + num_kv], v_TKH), dim=1).flatten(1)
    q_TNH, k_TKH, v_TKH = packed_TE.view(qkv_TE.shape[0], -1, size).split(
        [num, num_kv, num_kv], dim=1
    )
    return q_TNH, k_TKH, v_TKH


def with_experts(cfg: Gemma4Config, w: Gemma4Layer, h_TD: Tensor, m_TD: Tensor) -> Tensor:
    """The MLP's result with that of the experts, which read the same h, each normalised."""
    assert cfg.moe is not None and isinstance(w.experts, Stacked | ExpertParallel)
    assert w.router_norm_D is not None and w.expert_scale_E is not None
    assert w.experts_norm_D is not None
    r_TD = ops.rms_norm(h_TD, w.router_norm_D, cfg.norm_eps)
    logits_TE = ops.linear(r_TD, w.router_ED, None)
    weight_TK, expert_TK = ops.topk_softmax(logits_TE, cfg.moe.top_k, cfg.moe.normalize)
    weight_TK = weight_TK * w.expert_scale_E[expert_TK.long()]
    x_TD = ops.rms_norm(h_TD, w.experts_norm_D, cfg.norm_eps)
    e_TD = gelu.apply(x_TD, weight_TK, expert_TK, w.experts)
    if cfg.num_ranks > 1:
        e_TD = ops.all_reduce(e_TD)
    return ops.rms_norm(m_TD, w.after_dense_norm_D, cfg.norm_eps) + ops.rms_norm(
        e_TD, w.after_experts_norm_D, cfg.norm_eps
    )


def with_input(cfg: Gemma4Config, w: Gemma4Layer, h_TD: Tensor, input_TP: Tensor) -> Tensor:
    """h + the layer's own input, gated by h, in the hidden size and normalised."""
    assert w.input_gate_PD is not None and w.input_proj_DP is not None
    gate_TP = torch.nn.functional.gelu(linear(h_TD, w.input_gate_PD, None), approximate="tanh")
    i_TD = linear(gate_TP * input_TP, w.input_proj_DP, None)
    return h_TD + ops.rms_norm(i_TD, w.input_norm_D, cfg.norm_eps)


def unit_norm(x: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm` without a weight."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


# parameters --------------------------------------------------------------------------------------


def outer_params(cfg: ModelConfig) -> dict[str, Param]:
    """Parameters outside the layers, by the fields of `Params` and `PerLayer`. What layers get is
    (√P · table + norm · part) / √2, of a product with hidden states divided by √D: all factors are
    folded into the weights."""
    assert isinstance(cfg, Gemma4Config)
    factors = Factors(embed=("hidden_size", gemma3.embed_factor(cfg)))
    declared = factors.outer_params(cfg)
    if not cfg.input_size:
        return declared
    size, hidden = cfg.input_size, cfg.hidden_size
    total, half = cfg.num_layers * size, math.sqrt(0.5)
    of_table = float(torch.tensor(math.sqrt(size), dtype=cfg.dtype)) * half
    table = Param.vocab("table", "model.embed_tokens_per_layer.weight", cfg.input_vocab, total)
    proj = Param.one("linear", "model.per_layer_model_projection.weight", total, hidden)
    norm = Param.one("norm", "model.per_layer_projection_norm.weight", size)
    return declared | {
        "per_layer_table_VX": table._replace(adapt=Times(of_table)),
        "per_layer_proj_XD": proj._replace(adapt=Times(hidden**-0.5)),
        "per_layer_norm_P": norm._replace(adapt=Times(half)),
    }


def layer_type(kind: LayerKind) -> type[Gemma4Layer]:
    return Gemma4Layer


def layer_params(cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
    """Parameters of one decoder layer, by the fields of `Gemma4Layer` and of a form of experts."""
    assert isinstance(cfg, Gemma4Config) and isinstance(kind.keeps, PagedKV)
    own, prefix = cfg if kind.window else cfg.of_full, f"model.layers.{layer_idx}."
    reads, hidden = kind.keeps.source is not None, cfg.hidden_size
    ffn_size = cfg.ffn_size * (cfg.reader_width if reads else 1)
    declared = dense.attention_params(own, layer_idx)
    declared |= dense.mlp_params(own, layer_idx, ffn_size=ffn_size)
    num_sources = 1 if reads else 2 if cfg.keys_are_values and not kind.window else 3
    for name in {"qkv_ED", "qkv_bias_E"} & set(declared):
        declared[name] = _first_sources(declared[name], num_sources)
    if reads:
        del declared["k_norm_H"]
    for name, source in {**NORMS, **(SPARSE_NORMS if kind.sparse else {})}.items():
        declared[name] = Param.one("norm", f"{prefix}{source}.weight", hidden)
    declared["scalar_1"] = Param.one("norm", prefix + "layer_scalar", 1)
    if kind.sparse:
        declared |= _sparse_params(cfg, layer_idx)
    return declared | (_input_params(cfg, prefix) if cfg.input_size else {})


def _sparse_params(cfg: Gemma4Config, layer_idx: int) -> dict[str, Param]:
    """The router, whose input is normalised and divided by √D, and the experts."""
    assert cfg.moe is not None
    prefix, num = f"model.layers.{layer_idx}.router.", cfg.moe.num_experts
    scale = Param.one("norm", prefix + "scale", cfg.hidden_size)
    return {
        "router_norm_D": scale._replace(adapt=Times(cfg.hidden_size**-0.5)),
        "router_ED": Param.one("router", prefix + "proj.weight", num, cfg.hidden_size),
        "expert_scale_E": Param.one("norm", prefix + "per_expert_scale", num),
        **moe.stacked_params(cfg, EXPERTS, layer_idx),
    }


def _input_params(cfg: Gemma4Config, prefix: str) -> dict[str, Param]:
    size, hidden = cfg.input_size, cfg.hidden_size
    norm = prefix + "post_per_layer_input_norm.weight"
    return {
        "input_gate_PD": Param.one(
            "linear", prefix + "per_layer_input_gate.weight", size, hidden
        ),
        "input_proj_DP": Param.one(
            "linear", prefix + "per_layer_projection.weight", hidden, size
        ),
        "input_norm_D": Param.one("norm", norm, hidden),
    }  # fmt: skip


def _first_sources(qkv: Param, num: int) -> Param:
    """The first sources of a packed projection's parameter: queries, keys, values."""
    parts = qkv.parts[:num]
    return qkv._replace(
        shape=(sum(parts), *qkv.shape[1:]), sources=qkv.sources[:num], parts=parts,
        units=qkv.units[:num],
    )  # fmt: skip
