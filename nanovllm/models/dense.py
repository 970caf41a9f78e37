"""The dense decoder: Llama, Mistral, Qwen2 and Qwen3 are this mathematics under different configs.

T tokens | R rows (requests) | M positions | D hidden | N query heads | K kv heads | H head size
E = (N + 2K)·H | Q = N·H | F ffn | G = 2F | V vocabulary. Every dimension is a Python int that the
bucket fixes; `x_TD` is [T, D]. The dimensions of caches and batches are in `interface`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models import kv_scales as bounds
from nanovllm.models.config import ModelConfig
from nanovllm.models.formats import Weight, linear, lookup, own_lookup
from nanovllm.models.layer_state import PagedKV
from nanovllm.models.model import Batch, LayerCache, LayerCall, LayerKind, Model, Param


class AttentionWeights(Protocol):
    """The weights that `attention` reads; every layer type has these fields."""

    @property
    def attn_norm_D(self) -> Tensor: ...
    @property
    def qkv_ED(self) -> Weight: ...
    @property
    def qkv_bias_E(self) -> Tensor | None: ...
    @property
    def q_norm_H(self) -> Tensor | None: ...
    @property
    def k_norm_H(self) -> Tensor | None: ...
    @property
    def out_DQ(self) -> Weight: ...
    @property
    def out_bias_D(self) -> Tensor | None: ...


class MlpWeights(Protocol):
    """The weights that `mlp` reads."""

    @property
    def mlp_norm_D(self) -> Tensor: ...
    @property
    def gate_up_GD(self) -> Weight: ...
    @property
    def gate_up_bias_G(self) -> Tensor | None: ...
    @property
    def down_DF(self) -> Weight: ...
    @property
    def down_bias_D(self) -> Tensor | None: ...


class Layer(NamedTuple):
    """Weights of one decoder layer."""

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


def dense_model(
    cfg: ModelConfig, windows: tuple[int, ...] | None = None, layer_ropes: tuple[int, ...] = ()
) -> Model:
    """The model of a dense config. `windows` are the layers' `PagedKV.window`, None for all 0.

    `layer_ropes` are those of `Model`.
    """
    kinds = {
        window: LayerKind(f"window{window}", paged_kv(cfg, window)) for window in (windows or (0,))
    }
    return Model(
        config=cfg,
        layer_kinds=tuple(kinds[window] for window in windows or (0,) * cfg.num_layers),
        embed=embed,
        layer=layer,
        head=head,
        outer_params=outer_params,
        layer_params=layer_params,
        layer_type=layer_type,
        kv_scales=kv_scales,
        layer_ropes=layer_ropes,
    )


def paged_kv(cfg: ModelConfig, window: int = 0) -> PagedKV:
    """What an attention layer of a config keeps."""
    return PagedKV(cfg.num_kv_heads, cfg.head_dim, cfg.head_dim, window)


# regions -----------------------------------------------------------------------------------------


def embed(cfg: ModelConfig, embed_VD: Weight, token_T: Tensor) -> Tensor:
    """Token ids to the hidden state [T, D]."""
    if cfg.num_ranks == 1:
        return lookup(embed_VD, token_T, cfg.dtype)
    num_rows = -(-cfg.vocab_size // cfg.num_ranks)
    return ops.all_reduce(own_lookup(embed_VD, token_T, num_rows, cfg.dtype))


def layer(
    cfg: ModelConfig,
    call: LayerCall,
    w: Layer,
    kv: LayerCache,
    cos_sin_MH: Tensor,
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    """One decoder layer; writes the keys and values of T tokens into `kv`. Traced once per bucket.

    With `batch.keep_R` the result is [R, D], for the tokens at these indices alone.
    """
    return mlp(cfg, w, attention(cfg, call, w, kv, cos_sin_MH, batch, h_TD))


def attention(
    cfg: ModelConfig,
    call: LayerCall,
    w: AttentionWeights,
    kv: LayerCache,
    cos_sin_MH: Tensor,
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    """The first half of a layer: h + attention of the normalised h."""
    x_TD = ops.rms_norm(h_TD, w.attn_norm_D, cfg.norm_eps)
    q_TNH, k_TKH, v_TKH = heads(cfg, linear(x_TD, w.qkv_ED, w.qkv_bias_E))
    if w.q_norm_H is not None and w.k_norm_H is not None:
        q_TNH = ops.rms_norm(q_TNH, w.q_norm_H, cfg.norm_eps)
        k_TKH = ops.rms_norm(k_TKH, w.k_norm_H, cfg.norm_eps)
    o_TQ = attend(cfg, call, kv, cos_sin_MH, batch, (q_TNH, k_TKH, v_TKH))
    o_TQ, h_TD = kept(batch, o_TQ, h_TD)
    return summed_linear(cfg, o_TQ, w.out_DQ, w.out_bias_D, h_TD)


def heads(cfg: ModelConfig, qkv_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, N, H], keys [T, K, H] and values of the packed projection."""
    q_TNH, k_TKH, v_TKH = qkv_TE.view(qkv_TE.shape[0], -1, cfg.head_dim).split(
        [cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads], dim=1
    )
    return q_TNH, k_TKH, v_TKH


def attend(
    cfg: ModelConfig,
    call: LayerCall,
    kv: LayerCache,
    cos_sin_MH: Tensor,
    batch: Batch,
    qkv: tuple[Tensor, Tensor, Tensor],
    sinks_N: Tensor | None = None,
) -> Tensor:
    """Rotate queries and keys, store keys and values, and attend: [T, Q]. `qkv` is of `heads`."""
    rotated = (*rotate(cos_sin_MH, batch, *qkv[:2]), qkv[2])
    return attend_rotated(cfg, call, kv, batch, rotated, sinks_N=sinks_N)


def rotate(cos_sin_MH: Tensor, batch: Batch, q_TNH: Tensor, k_TKH: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys, rotated by their tokens' positions."""
    q_TNH = ops.rope(q_TNH, cos_sin_MH, batch.rope_pos_T)
    return q_TNH, ops.rope(k_TKH, cos_sin_MH, batch.rope_pos_T)


def attend_rotated(
    cfg: ModelConfig,
    call: LayerCall,
    kv: LayerCache,
    batch: Batch,
    qkv: tuple[Tensor, Tensor, Tensor],
    scale: float | None = None,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """`attend` for queries and keys that are already rotated. Their products are multiplied by
    `scale`, by default 1 / √H."""
    q_TNH, k_TKH, v_TKH = qkv
    ops.store_kv(k_TKH, v_TKH, kv.k_CBKH, kv.v_CBKH, batch.slot_T, kv.k_scale_K, kv.v_scale_K)
    return attend_stored(cfg, call, kv, batch, q_TNH, scale, sinks_N)


def attend_stored(
    cfg: ModelConfig,
    call: LayerCall,
    kv: LayerCache,
    batch: Batch,
    q_TNH: Tensor,
    scale: float | None = None,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """`attend_rotated` where keys and values are already in the cache."""
    attention = ops.ATTENTION[call.attention]
    ends: tuple[Tensor, ...] = ()
    if batch.end_T is not None:  # our own kernels alone take it
        attention, ends = ops.paged_attention, (batch.end_T,)
    o_TNH = attention(
        q_TNH, kv.k_CBKH, kv.v_CBKH, batch.block_table_RP, batch.seq_len_R, batch.q_start_S,
        call.max_q_len, scale or cfg.head_dim**-0.5, call.kind.window, kv.k_scale_K, kv.v_scale_K,
        sinks_N, *ends,
    )  # fmt: skip
    return o_TNH.flatten(1)


def kept(batch: Batch, *all_tokens: Tensor) -> tuple[Tensor, ...]:
    """The tokens for which a layer continues after attention, of each tensor.

    Tokens no longer interact, so unused ones are dropped: T is R from here on.
    """
    if batch.keep_R is None:
        return all_tokens
    return tuple(x_TD.index_select(0, batch.keep_R) for x_TD in all_tokens)


def mlp(cfg: ModelConfig, w: MlpWeights, h_TD: Tensor) -> Tensor:
    """The second half of a dense layer: h + MLP of the normalised h."""
    x_TD = ops.rms_norm(h_TD, w.mlp_norm_D, cfg.norm_eps)
    gate_up_TG = linear(x_TD, w.gate_up_GD, w.gate_up_bias_G)
    return summed_linear(cfg, ops.silu_mul(gate_up_TG), w.down_DF, w.down_bias_D, h_TD)


def summed_linear(
    cfg: ModelConfig, x_TI: Tensor, weight: Weight, bias_D: Tensor | None, h_TD: Tensor | None
) -> Tensor:
    """h + x · weightᵀ + bias, where each rank has a part of x and of the weight's columns; without
    h if it is None."""
    if cfg.num_ranks == 1:
        return linear(x_TI, weight, bias_D, h_TD)
    return ops.all_reduce(linear(x_TI, weight, bias_D), h_TD)


def head(cfg: ModelConfig, final_norm_D: Tensor, head_VD: Weight, h_RD: Tensor) -> Tensor:
    """Final norm and projection to the vocabulary, or this rank's part of it: logits [R, V] in the
    model's dtype."""
    return linear(ops.rms_norm(h_RD, final_norm_D, cfg.norm_eps), head_VD, None)


def kv_scales(cfg: ModelConfig, w: AttentionWeights) -> tuple[Tensor, Tensor]:
    """The scales of one layer's fp8 cache: [K] fp32 for keys, and for values."""
    return bounds.kv_scales(cfg, w.attn_norm_D, w.qkv_ED, w.qkv_bias_E, w.k_norm_H)


# parameters --------------------------------------------------------------------------------------


def layer_type(kind: LayerKind) -> type[Layer]:
    return Layer


def outer_params(cfg: ModelConfig) -> dict[str, Param]:
    """Parameters outside the layers, by the fields of `Params`; a tied head is not declared."""
    vocab, hidden = cfg.vocab_size, cfg.hidden_size
    declared = {
        "embed_VD": Param.vocab("table", "model.embed_tokens.weight", vocab, hidden),
        "final_norm_D": Param.one("norm", "model.norm.weight", hidden),
    }
    if not cfg.tied_embeddings:
        declared["head_VD"] = Param.vocab("linear", "lm_head.weight", vocab, hidden)
    return declared


def layer_params(cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
    """Parameters of one decoder layer, by the fields of `Layer`."""
    return {**attention_params(cfg, layer_idx), **mlp_params(cfg, layer_idx)}


def attention_params(cfg: ModelConfig, layer_idx: int) -> dict[str, Param]:
    """Parameters of a layer's first half, and the norm of its second."""
    prefix, hidden = f"model.layers.{layer_idx}.", cfg.hidden_size
    attn = prefix + "self_attn."
    qkv = tuple(attn + f"{c}_proj" for c in "qkv")
    q_size, kv_size = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    parts = (q_size, kv_size, kv_size)
    heads = (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)
    declared = {
        "attn_norm_D": Param.one("norm", prefix + "input_layernorm.weight", hidden),
        "qkv_ED": _weight(qkv, parts, hidden)._replace(units=heads),
        "out_DQ": Param.one("linear", attn + "o_proj.weight", hidden, q_size, shard_axis=1),
        "mlp_norm_D": Param.one("norm", prefix + "post_attention_layernorm.weight", hidden),
    }
    if cfg.qkv_bias:
        declared["qkv_bias_E"] = _bias(qkv, parts)._replace(units=heads)
    if cfg.out_bias:
        declared["out_bias_D"] = summed_bias(attn + "o_proj.bias", hidden)
    if cfg.qk_norm:
        declared["q_norm_H"] = Param.one("norm", attn + "q_norm.weight", cfg.head_dim)
        declared["k_norm_H"] = Param.one("norm", attn + "k_norm.weight", cfg.head_dim)
    return declared


def mlp_params(
    cfg: ModelConfig, layer_idx: int, name: str = "mlp", ffn_size: int | None = None
) -> dict[str, Param]:
    """Parameters of an MLP; without `ffn_size` it has the width of dense layers."""
    prefix, hidden = f"model.layers.{layer_idx}.{name}.", cfg.hidden_size
    ffn_size = ffn_size or cfg.ffn_size
    gate_up, parts = (prefix + "gate_proj", prefix + "up_proj"), (ffn_size, ffn_size)
    down = Param.one("linear", prefix + "down_proj.weight", hidden, ffn_size, shard_axis=1)
    declared = {"gate_up_GD": _weight(gate_up, parts, hidden), "down_DF": down}
    if cfg.mlp_bias:
        declared["gate_up_bias_G"] = _bias(gate_up, parts)
        declared["down_bias_D"] = summed_bias(prefix + "down_proj.bias", hidden)
    return declared


def _weight(names: tuple[str, ...], parts: tuple[int, ...], depth: int) -> Param:
    return Param.stack("linear", tuple(name + ".weight" for name in names), parts, depth)


def summed_bias(source: str, size: int) -> Param:
    """A bias of a product that is summed over the ranks."""
    return Param.one("bias", source, size)._replace(is_first_only=True)


def _bias(names: tuple[str, ...], parts: tuple[int, ...]) -> Param:
    return Param.stack("bias", tuple(name + ".bias" for name in names), parts)
