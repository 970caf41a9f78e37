"""Gemma 4, dense (31B): full layers have larger heads than layers with a window, and perhaps keys
that are their values too.

Values are normalised without a weight, products of queries and keys have no factor, and a scalar
multiplies each layer's result. The letters of shapes are those of `dense`; H and K are the layer's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models import dense, gemma3
from nanovllm.models.config import ModelConfig, Rope, dense_config, require_type
from nanovllm.models.formats import Weight, linear
from nanovllm.models.layer_ropes import FULL, SLIDING
from nanovllm.models.layer_state import PagedKV
from nanovllm.models.model import Batch, LayerCache, LayerCall, LayerKind, Model, Param
from nanovllm.models.scaled import Factors, check_factor

NAME = "Gemma4ForCausalLM"
# Fields of other models of the family, and the values without them.
ABSENT: dict[str, tuple[object, ...]] = {
    "hidden_size_per_layer_input": (0, None),
    "num_kv_shared_layers": (0, None),
    "enable_moe_block": (False, None),
    "use_bidirectional_attention": (None, "vision"),  # "vision" is of images alone
}
ENCODERS = (  # of images and of sound: they are not read
    "model.vision_tower.", "model.embed_vision.", "model.audio_tower.", "model.embed_audio.",
)  # fmt: skip
NORMS = {
    "after_attn_norm_D": "post_attention_layernorm",
    "mlp_norm_D": "pre_feedforward_layernorm",
    "after_mlp_norm_D": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class Gemma4Config(gemma3.GemmaConfig):
    """`num_kv_heads` and `head_dim` are those of layers with a window, and of all ranks those of
    full layers have other names. With `keys_are_values` full layers have no projection of values.
    """

    MAX_HEAD: ClassVar[int] = 512

    keys_are_values: bool = False
    full_num_kv_heads: int = 1
    full_head_dim: int = 8

    @property
    def of_full(self) -> Gemma4Config:
        """The config of a model whose layers are all full."""
        return replace(self, num_kv_heads=self.full_num_kv_heads, head_dim=self.full_head_dim)


class Gemma4Layer(NamedTuple):
    """Weights of one decoder layer. Without a projection of values `qkv_ED` has no rows for it."""

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
    scalar_1: Tensor


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `Gemma4TextConfig`, also where it is a part of a `Gemma4Config`.

    Raises ValueError for settings that this engine does not support.
    """
    require_type(hf, NAME, "gemma4_text")
    _refuse(hf)
    sliding, full = (_of_type(hf, layer_type) for layer_type in (SLIDING, FULL))
    positions = hf.max_position_embeddings
    config = dense_config(
        sliding,
        architecture=NAME,
        dtype=dtype,
        max_model_len=min(max_model_len or positions, positions),
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        qk_norm=True,
    )
    config = replace(config, other_ropes=(_rope_of_full(full),))
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    own = Gemma4Config(
        **values,
        logit_cap=hf.final_logit_softcapping,
        keys_are_values=bool(hf.attention_k_eq_v),
        full_num_kv_heads=full.num_key_value_heads,
        full_head_dim=full.head_dim,
    )
    factors = Factors(embed=("hidden_size", gemma3.embed_factor(config)))
    kinds = {
        SLIDING: LayerKind("sliding", dense.paged_kv(own, hf.sliding_window)),
        FULL: LayerKind("full", dense.paged_kv(own.of_full)),
    }
    return replace(
        dense.dense_model(config, layer_ropes=tuple(int(one == FULL) for one in hf.layer_types)),
        config=own,
        layer_kinds=tuple(kinds[one] for one in hf.layer_types),
        layer=layer,
        head=gemma3.head,
        outer_params=factors.outer_params,
        layer_params=layer_params,
        layer_type=layer_type,
        kv_scales=None,
        read_elsewhere=ENCODERS,
        embed_factor=factors.of_table,
    )


def _refuse(hf: Any) -> None:
    """Raise ValueError for settings that no region computes."""
    if hf.hidden_activation != "gelu_pytorch_tanh":
        raise ValueError(
            f"hidden_activation {hf.hidden_activation!r} is not supported by {NAME}: only "
            "'gelu_pytorch_tanh' is"
        )
    for name, allowed in ABSENT.items():
        value = getattr(hf, name, None)
        if value not in allowed:
            raise ValueError(f"{name} {value!r} is not supported by {NAME}: only {allowed[0]!r} is")
    if unknown := set(hf.layer_types) - {FULL, SLIDING}:
        raise ValueError(f"layer types {sorted(unknown)} are not supported by {NAME}")
    if hf.sliding_window is None or hf.sliding_window < 1:
        raise ValueError(f"sliding_window is {hf.sliding_window}: it must be at least 1")
    if hf.final_logit_softcapping is not None:
        check_factor("final_logit_softcapping", hf.final_logit_softcapping)
    if set(hf.rope_parameters) != {FULL, SLIDING}:
        raise ValueError(
            f"rope_parameters are of {sorted(hf.rope_parameters)}: they must be of "
            f"{[FULL, SLIDING]}"
        )


def _of_type(hf: Any, layer_type: str) -> Any:
    """The config of a model whose layers are all like those of one type.

    Without a layer of the type it is that of the others. Raises ValueError if the layers of the
    type differ.
    """
    layers = [idx for idx, one in enumerate(hf.layer_types) if one == layer_type]
    flat = copy.copy(hf.per_layer_config[layers[0] if layers else 0])
    for idx in layers:
        other = hf.per_layer_config[idx]
        for name in ("head_dim", "num_key_value_heads", "intermediate_size"):
            if getattr(other, name) != getattr(flat, name):
                raise ValueError(
                    f"per_layer_config gives layer {idx} {name} {getattr(other, name)}, and layer "
                    f"{layers[0]} {getattr(flat, name)}: layers of one type must have the same"
                )
    flat.rope_parameters = dict(hf.rope_parameters[layer_type])
    return flat


def _rope_of_full(full: Any) -> Rope:
    """The rotary table of full layers: the first frequencies of a whole head, the others 0."""
    parameters, size = full.rope_parameters, full.head_dim
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in ("default", "proportional"):
        raise ValueError(
            f"rope type {rope_type!r} of {FULL} is not supported by {NAME}: use 'proportional'"
        )
    theta = parameters.get("rope_theta")
    part, factor = (parameters.get(key, 1.0) for key in ("partial_rotary_factor", "factor"))
    for key, value in (("rope_theta", theta), ("partial_rotary_factor", part), ("factor", factor)):
        check_factor(key, value)
    num = size // 2 if rope_type == "default" else int(part * size // 2)
    if num > size // 2:
        raise ValueError(f"partial_rotary_factor is {part}: it must be at most 1")
    exponent = torch.arange(0, 2 * num, 2, dtype=torch.int64).float() / size
    rotated = 1.0 / theta**exponent / (1.0 if rope_type == "default" else factor)
    return Rope((*rotated.tolist(), *[0.0] * (size // 2 - num)))


# regions -----------------------------------------------------------------------------------------


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
    x_TD = ops.rms_norm(h_TD, w.attn_norm_D, cfg.norm_eps)
    q_TNH, k_TKH, v_TKH = heads(cfg, call.kind, linear(x_TD, w.qkv_ED, w.qkv_bias_E))
    q_TNH = ops.rms_norm(q_TNH, w.q_norm_H, cfg.norm_eps)
    k_TKH = ops.rms_norm(k_TKH, w.k_norm_H, cfg.norm_eps)
    q_TNH, k_TKH = dense.rotate(cos_sin_MH, batch, q_TNH, k_TKH)
    o_TQ = dense.attend_rotated(cfg, call, kv, batch, (q_TNH, k_TKH, v_TKH), scale=1.0)
    o_TQ, h_TD = dense.kept(batch, o_TQ, h_TD)
    a_TD = dense.summed_linear(cfg, o_TQ, w.out_DQ, w.out_bias_D, None)
    h_TD = h_TD + ops.rms_norm(a_TD, w.after_attn_norm_D, cfg.norm_eps)
    x_TD = ops.rms_norm(h_TD, w.mlp_norm_D, cfg.norm_eps)
    gate_TF, up_TF = linear(x_TD, w.gate_up_GD, None).chunk(2, dim=-1)
    inner_TF = torch.nn.functional.gelu(gate_TF, approximate="tanh") * up_TF
    m_TD = dense.summed_linear(cfg, inner_TF, w.down_DF, None, None)
    return (h_TD + ops.rms_norm(m_TD, w.after_mlp_norm_D, cfg.norm_eps)) * w.scalar_1


def heads(cfg: Gemma4Config, kind: LayerKind, qkv_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, N, H], keys [T, K, H] and normalised values of a layer's packed projection.

    They are packed again, since one op norms, rotates and stores what comes from one tensor.
    """
    assert isinstance(kind.keeps, PagedKV)
    num, num_kv, size = cfg.num_heads, kind.keeps.num_kv_heads, kind.keeps.key_size
    parts = qkv_TE.view(qkv_TE.shape[0], -1, size)
    # the last heads are the values, or the keys where these are the values too
    v_TKH = unit_norm(parts[:, -num_kv:], cfg.norm_eps)
    packed_TE = torch.cat((parts[:, : num + num_kv], v_TKH), dim=1).flatten(1)
    q_TNH, k_TKH, v_TKH = packed_TE.view(qkv_TE.shape[0], -1, size).split(
        [num, num_kv, num_kv], dim=1
    )
    return q_TNH, k_TKH, v_TKH


def unit_norm(x: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm` without a weight."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


# parameters --------------------------------------------------------------------------------------


def layer_type(kind: LayerKind) -> type[Gemma4Layer]:
    return Gemma4Layer


def layer_params(cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
    """Parameters of one decoder layer, by the fields of `Gemma4Layer`."""
    assert isinstance(cfg, Gemma4Config)
    own, prefix = cfg if kind.window else cfg.of_full, f"model.layers.{layer_idx}."
    declared = dense.layer_params(own, kind, layer_idx)
    if cfg.keys_are_values and not kind.window:
        declared |= {
            name: _without_values(declared[name])
            for name in ("qkv_ED", "qkv_bias_E")
            if name in declared
        }
    for name, source in NORMS.items():
        declared[name] = Param.one("norm", f"{prefix}{source}.weight", cfg.hidden_size)
    declared["scalar_1"] = Param.one("norm", prefix + "layer_scalar", 1)
    return declared


def _without_values(qkv: Param) -> Param:
    """The first two sources, queries and keys, of a packed projection's parameter."""
    parts = qkv.parts[:2]
    return qkv._replace(
        shape=(sum(parts), *qkv.shape[1:]), sources=qkv.sources[:2], parts=parts,
        units=qkv.units[:2],
    )  # fmt: skip
