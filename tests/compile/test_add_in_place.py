"""add_in_place keeps a graph's results and inputs, and overwrites no value that is read later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanovllm.compile.passes.add_in_place import add_in_place
from nanovllm.compile.trace import trace
from nanovllm.kernels import ops
from tests.compile import seeded

inputs: dict[str, Any] = {
    "x_TD": seeded.normal(1, 3, 16),
    "h_TD": seeded.normal(2, 3, 16),
    "weight_DD": seeded.weight(3, 16, 16),
}


def changed(function: Callable[..., Any]) -> list[str]:
    """Names of our ops after the pass. Checks the results, and that the inputs do not change."""
    graph, fakes, _ = trace(function, inputs)
    graph = add_in_place(graph, fakes)
    graph.graph.lint()
    copies = [value.clone() for value in inputs.values()]
    for actual, wanted in zip(graph(*copies), function(*inputs.values()), strict=True):
        torch.testing.assert_close(actual, wanted)
    assert all(
        torch.equal(copy, value) for copy, value in zip(copies, inputs.values(), strict=True)
    )
    return [name for node in graph.graph.nodes if (name := ops.op_name(node.target))]


def test_the_last_reader_of_a_residual_adds_in_place() -> None:
    def function(x: Tensor, h: Tensor, weight: Tensor) -> tuple[Tensor]:
        x, h = ops.add_rms_norm(x, h, weight[0], 1e-6)
        return (ops.linear(ops.silu_mul(torch.cat((x, x), 1)), weight, None, h),)

    assert changed(function) == ["add_rms_norm", "silu_mul", "linear_"]


def test_a_residual_that_is_read_again_or_given_out_is_left_alone() -> None:
    def read_again(x: Tensor, h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        h = ops.rms_norm(h, weight[0], 1e-6)
        return ops.linear(x, weight, None, h), h + 1

    def given_out(x: Tensor, h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        h = ops.rms_norm(h, weight[0], 1e-6)
        return ops.linear(x, weight, None, h), h

    def read_through_a_view(x: Tensor, h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        h = ops.rms_norm(h, weight[0], 1e-6)
        flat = h.view(48)
        return ops.linear(x, weight, None, h), flat + 1

    assert (
        changed(read_again)
        == changed(given_out)
        == changed(read_through_a_view)
        == ["rms_norm", "linear"]
    )


def test_inputs_views_and_the_product_s_own_operand_are_left_alone() -> None:
    def an_input(x: Tensor, h: Tensor, weight: Tensor) -> tuple[Tensor]:
        return (ops.linear(x, weight, None, h),)

    def a_view(x: Tensor, h: Tensor, weight: Tensor) -> tuple[Tensor]:
        return (ops.linear(x, weight, None, h.view(3, 16)),)

    def an_operand(x: Tensor, h: Tensor, weight: Tensor) -> tuple[Tensor]:
        h = ops.rms_norm(h, weight[0], 1e-6)
        return (ops.linear(h, weight, None, h),)

    assert changed(an_input) == changed(a_view) == ["linear"]
    assert changed(an_operand) == ["rms_norm", "linear"]
