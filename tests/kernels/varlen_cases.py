"""Packed segments with NaN in all tokens of no segment, and the formula of their attention."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

SCALE = 0.3
# ends of segments: one token, odd lengths, empty ones at both ends and in the middle
STARTS = [[0, 1], [0, 19], [0, 64, 128], [0, 0, 4, 4, 23, 99, 99], [3, 40, 41]]


def inputs(
    starts: list[int],
    padding: int,
    dtype: torch.dtype,
    device: str,
    num_heads: int = 3,
    head_dim: int = 24,
) -> list[Tensor]:
    """q, k and v, NaN outside the segments, and the starts."""
    generator = torch.Generator().manual_seed(len(starts))
    qkv = torch.full((3, starts[-1] + padding, num_heads, head_dim), torch.nan)
    owned = qkv[:, starts[0] : starts[-1]]
    owned.copy_(torch.randn(owned.shape, generator=generator))
    start_S = torch.tensor(starts, dtype=torch.int32, device=device)
    # as a layer has them: three parts of one tensor
    return [*qkv.to(device, dtype).transpose(0, 1).contiguous().unbind(1), start_S]


def exact(q: Tensor, k: Tensor, v: Tensor, starts: list[int]) -> Tensor:
    """The formula, segment by segment, in fp64; the owned tokens alone."""
    q, k, v = (x.double().cpu().transpose(0, 1) for x in (q, k, v))
    rows = []
    for start, end in pairwise(starts):
        score = q[:, start:end] @ k[:, start:end].transpose(1, 2) * SCALE
        rows.append(score.softmax(-1) @ v[:, start:end])
    return torch.cat(rows, dim=1).transpose(0, 1)
