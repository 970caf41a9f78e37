"""fuse_reduce_norm joins a sum over ranks with the norm that alone reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanovllm.compile.passes.fuse_add_norm import fuse_add_norm
from nanovllm.compile.passes.fuse_reduce_norm import fuse_reduce_norm
from nanovllm.compile.trace import trace
from nanovllm.kernels import collectives, ops
from tests.compile import seeded

inputs: dict[str, Any] = {
    "x_TD": seeded.normal(1, 3, 16),
    "h_TD": seeded.normal(2, 3, 16),
    "norm_D": seeded.normal(3, 16).abs(),
}
Result = tuple[Tensor, ...]


class Tripled:
    """A group of three ranks with equal tensors."""

    rank, size, peers, name = 0, 3, None, ""

    def all_reduce(self, x: Tensor) -> None:
        x *= 3

    def all_gather(self, x: Tensor) -> Tensor:
        return x.expand(3, *x.shape)

    def min_int(self, value: int) -> int:
        return value


def fused(function: Callable[..., Result], max_rows: int = 3) -> list[str]:
    """Names of our ops after the pass. Checks the graph's results against the function."""
    graph, fakes, _ = trace(function, inputs)
    graph = fuse_reduce_norm(
        fuse_add_norm(graph, fakes), fakes, takes=lambda x: x.shape[0] <= max_rows
    )
    graph.graph.lint()
    with collectives.using(Tripled()):
        for actual, wanted in zip(graph(*inputs.values()), function(*inputs.values()), strict=True):
            torch.testing.assert_close(actual, wanted)
    return [name for node in graph.graph.nodes if (name := ops.op_name(node.target))]


def sum_and_norm(x: Tensor, h: Tensor, norm: Tensor) -> Result:
    h = ops.all_reduce(x * 2, h)
    return ops.rms_norm(h, norm, 1e-6), h + 1


def test_a_sum_and_its_norm_become_one_op() -> None:
    assert fused(sum_and_norm) == ["all_reduce_norm"]


def test_tensors_with_many_rows_stay_two_ops() -> None:
    assert fused(sum_and_norm, max_rows=2) == ["all_reduce", "add_rms_norm"]


def test_a_sum_that_others_read_stays() -> None:
    def function(x: Tensor, h: Tensor, norm: Tensor) -> Result:
        total = ops.all_reduce(x)
        normed, added = ops.add_rms_norm(total, h, norm, 1e-6)
        return normed, added, total

    assert fused(function) == ["all_reduce", "add_rms_norm"]


def test_a_sum_that_is_its_own_residual_or_has_one_stays() -> None:
    def function(x: Tensor, h: Tensor, norm: Tensor) -> Result:
        total, other = ops.all_reduce(x), ops.all_reduce(x, h)
        return *ops.add_rms_norm(total, total, norm, 1e-6), *ops.add_rms_norm(other, h, norm, 1e-6)

    assert fused(function) == ["all_reduce", "all_reduce", "add_rms_norm", "add_rms_norm"]
