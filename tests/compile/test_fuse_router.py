"""fuse_router keeps a graph's results, and fuses only what one token's kernel computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.compile.passes.fuse_router import fuse_router
from nanovllm.compile.trace import trace
from nanovllm.kernels import ops
from tests.compile import seeded

EPS = 1e-6
inputs: dict[str, Any] = {
    "x_TD": seeded.normal(1, 3, 16),
    "norm_D": seeded.normal(2, 16).abs(),
    "router_ED": seeded.weight(3, 10, 16),
}


def fused(function: Callable[..., Any], max_rows: int = 3) -> list[str]:
    """Names of our ops after the pass. The graph is checked against the function."""
    graph, fakes, _ = trace(function, inputs)
    graph = fuse_router(graph, fakes, takes=lambda x, router: x.shape[0] <= max_rows)
    graph.graph.lint()
    for actual, wanted in zip(graph(*inputs.values()), function(*inputs.values()), strict=True):
        torch.testing.assert_close(actual, wanted)
    return [name for node in graph.graph.nodes if (name := ops.op_name(node.target))]


def sparse(x: Tensor, norm: Tensor, router: Tensor) -> tuple[Tensor, ...]:
    y = ops.rms_norm(x, norm, EPS)
    weight, expert = ops.topk_softmax(ops.linear(y, router, None), 3, True)
    return y * 2, weight + 1, expert


def test_norm_product_and_choice_become_one_op() -> None:
    assert fused(sparse) == ["norm_router_topk"]


def test_steps_with_more_rows_than_the_kernel_takes_stay() -> None:
    assert fused(sparse, max_rows=2) == ["rms_norm", "linear", "topk_softmax"]


def with_bias(x: Tensor, norm: Tensor, router: Tensor) -> tuple[Tensor, ...]:
    bias = norm[:10]
    return ops.topk_softmax(ops.linear(ops.rms_norm(x, norm, EPS), router, bias), 3, False)


def test_a_bias_of_the_product_is_part_of_the_op() -> None:
    assert fused(with_bias) == ["norm_router_topk"]


def read_twice(x: Tensor, norm: Tensor, router: Tensor) -> tuple[Tensor, ...]:
    logits = ops.linear(ops.rms_norm(x, norm, EPS), router, None)
    return (*ops.topk_softmax(logits, 3, False), logits)


def without_norm(x: Tensor, norm: Tensor, router: Tensor) -> tuple[Tensor, ...]:
    return ops.topk_softmax(ops.linear(x, router, None), 3, False)


@pytest.mark.parametrize("function", [read_twice, without_norm])
def test_other_patterns_stay(function: Callable[..., Any]) -> None:
    assert "norm_router_topk" not in fused(function)
