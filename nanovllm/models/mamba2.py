"""The Mamba-2 mixer: a short convolution, the recurrence `ops.ssd`, a gate, and perhaps a norm.

T tokens | R rows | D hidden | V heads | I head size | P = V·I values | H state size | G groups of
heads with one B and C | C = P + 2·G·H channels, which are [x | B | C] | J = P + C + V inputs,
[z | x | B | C | dt] | W taps

Source: Dao and Gu 2024, https://arxiv.org/abs/2405.21060.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from nanovllm.kernels import ops
from nanovllm.models.config import ModelConfig
from nanovllm.models.formats import Weight, linear
from nanovllm.models.layer_state import Recurrent, StateTensor
from nanovllm.models.model import Batch, LayerCall, Param
from nanovllm.models.param import Times
from nanovllm.models.scaled import check_factor

NO_FACTORS = (1.0, 1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Mamba2:
    """The sizes of a mixer and what regions read of it. Raises ValueError for impossible ones.

    Time steps are between `dt_min` and `dt_max`. With `has_norm` the values are normalised in
    groups, before they are multiplied by the gate if `norm_first`. `factors` are those of the
    inputs' parts.
    """

    GRAPH_FIELDS: ClassVar[tuple[str, ...]] = (
        "head_size", "state_size", "dt_min", "dt_max", "norm_first", "factors",
    )  # fmt: skip

    num_heads: int
    head_size: int
    num_groups: int
    state_size: int
    num_taps: int
    dt_min: float = 0.0
    dt_max: float = math.inf
    has_norm: bool = True
    norm_first: bool = False
    in_bias: bool = False
    conv_bias: bool = True
    out_bias: bool = False
    factors: tuple[float, ...] = NO_FACTORS

    def __post_init__(self) -> None:
        for name in ("num_heads", "head_size", "num_groups", "state_size", "num_taps"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} of Mamba-2 is {value}: it must be at least 1")
        if self.num_heads % self.num_groups:
            raise ValueError(
                f"Mamba-2 has {self.num_heads} heads: they must be a multiple of its "
                f"{self.num_groups} groups"
            )
        if not 0 <= self.dt_min <= self.dt_max:
            raise ValueError(
                f"the limits of Mamba-2's time steps are {self.dt_min} and {self.dt_max}: they "
                "must be numbers from 0, in order"
            )
        if len(self.factors) != len(NO_FACTORS):
            raise ValueError(f"ssm_multipliers are {self.factors}: they must be five numbers")
        for factor in self.factors:
            check_factor("one of ssm_multipliers", factor)

    @property
    def values(self) -> int:
        return self.num_heads * self.head_size

    @property
    def channels(self) -> tuple[int, int, int]:
        """Numbers of channels of x, B and C."""
        of_groups = self.num_groups * self.state_size
        return self.values, of_groups, of_groups

    @property
    def keeps(self) -> Recurrent:
        """The newest inputs of the convolution, and the recurrence's state."""
        shape = (self.num_heads, self.state_size, self.head_size)
        conv = (self.num_taps, sum(self.channels))
        return Recurrent(
            (
                StateTensor("conv", conv, None, 1, self.num_groups),
                StateTensor("ssm", shape, torch.float32, 0),
            )
        )


@dataclass(frozen=True)
class Mamba2Config(ModelConfig):
    """The config of a decoder with mixers, all of the same sizes."""

    GRAPH_FIELDS: ClassVar[tuple[str, ...]] = (*ModelConfig.GRAPH_FIELDS, "mamba")

    mamba: Mamba2 | None = None


class MixerWeights(Protocol):
    """The weights that `mixed` reads."""

    @property
    def in_JD(self) -> Weight: ...
    @property
    def in_bias_J(self) -> Tensor | None: ...
    @property
    def conv_C1W(self) -> Tensor: ...
    @property
    def conv_bias_C(self) -> Tensor | None: ...
    @property
    def a_log_V(self) -> Tensor: ...
    @property
    def dt_bias_V(self) -> Tensor: ...
    @property
    def skip_V(self) -> Tensor: ...
    @property
    def gate_norm_P(self) -> Tensor | None: ...


def with_mamba(cfg: ModelConfig, mamba: Mamba2) -> Mamba2Config:
    """The config with mixers of these sizes."""
    return Mamba2Config(**vars(cfg), mamba=mamba)


# regions -----------------------------------------------------------------------------------------


def mixed(
    cfg: Mamba2Config,
    call: LayerCall,
    w: MixerWeights,
    states: tuple[Tensor, ...],
    batch: Batch,
    x_TD: Tensor,
) -> Tensor:
    """The mixer's values [T, P], before their projection. Updates the states in place."""
    (conv_XWC, state_XVHI), places, mamba = states, batch.states, cfg.mamba
    assert places is not None and mamba is not None
    num_heads = state_XVHI.shape[1]
    sizes = (num_heads * mamba.head_size, conv_XWC.shape[2], num_heads)
    z_TP, xbc_TC, dt_TV = linear(x_TD, w.in_JD, w.in_bias_J).split(sizes, dim=1)
    to = (places.to_R, places.to_T)
    xbc_TC = ops.causal_conv(
        xbc_TC, w.conv_C1W.squeeze(1), conv_XWC, batch.seq_len_R, batch.q_start_S, places.from_R,
        *to, w.conv_bias_C,
    )  # fmt: skip
    dt_TV = softplus(dt_TV.float() * mamba.factors[4] + w.dt_bias_V)
    dt_TV = dt_TV.clamp(mamba.dt_min, None if mamba.dt_max == math.inf else mamba.dt_max)
    of_tokens = (xbc_TC, dt_TV, -w.a_log_V.exp() * dt_TV)
    if call.max_q_len == 1 and places.to_R is not None:
        y_TVI = ops.ssd_step(*of_tokens, state_XVHI, places.from_R, places.is_new_R, places.to_R)
    else:
        y_TVI = ops.ssd(
            *of_tokens, state_XVHI, batch.q_start_S, places.from_R, places.is_new_R, *to
        )
    x_TVI = xbc_TC[:, : sizes[0]].reshape(y_TVI.shape).float()
    y_TP = (y_TVI + w.skip_V.unsqueeze(1) * x_TVI).flatten(1)
    num_groups = (sizes[1] - sizes[0]) // (2 * mamba.state_size)
    return gated(cfg, w.gate_norm_P, y_TP, z_TP, num_groups).to(x_TD.dtype)


def gated(
    cfg: Mamba2Config, norm_P: Tensor | None, y_TP: Tensor, z_TP: Tensor, num_groups: int
) -> Tensor:
    """y · silu(z), normalised in groups before or after if there is a norm; fp32 [T, P]."""
    assert cfg.mamba is not None
    gate_TP = silu(z_TP.float() * cfg.mamba.factors[0])
    if norm_P is None:
        return y_TP * gate_TP
    if not cfg.mamba.norm_first:
        y_TP = y_TP * gate_TP
    y_TGP = y_TP.unflatten(1, (num_groups, -1))
    y_TGP = y_TGP * torch.rsqrt(y_TGP.square().mean(2, keepdim=True) + cfg.norm_eps)
    y_TP = y_TGP.flatten(1) * norm_P.float()
    return y_TP * gate_TP if cfg.mamba.norm_first else y_TP


# parameters --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TimesParts:
    """Multiplies the rows of each source by a factor of its own."""

    factors: tuple[float, ...]

    def __call__(self, weight: Tensor, parts: Sequence[int]) -> None:
        for rows, factor in zip(weight.split(tuple(parts)), self.factors, strict=True):
            rows.mul_(factor)


def mixer_params(cfg: ModelConfig, prefix: str, *, in_factor: float = 1.0) -> dict[str, Param]:
    """Parameters of a mixer but its last product, by the fields of `MixerWeights`. The factors of
    x, B and C are folded into the convolution; `in_factor` is that of the mixer's input."""
    mamba = of_config(cfg)
    heads, groups = mamba.num_heads, mamba.num_groups
    parts = (mamba.values, *mamba.channels, heads)
    units = (heads, heads, groups, groups, heads)

    def joined(kind: Any, name: str, first: int, stop: int, *rest: int) -> Param:
        names = tuple(f"{prefix}{name}[{part}]" for part in ("z", "x", "B", "C", "dt")[first:stop])
        own, shape = parts[first:stop], (sum(parts[first:stop]), *rest)
        return Param(kind, shape, names, own, 0, prefix + name, units=units[first:stop])

    def of_heads(name: str) -> Param:
        return Param.one("bias", prefix + name, heads, shard_axis=0)._replace(dtype=torch.float32)

    weight = joined("linear", "in_proj.weight", 0, 5, cfg.hidden_size)
    conv = joined("conv", "conv1d.weight", 1, 4, 1, mamba.num_taps)
    declared = {
        "in_JD": weight if in_factor == 1 else weight._replace(adapt=Times(in_factor)),
        "conv_C1W": conv._replace(adapt=TimesParts(mamba.factors[1:4])),
        "a_log_V": of_heads("A_log"),
        "dt_bias_V": of_heads("dt_bias"),
        "skip_V": of_heads("D"),
    }
    if mamba.in_bias:
        declared["in_bias_J"] = joined("bias", "in_proj.bias", 0, 5)
    if mamba.conv_bias:
        declared["conv_bias_C"] = joined("bias", "conv1d.bias", 1, 4)
    if mamba.has_norm:
        norm = Param.one("norm", prefix + "norm.weight", mamba.values, shard_axis=0)
        declared["gate_norm_P"] = norm._replace(units=(heads,))
    return declared


def of_config(cfg: ModelConfig) -> Mamba2:
    """The mixers' sizes."""
    assert isinstance(cfg, Mamba2Config) and cfg.mamba is not None
    return cfg.mamba
