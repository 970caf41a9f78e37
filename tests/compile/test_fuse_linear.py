"""fuse_linear keeps a graph's results, fuses what the limits allow, and leaves the rest alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from nanovllm.compile.passes.fuse_linear import fuse_linear
from nanovllm.compile.trace import trace
from nanovllm.kernels import ops
from tests.compile import seeded

EPS = 1e-6
inputs: dict[str, Any] = {
    "x_TD": seeded.normal(1, 3, 16),
    "norm_D": seeded.normal(2, 16).abs(),
    "weight_GD": seeded.weight(3, 20, 16),
    "bias_G": seeded.normal(4, 20),
    "down_DF": seeded.weight(5, 16, 10),
}


def fused(
    function: Callable[..., Any], max_rows: int = 16, max_rows_norm: int = 16
) -> tuple[GraphModule, list[str]]:
    """The graph after the pass, checked against the function, and names of our ops in it."""
    graph, fakes, _ = trace(function, inputs)

    def takes(x: Tensor, weight: Tensor, has_norm: bool, silu_mul: bool) -> bool:
        return x.shape[0] <= (max_rows_norm if has_norm else max_rows)

    graph = fuse_linear(graph, fakes, takes={ops.linear: takes})
    graph.graph.lint()
    expected = function(*inputs.values())
    for actual, wanted in zip(graph(*inputs.values()), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    return graph, [name for node in graph.graph.nodes if (name := ops.op_name(node.target))]


def mlp(x: Tensor, norm: Tensor, weight: Tensor, bias: Tensor, down: Tensor) -> tuple[Tensor]:
    gate_up = ops.linear(ops.rms_norm(x, norm, EPS), weight, bias)
    return (ops.linear(ops.silu_mul(gate_up), down, None, x),)


def test_norm_product_and_silu_become_one_op_and_product_and_residual_another() -> None:
    graph, names = fused(mlp)
    assert names == ["fused_linear"] * 2
    first, second = (node for node in graph.graph.nodes if node.target is ops.fused_linear)
    assert [str(argument) for argument in first.args] == [
        "x_TD",
        "norm_D",
        "weight_GD",
        "bias_G",
        "None",
        str(EPS),
        "True",
    ]
    assert second.args[0] is first
    assert [str(argument) for argument in second.args[1:]] == [
        "None",
        "down_DF",
        "None",
        "x_TD",
        "0.0",
        "False",
    ]


def test_a_lone_product_becomes_the_op_without_neighbours() -> None:
    graph, names = fused(lambda x, norm, weight, bias, down: (ops.linear(x, weight, None),))
    assert names == ["fused_linear"]
    node = next(node for node in graph.graph.nodes if node.target is ops.fused_linear)
    assert node.args[1] is None and node.args[3:] == (None, None, 0.0, False)


def test_more_rows_than_the_limit_stay_as_they_are() -> None:
    assert fused(mlp, max_rows=2, max_rows_norm=2)[1] == [
        "rms_norm",
        "linear",
        "silu_mul",
        "linear",
    ]
    assert fused(mlp, max_rows=3, max_rows_norm=2)[1] == [
        "rms_norm",
        "fused_linear",
        "fused_linear",
    ]
    assert fused(mlp, max_rows=2, max_rows_norm=3)[1] == ["fused_linear", "linear"]


def test_each_product_is_asked_for_with_and_without_its_norm() -> None:
    asked = []

    def takes(x: Tensor, weight: Tensor, has_norm: bool, silu_mul: bool) -> bool:
        asked.append((*x.shape, *weight.shape, has_norm, silu_mul))
        return False

    graph, fakes, _ = trace(mlp, inputs)
    fuse_linear(graph, fakes, takes={ops.linear: takes})
    assert asked == [
        (3, 16, 20, 16, True, True),
        (3, 16, 20, 16, False, True),
        (3, 10, 16, 10, False, False),
    ]


def test_a_norm_that_others_read_stays() -> None:
    def function(
        x: Tensor, norm: Tensor, weight: Tensor, bias: Tensor, down: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = ops.rms_norm(x, norm, EPS)
        return ops.linear(x, weight, bias), x + 1

    assert fused(function)[1] == ["rms_norm", "fused_linear"]


def test_a_product_that_others_read_keeps_its_silu_apart() -> None:
    def function(
        x: Tensor, norm: Tensor, weight: Tensor, bias: Tensor, down: Tensor
    ) -> tuple[Tensor, Tensor]:
        gate_up = ops.linear(x, weight, bias)
        return ops.silu_mul(gate_up), gate_up + 1

    assert fused(function)[1] == ["fused_linear", "silu_mul"]


def test_a_silu_after_a_residual_stays_apart() -> None:
    def function(
        x: Tensor, norm: Tensor, weight: Tensor, bias: Tensor, down: Tensor
    ) -> tuple[Tensor]:
        return (ops.silu_mul(ops.linear(x, weight[:16], None, x)),)

    assert fused(function)[1] == ["fused_linear", "silu_mul"]


@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_chain_of_layers(num_layers: int) -> None:
    def function(
        x: Tensor, norm: Tensor, weight: Tensor, bias: Tensor, down: Tensor
    ) -> tuple[Tensor]:
        for _ in range(num_layers):
            (x,) = mlp(x, norm, weight, bias, down)
        return (x,)

    assert fused(function)[1] == ["fused_linear"] * 2 * num_layers


@pytest.mark.parametrize("kind", ["packed", "fp8"])
def test_products_of_packed_weights_become_their_own_fused_ops(kind: str) -> None:
    values = torch.randn(20, 32)
    code = torch.randint(256, (20, 16), dtype=torch.uint8)
    weight = (code, torch.rand(20, 1), -torch.rand(20, 1), None, 4, 32)
    op, fused_name = ops.packed_linear, "fused_packed_linear"
    if kind == "fp8":
        weight = (values.to(torch.float8_e4m3fn), torch.rand(1, 1), 32, 32)  # type: ignore[assignment]
        op, fused_name = ops.fp8_linear, "fused_fp8_linear"
    given = {f"w{i}": one for i, one in enumerate(weight) if isinstance(one, torch.Tensor)}
    tensors = {"x": torch.randn(3, 32), "norm": torch.rand(32), "residual": torch.randn(3, 20)}

    def function(
        x: Tensor, norm: Tensor, residual: Tensor, *parts: Tensor
    ) -> tuple[Tensor, Tensor]:
        rest = weight[len(parts) :]
        gate_up = op(ops.rms_norm(x, norm, EPS), *parts, *rest, None)
        return ops.silu_mul(gate_up), op(x, *parts, *rest, None, residual)

    graph, fakes, _ = trace(function, tensors | given)
    graph = fuse_linear(graph, fakes, takes={op: lambda x, *rest: x.shape[0] <= 3})
    names = [name for node in graph.graph.nodes if (name := ops.op_name(node.target))]
    assert names == [fused_name] * 2
    arguments = (*tensors.values(), *given.values())
    for actual, wanted in zip(graph(*arguments), function(*arguments), strict=True):
        torch.testing.assert_close(actual, wanted)
