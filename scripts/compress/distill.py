"""Compresses the experts of a layer so that their results on real inputs stay close.

1. Gate and up: bases and regressions on the inputs of the experts. A basis favours the inner values
on which an expert's result depends most.
2. Down: the same on the inner values that the compressed gate and up give, against the results of
   the original expert. So it compensates for errors of step 1.

The inner values of an expert may be in any order, and a basis for down is shared by inner values of
the same number. So those of each expert are sorted by their importance for its result.

Both steps are repeated with other weights of the inputs. Least squares favour frequent inputs, but
a rare input may decide an answer. So inputs with larger errors get larger weights in the next fit,
which approximates least fourth powers of errors.

E experts | N inputs | D hidden | F expert width | L rank
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from compress.calibration import Inputs
from compress.shared_fit import fit, regress
from compress.source import LayerExperts
from torch import Tensor
from torch.nn import functional

from nanovllm.models.svd_experts import DOWN, GATE, UP

NUM_REFITS = 2  # more gain nothing


@dataclass(frozen=True)
class Settings:
    """`ridge` is the weight of errors in matrices against errors in results: it is relative to the
    mean square of inputs. `chunk` and `chunk_w2` are the inputs that are computed at a time."""

    rank: int
    ridge: float
    chunk: int
    chunk_w2: int
    oversample: int


class Compressed(NamedTuple):
    """U [I, L] by kind of matrix, and V [L, O] by kind for each expert."""

    bases: dict[str, Tensor]
    experts: list[dict[str, Tensor]]


class Expert(NamedTuple):
    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor


def distill(experts: LayerExperts, inputs: list[Inputs], settings: Settings) -> Compressed:
    """`inputs` are those of each expert: see `calibration`."""
    whole = [Expert(*(matrix.float() for matrix in expert)) for expert in zip(*experts)]
    found = _fitted(whole, inputs, settings)
    for _ in range(NUM_REFITS):
        found = _fitted(whole, _reweighed(whole, inputs, settings, found), settings)
    return found


def _fitted(whole: list[Expert], inputs: list[Inputs], settings: Settings) -> Compressed:
    found = Compressed({}, [{} for _ in inputs])
    _fit_gate_and_up(whole, inputs, settings, found)
    _fit_down(whole, inputs, settings, found)
    return found


def _reweighed(
    whole: list[Expert], inputs: list[Inputs], settings: Settings, found: Compressed
) -> list[Inputs]:
    """The inputs, each with a weight that grows with the error of its result."""
    new = []
    for expert, own, matrices in zip(whole, inputs, found.experts):
        gate_DF, up_DF, down_FD = (found.bases[kind] @ matrices[kind] for kind in (GATE, UP, DOWN))
        errors = []
        for x_ND, weight_N1 in _chunks(own, settings.chunk_w2, gate_DF.device):
            original_ND = _inner(x_ND, expert.gate_FD.t(), expert.up_FD.t()) @ expert.down_DF.t()
            lost_ND = weight_N1 * (_inner(x_ND, gate_DF, up_DF) @ down_FD - original_ND)
            errors.append(lost_ND.norm(dim=1))
        error_N = torch.cat(errors)
        mean = error_N.square().mean().sqrt().clamp(min=torch.finfo(error_N.dtype).tiny)
        new.append(Inputs(own.x_ND, own.weight_N * (error_N / mean).to(own.weight_N)))
    return new


def _fit_gate_and_up(
    whole: list[Expert], inputs: list[Inputs], settings: Settings, found: Compressed
) -> None:
    moments, gate_weights, up_weights = [], [], []
    for expert, own in zip(whole, inputs):
        moment_DD, *weights = _input_statistics(expert, own, settings.chunk)
        moments.append(_ridged(moment_DD, settings.ridge))
        gate_weights.append(weights[0])
        up_weights.append(weights[1])
    moments_EDD = torch.stack(moments)
    del moments
    kinds = ((GATE, [e.gate_FD for e in whole], gate_weights),
             (UP, [e.up_FD for e in whole], up_weights))  # fmt: skip
    for kind, matrices, weights_EF in kinds:
        targets_EDF = torch.stack([m_FD.t() for m_FD in matrices])
        weighed_EDF = targets_EDF * torch.stack(weights_EF).unsqueeze(1)
        u_DL = found.bases[kind] = fit(
            moments_EDD, weighed_EDF, settings.rank, settings.oversample
        )[0]
        for own_matrices, v_LF in zip(found.experts, regress(moments_EDD, targets_EDF, u_DL)):
            own_matrices[kind] = v_LF


def _input_statistics(expert: Expert, inputs: Inputs, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Second moment [D, D] of the inputs, and the importance [F] of gate's and of up's outputs.

    The importance of an output is the root mean square of its derivative, that of the expert's
    weighted result.
    """
    num, hidden = len(inputs.weight_N), expert.gate_FD.shape[1]
    moment_DD = expert.gate_FD.new_zeros((hidden, hidden))
    gate_F, up_F = (expert.gate_FD.new_zeros(len(expert.gate_FD)) for _ in range(2))
    for x_ND, weight_N1 in _chunks(inputs, chunk, expert.gate_FD.device):
        weighed_ND = x_ND * weight_N1
        moment_DD.addmm_(weighed_ND.t(), weighed_ND)
        gate_NF, up_NF = x_ND @ expert.gate_FD.t(), x_ND @ expert.up_FD.t()
        sigmoid_NF = torch.sigmoid(gate_NF)
        slope_NF = sigmoid_NF * (1 + gate_NF * (1 - sigmoid_NF))  # of silu
        gate_F += (weight_N1 * slope_NF * up_NF).square().sum(0)
        up_F += (weight_N1 * gate_NF * sigmoid_NF).square().sum(0)
    down_F = expert.down_DF.norm(dim=0)
    return moment_DD / num, (gate_F / num).sqrt() * down_F, (up_F / num).sqrt() * down_F


def _fit_down(
    whole: list[Expert], inputs: list[Inputs], settings: Settings, found: Compressed
) -> None:
    moments, targets = [], []
    for expert, own, matrices in zip(whole, inputs, found.experts):
        gate_DF, up_DF = (found.bases[kind] @ matrices[kind] for kind in (GATE, UP))
        moment_FF, cross_FF = _inner_moments(expert, (gate_DF, up_DF), own, settings.chunk_w2)
        more = settings.ridge * moment_FF.diagonal().mean()
        ridged_FF, cross_FF = _ridged(moment_FF, settings.ridge), cross_FF.clone()
        cross_FF.diagonal().add_(more)
        target_FD = torch.linalg.solve(ridged_FF, cross_FF @ expert.down_DF.t())
        importance_F = moment_FF.diagonal() * target_FD.square().sum(1)
        order_F = importance_F.argsort(descending=True)
        moments.append(ridged_FF[order_F][:, order_F])
        targets.append(target_FD[order_F])
        for kind in (GATE, UP):
            matrices[kind] = matrices[kind][:, order_F]
    moments_EFF, targets_EFD = torch.stack(moments), torch.stack(targets)
    del moments, targets
    found.bases[DOWN], own_down = fit(moments_EFF, targets_EFD, settings.rank, settings.oversample)
    for matrices, v_LD in zip(found.experts, own_down):
        matrices[DOWN] = v_LD


def _inner_moments(
    expert: Expert, compressed: tuple[Tensor, Tensor], inputs: Inputs, chunk: int
) -> tuple[Tensor, Tensor]:
    """Moments [F, F] of compressed inner values with themselves, and with the original ones."""
    size, num = len(expert.gate_FD), len(inputs.weight_N)
    moment_FF, cross_FF = (expert.gate_FD.new_zeros((size, size)) for _ in range(2))
    for x_ND, weight_N1 in _chunks(inputs, chunk, expert.gate_FD.device):
        original_NF = weight_N1 * _inner(x_ND, expert.gate_FD.t(), expert.up_FD.t())
        compressed_NF = weight_N1 * _inner(x_ND, *compressed)
        moment_FF.addmm_(compressed_NF.t(), compressed_NF)
        cross_FF.addmm_(compressed_NF.t(), original_NF)
    return moment_FF / num, cross_FF / num


def _inner(x_ND: Tensor, gate_DF: Tensor, up_DF: Tensor) -> Tensor:
    return functional.silu(x_ND @ gate_DF) * (x_ND @ up_DF)


def _chunks(inputs: Inputs, chunk: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """(x [n, D], weight [n, 1]) in fp32 on the device, `chunk` inputs at a time."""
    for x_ND, weight_N in zip(inputs.x_ND.split(chunk), inputs.weight_N.split(chunk)):
        yield x_ND.to(device).float(), weight_N.to(device).float().unsqueeze(1)


def _ridged(moment: Tensor, ridge: float) -> Tensor:
    more = ridge * moment.diagonal().mean()
    return moment + more * torch.eye(len(moment), device=moment.device, dtype=moment.dtype)
