"""Fits matrices of several experts, as products with a shared basis, to their results on data.

Expert e maps inputs x [I] to x · B_e. Of its inputs, only the second moment C_e = mean of xᵀ · x
matters: the mean squared error of x · U · V_e is the trace of (U V_e − B_e)ᵀ · C_e · (U V_e − B_e).
For a given basis U, the best V_e is a linear regression. The best basis has no closed form where
experts have different moments, so U and V are fitted in turns.

E experts | I inputs | O outputs | L rank
"""

from __future__ import annotations

import torch
from compress.bases import principal
from torch import Tensor

NUM_ROUNDS = 3  # of alternating fits: more reduce the error by less than a hundredth
NUM_STEPS = 5  # of the conjugate gradients that find U for given V
FLOOR = 1e-6  # of eigenvalues, as a share of the largest
JITTER = 1e-6  # of inverted matrices, as a share of the mean diagonal


def fit(
    moments_EII: Tensor, targets_EIO: Tensor, rank: int, oversample: int
) -> tuple[Tensor, list[Tensor]]:
    """The basis U [I, L], orthonormal, and V [L, O] of each expert."""
    u_IL = _start(moments_EII, targets_EIO, rank, oversample)
    for _ in range(NUM_ROUNDS):
        u_IL = _improved(moments_EII, targets_EIO, u_IL, regress(moments_EII, targets_EIO, u_IL))
    return u_IL, regress(moments_EII, targets_EIO, u_IL)


def regress(moments_EII: Tensor, targets_EIO: Tensor, u_IL: Tensor) -> list[Tensor]:
    """The best V [L, O] of each expert for a basis."""
    found = []
    for moment_II, target_IO in zip(moments_EII, targets_EIO):
        weighed_IL = moment_II @ u_IL
        factor_LL = torch.linalg.cholesky(_jittered(u_IL.t() @ weighed_IL))
        found.append(torch.cholesky_solve(weighed_IL.t() @ target_IO, factor_LL))
    return found


def error(moments_EII: Tensor, targets_EIO: Tensor, u_IL: Tensor, v_ELO: list[Tensor]) -> float:
    """The mean squared error, as a share of the mean square of the targets' outputs."""
    lost = total = 0.0
    for moment_II, target_IO, v_LO in zip(moments_EII, targets_EIO, v_ELO):
        difference_IO = u_IL @ v_LO - target_IO
        lost += (difference_IO * (moment_II @ difference_IO)).sum().item()
        total += (target_IO * (moment_II @ target_IO)).sum().item()
    return lost / total


def _start(moments_EII: Tensor, targets_EIO: Tensor, rank: int, oversample: int) -> Tensor:
    """The best basis if all experts had the mean moment C: √C⁻¹ · the directions of √C · B."""
    values_I, vectors_II = torch.linalg.eigh(moments_EII.mean(0))
    root_I = values_I.clamp(min=FLOOR * values_I[-1].item()).sqrt()
    root_II = (vectors_II * root_I) @ vectors_II.t()
    outer_II = torch.zeros_like(root_II)
    for target_IO in targets_EIO:
        outer_II.addmm_(target_IO, target_IO.t())
    directions_IL = principal(root_II @ outer_II @ root_II, rank, oversample)
    inverse_II = (vectors_II / root_I) @ vectors_II.t()
    return torch.linalg.qr(inverse_II @ directions_IL)[0]


def _improved(
    moments_EII: Tensor, targets_EIO: Tensor, u_IL: Tensor, v_ELO: list[Tensor]
) -> Tensor:
    """Some steps towards the best basis for given V, from `u_IL` on.

    The best one solves Σ_e C_e · U · V_e V_eᵀ = Σ_e C_e · B_e · V_eᵀ. With the means of C and of
    V Vᵀ the left side could be inverted, which preconditions the conjugate gradients.
    """
    squares_ELL = [v_LO @ v_LO.t() for v_LO in v_ELO]

    def product(x_IL: Tensor) -> Tensor:
        total_IL = torch.zeros_like(x_IL)
        for moment_II, square_LL in zip(moments_EII, squares_ELL):
            total_IL.addmm_(moment_II, x_IL @ square_LL)
        return total_IL

    wanted_IL = torch.zeros_like(u_IL)
    for moment_II, target_IO, v_LO in zip(moments_EII, targets_EIO, v_ELO):
        wanted_IL += moment_II @ (target_IO @ v_LO.t())
    left_II = torch.linalg.cholesky(_jittered(moments_EII.mean(0)))
    right_LL = torch.linalg.cholesky(_jittered(torch.stack(squares_ELL).mean(0)))

    def preconditioned(x_IL: Tensor) -> Tensor:
        return torch.cholesky_solve(torch.cholesky_solve(x_IL, left_II).t(), right_LL).t()

    residual_IL = wanted_IL - product(u_IL)
    direction_IL = preconditioned(residual_IL)
    size = (residual_IL * direction_IL).sum()
    for _ in range(NUM_STEPS):
        ahead_IL = product(direction_IL)
        step = size / (direction_IL * ahead_IL).sum().clamp(min=torch.finfo(size.dtype).tiny)
        u_IL = u_IL + step * direction_IL
        residual_IL = residual_IL - step * ahead_IL
        turned_IL = preconditioned(residual_IL)
        last, size = size, (residual_IL * turned_IL).sum()
        direction_IL = (
            turned_IL + size / last.clamp(min=torch.finfo(size.dtype).tiny) * direction_IL
        )
    return torch.linalg.qr(u_IL)[0]


def _jittered(matrix: Tensor) -> Tensor:
    """A symmetric matrix with a little more on its diagonal, so that it is positive definite."""
    more = JITTER * matrix.diagonal().mean().clamp(min=torch.finfo(matrix.dtype).tiny)
    return matrix + more * torch.eye(len(matrix), device=matrix.device, dtype=matrix.dtype)
