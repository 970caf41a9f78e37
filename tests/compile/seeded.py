"""Numbers for graphs' inputs: the same whatever other modules draw, and of the sizes of a model's.

Sums stay near 1 then, as a tolerance for rounding expects: one of 16 products of 8 each, which
mostly cancel, differs by more when a processor adds in another order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers of `shape`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight(seed: int, *shape: int) -> Tensor:
    """Weights of `shape`, whose last dimension is summed over: rows have a norm of about 1."""
    return normal(seed, *shape) / shape[-1] ** 0.5
