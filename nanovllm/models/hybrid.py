"""The hybrid decoder: most layers are a gated delta rule, the others attention with output gates.

A layer of the delta rule keeps a state of each row (`kernels/reference/gated_delta.py`). The second
half of a layer is a dense MLP or experts. All norms but the one after the delta rule multiply by
1 + w: the 1 is added when weights are read.

T tokens | R rows | D hidden | N query heads | K kv heads | H head size | Q = N·H | G key heads and
V value heads of the delta rule | P its values | C its channels, [q | k | v] | W taps.
Other letters are those of `dense` and `moe`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models import dense, moe
from nanovllm.models import kv_scales as bounds
from nanovllm.models.config import ModelConfig
from nanovllm.models.experts import Experts
from nanovllm.models.formats import Weight, linear
from nanovllm.models.layer_state import LayerState, Recurrent, StateTensor
from nanovllm.models.model import (
    Batch,
    CacheAndStates,
    Kept,
    LayerCache,
    LayerCall,
    LayerKind,
    Model,
    Param,
)
from nanovllm.models.param import Adapt, PlusOne, RowOrder
from nanovllm.models.rope import grouped_rows

FULL, LINEAR = "full_attention", "linear_attention"


@dataclass(frozen=True)
class DeltaRule:
    """The sizes of a layer with the gated delta rule. Raises ValueError for impossible ones."""

    num_key_heads: int
    num_value_heads: int
    key_size: int
    value_size: int
    num_taps: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise ValueError(
                    f"{field.name} of the delta rule is {value}: it must be at least 1"
                )
        if self.num_value_heads % self.num_key_heads:
            raise ValueError(
                f"linear_num_value_heads {self.num_value_heads} is not a multiple of "
                f"linear_num_key_heads {self.num_key_heads}"
            )

    @property
    def values(self) -> int:
        return self.num_value_heads * self.value_size

    @property
    def channels(self) -> tuple[int, int, int]:
        """Numbers of channels of queries, keys and values."""
        keys = self.num_key_heads * self.key_size
        return keys, keys, self.values

    @property
    def units(self) -> tuple[int, int, int]:
        return self.num_key_heads, self.num_key_heads, self.num_value_heads

    @property
    def keeps(self) -> Recurrent:
        """The newest inputs of the convolution, and the rule's state."""
        shape = (self.num_value_heads, self.key_size, self.value_size)
        return Recurrent(
            (
                StateTensor(
                    "conv", (self.num_taps, sum(self.channels)), None, 1, self.num_key_heads
                ),
                StateTensor("delta", shape, torch.float32, 0),
            )
        )


@dataclass(frozen=True)
class HybridConfig(ModelConfig):
    """The config of a decoder with layers of the delta rule: all have the same sizes."""

    delta: DeltaRule | None = None


class AttentionLayer(NamedTuple):
    """Weights of a layer with attention; gate_qkv has the rows of `GatedRows`."""

    attn_norm_D: Tensor
    gate_qkv_ED: Weight
    gate_qkv_bias_E: Tensor | None
    q_norm_H: Tensor
    k_norm_H: Tensor
    out_DQ: Weight
    out_bias_D: Tensor | None
    mlp_norm_D: Tensor
    gate_up_GD: Any
    gate_up_bias_G: Tensor | None
    down_DF: Any
    down_bias_D: Tensor | None
    router_ED: Any
    router_bias_E: Tensor | None
    experts: Experts
    shared_gate_1D: Tensor | None


class DeltaLayer(NamedTuple):
    """Weights of a layer with the delta rule.

    Its inputs are two products: the channels [q | k | v], and [z | b | a], where z may be the end
    of the first one instead.
    """

    attn_norm_D: Tensor
    channels_ED: Weight
    gates_JD: Weight
    conv_C1W: Tensor
    a_log_V: Tensor
    dt_bias_V: Tensor
    norm_I: Tensor
    out_DP: Weight
    mlp_norm_D: Tensor
    gate_up_GD: Any
    gate_up_bias_G: Tensor | None
    down_DF: Any
    down_bias_D: Tensor | None
    router_ED: Any
    router_bias_E: Tensor | None
    experts: Experts
    shared_gate_1D: Tensor | None


# (sizes, hidden size, prefix of the layer's tensors) -> `channels_ED` and `gates_JD`
Inputs = Callable[[DeltaRule, int, str], dict[str, Param]]


@dataclass(frozen=True)
class HybridNames:
    """How a checkpoint names a layer's parameters: the inputs of the delta rule, and experts."""

    inputs: Inputs
    experts: moe.ExpertNames = moe.QWEN_NAMES

    def layer_params(self, cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
        """Parameters of one layer, by the fields of `layer_type(kind)`."""
        if isinstance(kind.keeps, Recurrent):
            first = delta_params(cfg, self.inputs, layer_idx)
        else:
            first = attention_params(cfg, layer_idx)
        if kind.sparse:
            return {**first, **moe.sparse_mlp_params(cfg, self.experts, layer_idx)}
        return {**first, **dense.mlp_params(cfg, layer_idx)}


def hybrid_model(
    cfg: ModelConfig,
    delta: DeltaRule,
    names: HybridNames,
    layer_types: Sequence[str],
    is_sparse: Sequence[bool],
) -> Model:
    """The model of a config; `layer_types` and `is_sparse` have an entry for each layer."""
    if unknown := set(layer_types) - {FULL, LINEAR}:
        raise ValueError(
            f"layer types {sorted(unknown)} are not supported: only {FULL} and {LINEAR} are"
        )
    values = {field.name: getattr(cfg, field.name) for field in fields(cfg)}
    keeps: dict[str, LayerState] = {FULL: dense.paged_kv(cfg), LINEAR: delta.keeps}
    kinds = tuple(
        LayerKind(f"{layer_type}_{'sparse' if sparse else 'dense'}", keeps[layer_type], sparse)
        for layer_type, sparse in zip(layer_types, is_sparse, strict=True)
    )
    return Model(
        config=HybridConfig(**values, delta=delta),
        layer_kinds=kinds,
        embed=dense.embed,
        layer=layer,
        head=dense.head,
        outer_params=outer_params,
        layer_params=names.layer_params,
        layer_type=layer_type,
        kv_scales=kv_scales,
        read_elsewhere=("mtp.",),  # layers that propose tokens
    )


# regions -----------------------------------------------------------------------------------------


def layer(
    cfg: ModelConfig,
    call: LayerCall,
    w: AttentionLayer | DeltaLayer,
    kv: Kept,
    cos_sin_MH: Tensor,
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    """One decoder layer: see `dense.layer`."""
    if isinstance(w, AttentionLayer):
        assert isinstance(kv, LayerCache)
        h_TD = attention(cfg, call, w, kv, cos_sin_MH, batch, h_TD)
    else:
        assert not isinstance(kv, LayerCache | CacheAndStates)
        h_TD = delta_rule(cfg, call, w, kv, batch, h_TD)
    if w.router_ED is None:
        return dense.mlp(cfg, w, h_TD)
    return moe.sparse_mlp(cfg, w, kv, batch, h_TD)


def attention(
    cfg: ModelConfig,
    call: LayerCall,
    w: AttentionLayer,
    kv: LayerCache,
    cos_sin_MH: Tensor,
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    """h + attention of the normalised h, times the sigmoid of its gate."""
    x_TD = ops.rms_norm(h_TD, w.attn_norm_D, cfg.norm_eps)
    gate_qkv_TE = linear(x_TD, w.gate_qkv_ED, w.gate_qkv_bias_E)
    q_TNH, k_TKH, v_TKH = dense.heads(cfg, gate_qkv_TE[:, -cfg.qkv_size :])
    q_TNH = ops.rms_norm(q_TNH, w.q_norm_H, cfg.norm_eps)
    k_TKH = ops.rms_norm(k_TKH, w.k_norm_H, cfg.norm_eps)
    o_TQ = dense.attend(cfg, call, kv, cos_sin_MH, batch, (q_TNH, k_TKH, v_TKH))
    o_TQ = o_TQ * torch.sigmoid(gate_qkv_TE[:, : -cfg.qkv_size])
    o_TQ, h_TD = dense.kept(batch, o_TQ, h_TD)
    return dense.summed_linear(cfg, o_TQ, w.out_DQ, w.out_bias_D, h_TD)


def delta_rule(
    cfg: ModelConfig,
    call: LayerCall,
    w: DeltaLayer,
    states: tuple[Tensor, ...],
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    """h + the gated delta rule of the normalised h. Updates the states in place."""
    (conv_XWC, state_XVHI), places = states, batch.states
    assert places is not None
    num_channels, num_gates = conv_XWC.shape[2], 2 * state_XVHI.shape[1]
    x_TD = ops.rms_norm(h_TD, w.attn_norm_D, cfg.norm_eps)
    channels_TE, gates_TJ = linear(x_TD, w.channels_ED, None), linear(x_TD, w.gates_JD, None)
    z_TP, ba_TJ = gates_TJ[:, :-num_gates], gates_TJ[:, -num_gates:]
    if not z_TP.shape[1]:
        z_TP = channels_TE[:, num_channels:]
    qkv_TC, conv_CW = channels_TE[:, :num_channels], w.conv_C1W.squeeze(1)
    if call.max_q_len == 1 and places.to_R is not None:
        o_TP = ops.gated_delta_step(
            qkv_TC, z_TP, ba_TJ, conv_CW, w.a_log_V, w.dt_bias_V, w.norm_I, cfg.norm_eps,
            conv_XWC, state_XVHI, batch.seq_len_R, places.from_R, places.is_new_R, places.to_R,
        )  # fmt: skip
        o_TP, h_TD = dense.kept(batch, o_TP, h_TD)
        return dense.summed_linear(cfg, o_TP, w.out_DP, None, h_TD)
    to = (places.to_R, places.to_T)
    mixed_TC = ops.causal_conv(
        qkv_TC, conv_CW, conv_XWC, batch.seq_len_R, batch.q_start_S, places.from_R, *to
    )
    o_TVI = ops.gated_delta(
        mixed_TC, ba_TJ, w.a_log_V, w.dt_bias_V, state_XVHI, batch.q_start_S, places.from_R,
        places.is_new_R, *to,
    )  # fmt: skip
    gate_TP = torch.nn.functional.silu(z_TP.float())
    o_TP = ops.rms_norm(o_TVI, w.norm_I, cfg.norm_eps).flatten(1) * gate_TP
    o_TP, h_TD = dense.kept(batch, o_TP.to(h_TD.dtype), h_TD)
    return dense.summed_linear(cfg, o_TP, w.out_DP, None, h_TD)


def kv_scales(cfg: ModelConfig, w: AttentionLayer) -> tuple[Tensor, Tensor]:
    """The scales of one layer's fp8 cache: [K] fp32 for keys, and for values."""
    return bounds.kv_scales(cfg, w.attn_norm_D, w.gate_qkv_ED, w.gate_qkv_bias_E, w.k_norm_H)


# parameters --------------------------------------------------------------------------------------


def layer_type(kind: LayerKind) -> type[AttentionLayer] | type[DeltaLayer]:
    return DeltaLayer if isinstance(kind.keeps, Recurrent) else AttentionLayer


@dataclass(frozen=True)
class GatedRows(RowOrder):
    """Rows [q and gate of each query head | k | v] in the order [gate | q | k | v], with queries
    and keys in the order of `rope.grouped_rows`. No row goes to another source, since sources may
    differ in format."""

    head_dim: int
    rotated: int

    def order(self, parts: tuple[int, ...]) -> Tensor:
        qg, k, v = torch.arange(sum(parts)).split(parts)
        in_head = list(grouped_rows(self.head_dim, self.rotated))
        q_NH, gate_NH = qg.view(-1, 2, self.head_dim).unbind(1)
        k_KH = k.view(-1, self.head_dim)
        q, k = q_NH[:, in_head].flatten(), k_KH[:, in_head].flatten()
        return torch.cat((gate_NH.flatten(), q, k, v))


@dataclass(frozen=True)
class HeadNorm:
    """The 1 of 1 + w, and the order of `rope.grouped_rows`."""

    rotated: int

    def __call__(self, weight_H: Tensor, parts: Sequence[int]) -> None:
        PlusOne()(weight_H, parts)
        weight_H.copy_(weight_H[list(grouped_rows(len(weight_H), self.rotated))])


def outer_params(cfg: ModelConfig) -> dict[str, Param]:
    """`dense.outer_params`."""
    declared = dense.outer_params(cfg)
    declared["final_norm_D"] = declared["final_norm_D"]._replace(adapt=PlusOne())
    return declared


def attention_params(cfg: ModelConfig, layer_idx: int) -> dict[str, Param]:
    """Parameters of the first half of a layer with attention, and the norm of its second."""
    declared, rotated = dense.attention_params(cfg, layer_idx), 2 * len(cfg.inv_freq)
    rows, plus_one, head_norm = GatedRows(cfg.head_dim, rotated), PlusOne(), HeadNorm(rotated)
    for old, new in (("qkv_ED", "gate_qkv_ED"), ("qkv_bias_E", "gate_qkv_bias_E")):
        if (param := declared.pop(old, None)) is not None:
            parts = (2 * param.parts[0], *param.parts[1:])
            shape = (sum(parts), *param.shape[1:])
            declared[new] = param._replace(shape=shape, parts=parts, adapt=rows)
    adapts: dict[str, Adapt] = {"attn_norm_D": plus_one, "mlp_norm_D": plus_one}
    adapts |= {"q_norm_H": head_norm, "k_norm_H": head_norm}
    for name, adapt in adapts.items():
        declared[name] = declared[name]._replace(adapt=adapt)
    return declared


def delta_params(cfg: ModelConfig, inputs: Inputs, layer_idx: int) -> dict[str, Param]:
    """Parameters of the first half of a layer with the delta rule, and the norm of its second."""
    assert isinstance(cfg, HybridConfig) and cfg.delta is not None
    delta, hidden, prefix = cfg.delta, cfg.hidden_size, f"model.layers.{layer_idx}."
    rule = prefix + "linear_attn."
    conv = rule + "conv1d.weight"
    shape = (sum(delta.channels), 1, delta.num_taps)

    def norm(name: str) -> Param:
        return Param.one("norm", prefix + name, hidden)._replace(adapt=PlusOne())

    def of_heads(name: str) -> Param:
        heads = delta.num_value_heads
        one = Param.one("bias", rule + name, heads, shard_axis=0)
        return one._replace(dtype=torch.float32)

    return {
        "attn_norm_D": norm("input_layernorm.weight"),
        **inputs(delta, hidden, rule),
        "conv_C1W": Param(
            "conv", shape, three(conv), delta.channels, 0, conv, units=delta.units
        ),
        "a_log_V": of_heads("A_log"),
        "dt_bias_V": of_heads("dt_bias"),
        "norm_I": Param.one("norm", rule + "norm.weight", delta.value_size),
        "out_DP": Param.one("linear", rule + "out_proj.weight", hidden, delta.values, shard_axis=1),
        "mlp_norm_D": norm("post_attention_layernorm.weight"),
    }  # fmt: skip


def three(name: str) -> tuple[str, str, str]:
    """Names for the channels of queries, keys and values of a tensor that has all of them."""
    return f"{name}[q]", f"{name}[k]", f"{name}[v]"
