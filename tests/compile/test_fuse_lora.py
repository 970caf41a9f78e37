"""fuse_lora keeps a graph's results, and takes in norms and SiLU · up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.compile.passes.fuse_lora import fuse_lora
from nanovllm.compile.trace import trace
from nanovllm.kernels import ops
from tests.compile import seeded
from tests.models import lora_cases

inputs: dict[str, Any] = {
    "x_TD": seeded.normal(1, 3, 16),
    "norm_D": seeded.normal(2, 16),
    "weight_OD": seeded.weight(3, 16, 16),
    "rows": lora_cases.grouped([2, 0, 1]),
    "a_NLD": seeded.weight(4, 2, 4, 16),
    "b_NOR": seeded.weight(5, 2, 16, 4),
}
Added = Callable[..., Tensor]


def fused(function: Callable[..., Any], *, takes: bool) -> list[str]:
    """Names of our ops after the pass; the results must not change. `function` gets x, the norm's
    weight, and a product with adapters."""

    def region(x: Tensor, norm: Tensor, weight: Tensor, rows: Any, a: Tensor, b: Tensor) -> Any:
        def product(x: Tensor, residual: Tensor | None = None) -> Tensor:
            y = ops.linear(x, weight, None)
            return ops.add_lora(y, x, *rows, a, b, (16,), residual)

        return function(x, norm, product)

    graph, fakes, _ = trace(region, inputs)
    graph = fuse_lora(graph, fakes, takes=lambda x, weight: takes)
    graph.graph.lint()
    leaves = [*list(inputs.values())[:3], *inputs["rows"], *list(inputs.values())[4:]]
    for actual, wanted in zip(graph(*leaves), region(*inputs.values()), strict=True):
        torch.testing.assert_close(actual, wanted)
    return [name for node in graph.graph.nodes if (name := ops.op_name(node.target))]


@pytest.mark.parametrize(
    ("takes", "names"), [(True, ["lora_linear"]), (False, ["rms_norm", "linear", "add_lora_silu"])]
)
def test_a_norm_and_silu_go_into_the_product(takes: bool, names: list[str]) -> None:
    def function(x: Tensor, norm: Tensor, product: Added) -> tuple[Tensor]:
        return (ops.silu_mul(product(ops.rms_norm(x, norm, 1e-6))),)

    assert fused(function, takes=takes) == names


def test_a_residual_is_added_after_the_adapter() -> None:
    def function(x: Tensor, norm: Tensor, product: Added) -> tuple[Tensor]:
        return (product(ops.rms_norm(x, norm, 1e-6), x),)

    assert fused(function, takes=True) == ["lora_linear"]
    assert fused(function, takes=False) == ["rms_norm", "linear", "add_lora"]


def test_a_norm_that_others_read_and_a_product_that_is_read_again_stay() -> None:
    def normed(x: Tensor, norm: Tensor, product: Added) -> tuple[Tensor, Tensor]:
        x = ops.rms_norm(x, norm, 1e-6)
        return product(x), x

    def again(x: Tensor, norm: Tensor, product: Added) -> tuple[Tensor, Tensor]:
        y = product(x)
        return ops.silu_mul(y), y

    assert fused(normed, takes=True) == ["rms_norm", "lora_linear"]
    assert fused(again, takes=True) == ["lora_linear", "silu_mul"]
