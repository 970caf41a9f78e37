"""Bases that the experts of a layer share.

E experts | O outputs | I inputs | L rank | M = L + oversampling
"""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLE = 32
NUM_ITERATIONS = 6  # of the randomised search: each multiplies by the matrix
EXACT_SHARE = 0.25  # a search for more than this share of all directions is not faster


def shared_basis(matrices_EOI: Tensor, rank: int, oversample: int = OVERSAMPLE) -> Tensor:
    """U [I, L], orthonormal, that minimises the sum over experts of |Wᵀ − U · Uᵀ · Wᵀ|²."""
    return principal(second_moment(matrices_EOI), rank, oversample)


def second_moment(matrices_EOI: Tensor) -> Tensor:
    """The sum over experts of Wᵀ · W, [I, I] in fp32."""
    num_inputs = matrices_EOI.shape[2]
    moment_II = matrices_EOI.new_zeros((num_inputs, num_inputs), dtype=torch.float32)
    for matrix_OI in matrices_EOI:
        matrix32_OI = matrix_OI.float()
        moment_II.addmm_(matrix32_OI.t(), matrix32_OI)
    return moment_II


def principal(moment_II: Tensor, rank: int, oversample: int = OVERSAMPLE) -> Tensor:
    """The `rank` principal directions of a symmetric positive matrix, as columns [I, L].

    A small share of all directions is searched for in a random space of `oversample` more
    dimensions (Halko et al. 2011, https://arxiv.org/abs/0909.4061, algorithm 4.4); otherwise all
    are computed.
    """
    num_inputs = moment_II.shape[0]
    num_searched = rank + oversample
    if num_searched >= EXACT_SHARE * num_inputs:
        return torch.linalg.eigh(moment_II)[1][:, -rank:].flip(1)
    generator = torch.Generator(moment_II.device).manual_seed(0)
    start_IM = torch.randn((num_inputs, num_searched), generator=generator, device=moment_II.device)
    q_IM = torch.linalg.qr(moment_II @ start_IM)[0]
    for _ in range(NUM_ITERATIONS):
        q_IM = torch.linalg.qr(moment_II @ q_IM)[0]
    return q_IM @ torch.linalg.eigh(q_IM.t() @ moment_II @ q_IM)[1][:, -rank:].flip(1)
