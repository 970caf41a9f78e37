"""Falcon-H1: each layer has attention beside a Mamba-2 mixer, then an MLP.

Its many factors are folded into weights when they are read, but those of the mixer's gate and time
steps. MLP: silu(m·gate)·up·d is silu(m·gate)·(m·up)·(d / m), so that gate and up have one factor.

The letters of shapes are those of `dense` and `mamba2`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models import dense
from nanovllm.models import kv_scales as bounds
from nanovllm.models.config import ModelConfig, dense_config, require_type
from nanovllm.models.formats import Weight, linear
from nanovllm.models.layer_state import KVAndState
from nanovllm.models.mamba2 import Mamba2, Mamba2Config, mixed, mixer_params, of_config, with_mamba
from nanovllm.models.model import Batch, CacheAndStates, LayerCall, LayerKind, Model, Param
from nanovllm.models.param import Times
from nanovllm.models.scaled import Factors, check_factor, scaled_model

NAME = "FalconH1ForCausalLM"


class FalconH1Layer(NamedTuple):
    """Weights of one decoder layer."""

    attn_norm_D: Tensor
    qkv_ED: Weight
    qkv_bias_E: Tensor | None
    out_DQ: Weight
    out_bias_D: Tensor | None
    in_JD: Weight
    in_bias_J: Tensor | None
    conv_C1W: Tensor
    conv_bias_C: Tensor | None
    a_log_V: Tensor
    dt_bias_V: Tensor
    skip_V: Tensor
    gate_norm_P: Tensor | None
    mixed_DP: Weight
    mixed_bias_D: Tensor | None
    mlp_norm_D: Tensor
    gate_up_GD: Weight
    gate_up_bias_G: Tensor | None
    down_DF: Weight
    down_bias_D: Tensor | None


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `FalconH1Config`."""
    require_type(hf, NAME, "falcon_h1")
    factors = LayerFactors.of(hf)
    config = dense_config(
        hf,
        architecture=NAME,
        dtype=dtype,
        max_model_len=max_model_len,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        mlp_bias=hf.mlp_bias,
    )
    scale = hf.key_multiplier * config.head_dim**-0.5
    config = with_mamba(config.with_attention_scale(scale), mixer(hf))
    kind = LayerKind("attention_mamba", KVAndState(dense.paged_kv(config), mixer(hf).keeps))
    plain = replace(
        dense.dense_model(config),
        layer_kinds=(kind,) * config.num_layers,
        layer=layer,
        layer_params=factors.layer_params,
        layer_type=layer_type,
        kv_scales=kv_scales,
    )
    outer = Factors(
        embed=("embedding_multiplier", hf.embedding_multiplier),
        head=("lm_head_multiplier", hf.lm_head_multiplier),
    )
    scaled = scaled_model(plain, outer)
    return replace(scaled, outer_params=OuterParams(outer))


def mixer(hf: Any) -> Mamba2:
    """The sizes of the mixers."""
    values = hf.mamba_d_ssm
    if values is None:
        values = int(hf.mamba_expand * hf.hidden_size)
    if hf.mamba_d_head * hf.mamba_n_heads != values:
        raise ValueError(
            f"mamba_n_heads {hf.mamba_n_heads} heads of mamba_d_head {hf.mamba_d_head} are not "
            f"the mixer's {values} values"
        )
    dt_min, dt_max = hf.time_step_limit or (0.0, float("inf"))
    return Mamba2(
        num_heads=hf.mamba_n_heads,
        head_size=hf.mamba_d_head,
        num_groups=hf.mamba_n_groups,
        state_size=hf.mamba_d_state,
        num_taps=hf.mamba_d_conv,
        dt_min=dt_min,
        dt_max=dt_max,
        has_norm=hf.mamba_rms_norm,
        norm_first=hf.mamba_norm_before_gate,
        in_bias=hf.mamba_proj_bias,
        conv_bias=hf.mamba_conv_bias,
        out_bias=hf.projectors_bias,
        factors=tuple(hf.ssm_multipliers),
    )


# regions -----------------------------------------------------------------------------------------


def layer(
    cfg: Mamba2Config,
    call: LayerCall,
    w: FalconH1Layer,
    kv: CacheAndStates,
    cos_sin_MH: Tensor,
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    """One decoder layer: see `dense.layer`."""
    x_TD = ops.rms_norm(h_TD, w.attn_norm_D, cfg.norm_eps)
    y_TP = mixed(cfg, call, w, kv.states, batch, x_TD)
    qkv = dense.heads(cfg, linear(x_TD, w.qkv_ED, w.qkv_bias_E))
    o_TQ = dense.attend(cfg, call, kv.cache, cos_sin_MH, batch, qkv)
    o_TQ, y_TP, h_TD = dense.kept(batch, o_TQ, y_TP, h_TD)
    h_TD = dense.summed_linear(cfg, o_TQ, w.out_DQ, w.out_bias_D, h_TD)
    h_TD = dense.summed_linear(cfg, y_TP, w.mixed_DP, w.mixed_bias_D, h_TD)
    return dense.mlp(cfg, w, h_TD)


def kv_scales(cfg: ModelConfig, w: FalconH1Layer) -> tuple[Tensor, Tensor]:
    """The scales of one layer's fp8 cache: [K] fp32 for keys, and for values."""
    return bounds.kv_scales(cfg, w.attn_norm_D, w.qkv_ED, w.qkv_bias_E, None)


def layer_type(kind: LayerKind) -> type[FalconH1Layer]:
    return FalconH1Layer


# parameters --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OuterParams:
    """Parameters outside the layers, whose final norm has another name."""

    factors: Factors

    def __call__(self, cfg: ModelConfig) -> dict[str, Param]:
        declared = self.factors.outer_params(cfg)
        norm = declared["final_norm_D"]
        declared["final_norm_D"] = norm._replace(sources=("model.final_layernorm.weight",))
        return declared


@dataclass(frozen=True)
class LayerFactors:
    """The factors of a layer, by what they multiply. Raises ValueError for others than numbers
    above 0."""

    attention_in: float
    attention_out: float
    mixer_in: float
    mixer_out: float
    gate: float
    down: float

    @classmethod
    def of(cls, hf: Any) -> LayerFactors:
        if len(hf.mlp_multipliers) != 2:
            raise ValueError(f"mlp_multipliers are {hf.mlp_multipliers}: they must be two numbers")
        gate, down = hf.mlp_multipliers
        found = {
            "attention_in_multiplier": hf.attention_in_multiplier,
            "attention_out_multiplier": hf.attention_out_multiplier,
            "ssm_in_multiplier": hf.ssm_in_multiplier,
            "ssm_out_multiplier": hf.ssm_out_multiplier,
            "the first of mlp_multipliers": gate,
            "the second of mlp_multipliers": down,
        }
        for name, factor in {**found, "key_multiplier": hf.key_multiplier}.items():
            check_factor(name, factor)
        return cls(*found.values())

    def layer_params(self, cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
        """Parameters of one decoder layer, by the fields of `FalconH1Layer`."""
        mamba, prefix = of_config(cfg), f"model.layers.{layer_idx}."
        declared = {
            **dense.attention_params(cfg, layer_idx),
            **dense.mlp_params(cfg, layer_idx, "feed_forward"),
            **mixer_params(cfg, prefix + "mamba.", in_factor=self.mixer_in),
            "mlp_norm_D": Param.one("norm", prefix + "pre_ff_layernorm.weight", cfg.hidden_size),
            "mixed_DP": Param.one(
                "linear", prefix + "mamba.out_proj.weight", cfg.hidden_size, mamba.values,
                shard_axis=1,
            ),
        }  # fmt: skip
        if mamba.out_bias:
            bias = dense.summed_bias(prefix + "mamba.out_proj.bias", cfg.hidden_size)
            declared["mixed_bias_D"] = bias
        factors = {
            "qkv_ED": self.attention_in,
            **dict.fromkeys(("out_DQ", "out_bias_D"), self.attention_out),
            **dict.fromkeys(("mixed_DP", "mixed_bias_D"), self.mixer_out),
            **dict.fromkeys(("gate_up_GD", "gate_up_bias_G"), self.gate),
            "down_DF": self.down / self.gate,
            "down_bias_D": self.down,
        }
        for name, factor in factors.items():
            if name in declared and factor != 1:
                declared[name] = declared[name]._replace(adapt=Times(factor))
        return declared
