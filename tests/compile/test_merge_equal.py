"""merge_equal computes equal values once, and reads values again that may have changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from nanovllm.compile.passes.merge_equal import merge_equal
from nanovllm.compile.trace import trace


def merged(function: Callable[..., Any], **inputs: Tensor) -> tuple[GraphModule, Counter[str]]:
    """The merged graph and the count of each op. Checks the results against the function."""
    graph, fakes, _ = trace(function, dict(inputs))
    graph = merge_equal(graph, fakes)
    copies = [{name: value.clone() for name, value in inputs.items()} for _ in range(2)]
    expected = function(*copies[0].values())
    actual = graph(*copies[1].values())
    for a, e in zip(actual, expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert torch.equal(a, e)
    assert all(torch.equal(copies[0][name], copies[1][name]) for name in inputs), "written inputs"
    return graph, Counter(
        str(node.target) for node in graph.graph.nodes if node.op == "call_function"
    )


def test_equal_calls_become_one() -> None:
    def layers(x: Tensor, index: Tensor) -> Tensor:
        for _ in range(5):
            x = x + torch.stack((index // 4, index % 4)).sum(0)
        return x

    _, counts = merged(layers, x=torch.randn(7), index=torch.arange(7))
    assert (
        counts["aten.stack.default"]
        == counts["aten.sum.dim_IntList"]
        == counts["aten.floor_divide.default"]
        == 1
    )
    assert counts["aten.add.Tensor"] == 5


def test_numbers_of_another_type_are_another_argument() -> None:
    _, counts = merged(lambda x: (x * 1, x * 1.0, x * True, x * 1.0), x=torch.arange(3))
    assert counts["aten.mul.Tensor"] == 3


def test_reads_of_memory_that_is_written_stay() -> None:
    def step(state: Tensor) -> tuple[Tensor, Tensor]:
        before = state + 1
        state.mul_(2)
        return before, state + 1

    _, counts = merged(step, state=torch.ones(3))
    assert counts["aten.add.Tensor"] == 2


def test_reads_through_views_stay_as_well() -> None:
    def step(state: Tensor) -> tuple[Tensor, Tensor]:
        before = state.view(4)[1:] + 1
        state.view(-1)[:2].fill_(7)
        return before, state.view(4)[1:] + 1

    _, counts = merged(step, state=torch.ones(2, 2))
    assert counts["aten.add.Tensor"] == 2


def test_writes_are_never_merged() -> None:
    def step(state: Tensor) -> Tensor:
        state.add_(1)
        state.add_(1)
        return state * 1.0

    _, counts = merged(step, state=torch.ones(3))
    assert counts["aten.add_.Tensor"] == 2
