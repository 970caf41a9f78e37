"""Attention within segments: the meaning and torch's kernels against the formula, with NaN outside
the segments. `test_triton_varlen_attention.py` has the Triton kernel."""

from __future__ import annotations

import pytest
import torch

from nanovllm.kernels import ops, reference
from nanovllm.kernels.varlen_attention import varlen_attention_cpu, varlen_attention_torch
from tests.kernels.paged import assert_close
from tests.kernels.varlen_cases import SCALE, STARTS, exact, inputs

MEANINGS = {"reference": reference.attention.varlen_attention, "cpu": varlen_attention_cpu}


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
def test_torchs_kernels_on_gpus_give_the_formula(starts: list[int], dtype: torch.dtype) -> None:
    q, k, v, start_S = inputs(starts, 13, dtype, "cuda")
    out = varlen_attention_torch(q, k, v, start_S, 99, SCALE)
    assert_close(out[starts[0] : starts[-1]].cpu(), exact(q, k, v, starts))


def test_the_op_has_the_shape_of_its_queries() -> None:
    q, k, v, start_S = inputs([0, 19], 5, torch.float32, "cpu")
    torch.library.opcheck(
        ops.varlen_attention, (q, k, v, start_S, 19, SCALE), test_utils="test_faketensor"
    )
