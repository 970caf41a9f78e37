"""fuse_add_norm keeps the results, and moves a residual only if nothing reads the sum before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanovllm.compile.passes.fuse_add_norm import fuse_add_norm
from nanovllm.compile.trace import trace
from nanovllm.kernels import ops
from tests.compile import seeded

inputs: dict[str, Any] = {
    "x_TD": seeded.normal(1, 3, 16),
    "h_TD": seeded.normal(2, 3, 16),
    "weight_DD": seeded.weight(3, 16, 16),
    "norm_D": seeded.normal(4, 16).abs(),
}


def fused(function: Callable[..., Any]) -> list[str]:
    """Names of our ops after the pass. Checks the graph's results against the function."""
    graph, fakes, _ = trace(function, inputs)
    graph = fuse_add_norm(graph, fakes)
    graph.graph.lint()
    for actual, wanted in zip(graph(*inputs.values()), function(*inputs.values()), strict=True):
        torch.testing.assert_close(actual, wanted)
    return [name for node in graph.graph.nodes if (name := ops.op_name(node.target))]


def test_the_residual_moves_into_the_norm_and_its_sum_serves_the_others() -> None:
    def function(x: Tensor, h: Tensor, weight: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        h = ops.linear(x, weight, None, h)
        return ops.linear(ops.rms_norm(h, norm, 1e-6), weight, None, h), h * 2

    assert fused(function) == ["linear", "add_rms_norm", "linear"]


def test_the_residual_of_a_product_with_int8_weights_moves_as_well() -> None:
    def function(x: Tensor, h: Tensor, weight: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        values = (weight * 40).to(torch.int8)
        h = ops.linear_int8(x, values, norm, None, h)
        return ops.rms_norm(h, norm, 1e-6), ops.linear_int8(h, values, norm, None)

    assert fused(function) == ["linear_int8", "add_rms_norm", "linear_int8"]


def test_a_sum_read_before_the_norm_stays_where_it_is() -> None:
    def function(x: Tensor, h: Tensor, weight: Tensor, norm: Tensor) -> tuple[Tensor]:
        h = ops.linear(x, weight, None, h)
        return (ops.rms_norm(h, norm + h.sum(), 1e-6),)

    assert fused(function) == ["linear", "rms_norm"]


def test_products_without_a_residual_and_norms_of_other_things_are_left_alone() -> None:
    def function(x: Tensor, h: Tensor, weight: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        return ops.rms_norm(ops.linear(x, weight, None), norm, 1e-6), ops.rms_norm(h, norm, 1e-6)

    assert fused(function) == ["linear", "rms_norm", "rms_norm"]
