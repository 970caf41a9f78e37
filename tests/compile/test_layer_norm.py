"""Layer norms stay what they are in passes for RMS norms, and compute torch's formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nanovllm.compile.passes.fuse_add_norm import fuse_add_norm
from nanovllm.compile.passes.fuse_linear import fuse_linear
from nanovllm.kernels import ops, reference
from nanovllm.kernels.cpu import norm_act as cpu_norm_act
from tests.compile.test_passes import op_counts, traced


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_torchs_layer_norm(dtype: torch.dtype) -> None:
    x_TD, weight_D, bias_D = (torch.randn(size, dtype=dtype) for size in ((5, 19), (19,), (19,)))
    for bias in (None, bias_D):
        wanted = torch.nn.functional.layer_norm(x_TD, (19,), weight_D, bias, 1e-3)
        torch.testing.assert_close(ops.layer_norm(x_TD, weight_D, bias, 1e-3), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_of_a_cpu_is_the_reference(
    dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    x_TD = torch.randn(19, 198, dtype=dtype)[:, ::2]
    weight_D, bias_D = (torch.randn(99, dtype=weight_dtype) for _ in range(2))
    for bias in (None, bias_D):
        found = cpu_norm_act.layer_norm(x_TD, weight_D, bias, 1e-5)
        assert found.is_contiguous()
        wanted = reference.norm_act.layer_norm(x_TD, weight_D, bias, 1e-5)
        torch.testing.assert_close(found, wanted)


def test_each_head_may_have_a_weight() -> None:
    x_TNH, weight_NH = torch.randn(5, 3, 8), torch.randn(3, 8)
    found = reference.norm_act.layer_norm(x_TNH, weight_NH, None, 1e-5)
    for head in range(3):
        own = (x_TNH[:, head], (8,), weight_NH[head], None, 1e-5)
        torch.testing.assert_close(found[:, head], torch.nn.functional.layer_norm(*own))


def test_no_pass_fuses_a_layer_norm() -> None:
    def function(x: Tensor, weight: Tensor, residual: Tensor, norm: Tensor) -> Tensor:
        h = ops.linear(x, weight, None, residual)
        return ops.linear(ops.layer_norm(h, norm, None, 1e-5), weight, None)

    inputs: dict[str, object] = {
        "x": torch.randn(1, 8), "weight": torch.randn(8, 8), "residual": torch.randn(1, 8),
        "norm": torch.randn(8),
    }  # fmt: skip
    graph, fakes = traced(function, inputs)
    takes = {ops.linear: lambda x, weight, has_norm, silu_mul: has_norm}
    graph = fuse_linear(fuse_add_norm(graph, fakes), fakes, takes=takes)
    assert op_counts(graph) == {"linear": 2, "layer_norm": 1}
