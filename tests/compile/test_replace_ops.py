"""replace_ops: a table names the replacement of each op; other ops become plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.compile.passes.replace_ops import replace_ops
from nanovllm.compile.trace import trace
from nanovllm.kernels import ops


def test_rows_of_the_table_are_used_and_the_rest_is_plain() -> None:
    def region(x: Tensor, weight: Tensor) -> Tensor:
        return ops.silu_mul(ops.rms_norm(x, weight, 1e-6))

    x, weight = torch.randn(5, 8), torch.randn(8)
    graph, fakes, _ = trace(region, {"x": x, "weight": weight})
    table = {
        "rms_norm": lambda x, weight, eps: torch.nn.functional.rms_norm(
            x, weight.shape, weight, eps
        )
    }
    replaced = replace_ops(graph, fakes, table=table)
    targets = {str(node.target) for node in replaced.graph.nodes if node.op == "call_function"}
    assert not any("nanovllm" in target for target in targets)
    names = [node.name for node in replaced.graph.nodes if node.op == "placeholder"]
    assert names == ["x", "weight"]
    torch.testing.assert_close(replaced(x, weight)[0], region(x, weight))


def test_an_op_may_stay_by_standing_for_itself() -> None:
    x, weight = torch.randn(5, 8), torch.randn(8)
    graph, fakes, _ = trace(
        lambda x, weight: ops.rms_norm(x, weight, 1e-6), {"x": x, "weight": weight}
    )
    replaced = replace_ops(graph, fakes, table={"rms_norm": ops.rms_norm})
    assert [node.target for node in replaced.graph.nodes if node.op == "call_function"] == [
        ops.rms_norm
    ]
