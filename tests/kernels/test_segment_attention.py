"""Attention within segments: every kernel against the formula, with NaN outside the segments."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import ops, reference
from nanovllm.kernels.segments import segment_attention_cpu, segment_attention_cuda
from tests.kernels.paged import assert_close

NUM_HEADS, HEAD_DIM, SCALE = 3, 24, 0.3
# ends of segments: one token, odd lengths, empty ones at both ends and in the middle
STARTS = [[0, 1], [0, 19], [0, 64, 128], [0, 0, 4, 4, 23, 99, 99], [3, 40, 41]]
MEANINGS = {"reference": reference.segment_attention, "cpu": segment_attention_cpu}


def inputs(starts: list[int], padding: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k and v, NaN outside the segments, and the starts."""
    generator = torch.Generator().manual_seed(len(starts))
    qkv = torch.full((3, starts[-1] + padding, NUM_HEADS, HEAD_DIM), torch.nan)
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


@pytest.mark.parametrize("name", MEANINGS)
@pytest.mark.parametrize("starts", STARTS, ids=str)
@pytest.mark.parametrize("padding", [0, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_see_their_segment_alone(
    name: str, starts: list[int], padding: int, dtype: torch.dtype
) -> None:
    q, k, v, start_S = inputs(starts, padding, dtype, "cpu")
    out = MEANINGS[name](q, k, v, start_S, 99, SCALE)
    assert out.shape == q.shape and out.dtype == dtype
    assert_close(out[starts[0] : starts[-1]], exact(q, k, v, starts))
    assert not out.isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("starts", STARTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_of_gpus_give_the_formula(starts: list[int], dtype: torch.dtype) -> None:
    q, k, v, start_S = inputs(starts, 13, dtype, "cuda")
    out = segment_attention_cuda(q, k, v, start_S, 99, SCALE)
    assert_close(out[starts[0] : starts[-1]].cpu(), exact(q, k, v, starts))


def test_the_op_has_the_shape_of_its_queries() -> None:
    q, k, v, start_S = inputs([0, 19], 5, torch.float32, "cpu")
    torch.library.opcheck(
        ops.segment_attention, (q, k, v, start_S, 19, SCALE), test_utils="test_faketensor"
    )
