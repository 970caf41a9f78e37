"""Attention within segments with a mask and grouped heads: the meaning, the CPU's kernel and the
Triton kernel against the formula, with NaN outside the segments."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import ops, reference
from nanovllm.kernels.triton import varlen_attention as segment
from nanovllm.kernels.triton.varlen_attention import VarlenTile
from nanovllm.kernels.varlen_attention import segment_attention_cpu
from tests.kernels.paged import assert_close
from tests.kernels.varlen_cases import SCALE, STARTS, inputs

MEANINGS = {
    "reference": reference.attention.segment_attention,
    "cpu": segment_attention_cpu,
    "triton": lambda *args: segment.segment_attention(*args, VarlenTile(16, 16, 4, 1)),
}
LIMITS = [(-1, 0), (6, 0), (0, 0), (-1, -1), (18, 18), (40, -1)]
QUERY_HEADS, KV_HEADS = 6, 2


def segment_inputs(starts: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, start_S = inputs(starts, 13, torch.float32, "cpu", QUERY_HEADS)
    return q, k[:, :KV_HEADS], v[:, :KV_HEADS], start_S


def exact(q: Tensor, k: Tensor, v: Tensor, starts: list[int], left: int, right: int) -> Tensor:
    """The formula, query by query, in fp64; the owned tokens alone."""
    rows = []
    for start, end in pairwise(starts):
        for token in range(start, end):
            first = start if left < 0 else max(start, token - left)
            last = end if right < 0 else min(end, token + right + 1)
            keys, values = (
                x[first:last].double().repeat_interleave(QUERY_HEADS // KV_HEADS, 1) for x in (k, v)
            )
            score_LN = (keys * q[token].double()).sum(-1) * SCALE
            rows.append((score_LN.softmax(0)[..., None] * values).sum(0))
    return torch.stack(rows)


@pytest.mark.parametrize("name", MEANINGS)
@pytest.mark.parametrize("starts", STARTS[1:], ids=str)
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_a_token_sees_the_keys_within_its_limits(
    name: str, starts: list[int], limits: tuple[int, int]
) -> None:
    q, k, v, start_S = segment_inputs(starts)
    out = MEANINGS[name](q, k, v, start_S, 99, SCALE, *limits)
    assert_close(out[starts[0] : starts[-1]], exact(q, k, v, starts, *limits))
    assert not out[starts[0] :].isnan().any()


def test_the_op_has_the_shape_of_its_queries() -> None:
    args = (*segment_inputs([0, 19]), 19, SCALE, -1, 0)
    torch.library.opcheck(ops.segment_attention, args, test_utils="test_faketensor")
