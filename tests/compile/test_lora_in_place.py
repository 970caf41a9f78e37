"""lora_in_place keeps a graph's results and inputs, and its neighbours find their residuals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanovllm.compile.passes.add_in_place import add_in_place
from nanovllm.compile.passes.fuse_add_norm import fuse_add_norm
from nanovllm.compile.passes.fuse_linear import fuse_linear
from nanovllm.compile.passes.lora_in_place import lora_in_place
from nanovllm.compile.passes.reduce_in_place import reduce_in_place
from nanovllm.compile.trace import trace
from nanovllm.kernels import ops
from nanovllm.models.model import AdapterRows
from tests.compile import seeded
from tests.models import lora_cases

inputs: dict[str, Any] = {
    "x_TD": seeded.normal(1, 3, 16),
    "h_TD": seeded.normal(2, 3, 16),
    "weight_DD": seeded.weight(3, 16, 16),
    "rows": lora_cases.grouped([2, 0, 1]),
    "a_NLD": seeded.weight(4, 2, 4, 16),
    "b_NDR": seeded.weight(5, 2, 16, 4),
}
Added = Callable[..., Tensor]


def changed(function: Callable[..., Any], *, fuses: bool = False) -> list[str]:
    """Names of our ops after the passes. Checks the results, and that the inputs do not change.

    With `fuses` the device has fused products for these sizes. `function` gets x, h, the weight,
    and a function that adds what adapters do to a product.
    """

    def region(
        x: Tensor, h: Tensor, weight: Tensor, rows: AdapterRows, a: Tensor, b: Tensor
    ) -> Any:
        def added(y: Tensor, x: Tensor, residual: Tensor | None = None) -> Tensor:
            return ops.add_lora(y, x, *rows, a, b, (16,), residual)

        return function(x, h, weight, added)

    graph, fakes, _ = trace(region, inputs)
    if fuses:
        graph = fuse_linear(graph, fakes, takes={ops.linear: lambda *args: True})
    for one in (fuse_add_norm, lora_in_place, add_in_place, reduce_in_place):
        graph = one(graph, fakes)
    graph.graph.lint()
    leaves = [*list(inputs.values())[:3], *inputs["rows"], *list(inputs.values())[4:]]
    copies = [value.clone() for value in leaves]
    for actual, wanted in zip(graph(*copies), region(*inputs.values()), strict=True):
        torch.testing.assert_close(actual, wanted)
    assert all(map(torch.equal, copies, leaves))
    return [name for node in graph.graph.nodes if (name := ops.op_name(node.target))]


def test_adapters_add_to_a_product_that_nothing_else_reads() -> None:
    def function(x: Tensor, h: Tensor, weight: Tensor, added: Added) -> tuple[Tensor]:
        return (ops.silu_mul(added(ops.linear(x, weight, None), x)),)

    assert changed(function) == ["linear", "add_lora_", "silu_mul"]


def test_residuals_go_to_the_norm_that_follows_or_back_to_the_product() -> None:
    def function(x: Tensor, h: Tensor, weight: Tensor, added: Added) -> tuple[Tensor]:
        h = added(ops.linear(x, weight, None), x, h)
        x = ops.rms_norm(h, weight[0], 1e-6)
        return (added(ops.linear(x, weight, None), x, h),)

    names = ["linear", "add_lora_", "add_rms_norm", "linear_", "add_lora_"]
    assert changed(function) == names
    names = ["fused_linear", "add_lora_", "add_rms_norm", "fused_linear", "add_lora_"]
    assert changed(function, fuses=True) == names


def test_a_product_that_is_read_again_or_an_input_is_left_alone() -> None:
    def read_again(x: Tensor, h: Tensor, weight: Tensor, added: Added) -> tuple[Tensor, Tensor]:
        y = ops.linear(x, weight, None)
        return added(y, x), y + 1

    def an_input(x: Tensor, h: Tensor, weight: Tensor, added: Added) -> tuple[Tensor]:
        return (added(h, x),)

    assert changed(read_again) == ["linear", "add_lora"]
    assert changed(an_input) == ["add_lora"]


def test_a_residual_that_is_made_after_the_product_stays() -> None:
    def function(x: Tensor, h: Tensor, weight: Tensor, added: Added) -> tuple[Tensor]:
        y = ops.linear(x, weight, None)
        return (added(y, x, ops.rms_norm(h, weight[0], 1e-6)),)

    assert changed(function) == ["linear", "rms_norm", "add_lora"]
