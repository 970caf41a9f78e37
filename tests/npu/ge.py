"""Replaces GE: torchair's real lowering runs, and this file keeps and interprets its graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tests.npu import ascend_ir
from tests.npu.host import host_view


@dataclass
class Graph:
    """One graph that GE got, and records of its first run."""

    proto: Any
    options: dict[str, str]
    num_runs: int = 0
    # each op's inputs by name
    dtypes: list[tuple[Any, dict[str, torch.dtype]]] = field(default_factory=list)
    # output → the input whose memory it is written to
    written: dict[int, int] = field(default_factory=dict)

    @cached_property
    def program(self) -> ascend_ir.Program:
        return ascend_ir.Program(self.proto)

    def count(self, op_type: str) -> int:
        return sum(op.type == op_type for op in self.proto.op)


@dataclass
class Ge:
    graphs: list[Graph] = field(default_factory=list)
    num_lowered: int = 0

    def install(self, monkeypatch: Any) -> None:
        """Replace the native functions of torchair that need CANN for the whole session."""
        from torchair._ge_concrete_graph.fx2ge_converter import GeConcreteGraph
        from torchair.core import _torchair
        from torchair.ge._ge_graph import GeGraph

        monkeypatch.setattr(_torchair, "InitializeGraphEngine", lambda options: None)
        monkeypatch.setattr(_torchair, "InitDeviceStdoutChannel", lambda device: 0)
        monkeypatch.setattr(_torchair, "FinalizeGraphEngine", lambda: None)
        # "": the op with its optional inputs and attributes exists in this CANN
        monkeypatch.setattr(_torchair, "check_cann_compat", lambda op_type, inputs, attributes: "")
        ge = self

        def load(graph: Any, options: dict[str, str], *, create_pg: bool = False) -> None:
            graph._nanovllm = Graph(graph._proto, dict(options))

        def compile_(graph: Any) -> None:
            ge.graphs.append(graph._nanovllm)

        def run(
            graph: Any, inputs: list[Tensor], assigned_outputs: Any = (), stream: Any = None
        ) -> list[Tensor]:
            with _disable_current_modes(), torch.no_grad():
                return _run(graph._nanovllm, inputs, list(assigned_outputs or ()))

        monkeypatch.setattr(GeGraph, "load", load)
        monkeypatch.setattr(GeGraph, "compile", compile_)
        monkeypatch.setattr(GeGraph, "run", run)
        original = GeConcreteGraph.optimize_graph_without_runtime

        def optimize(graph: Any, *args: Any, **kwargs: Any) -> Any:
            ge.num_lowered += 1
            return original(graph, *args, **kwargs)

        monkeypatch.setattr(GeConcreteGraph, "optimize_graph_without_runtime", optimize)


def _run(graph: Graph, inputs: list[Tensor], assigned: list[Tensor | None]) -> list[Tensor]:
    def observe(op: Any, arguments: Sequence[Tensor | None]) -> None:
        named = zip((desc.name for desc in op.input_desc), arguments, strict=True)
        graph.dtypes.append(
            (op, {name: tensor.dtype for name, tensor in named if tensor is not None})
        )

    hosts = [host_view(tensor) if tensor.device.type == "npu" else tensor for tensor in inputs]
    results = graph.program.run(hosts, observe if graph.num_runs == 0 else None)
    graph.num_runs += 1
    assigned += [None] * (len(results) - len(assigned))
    positions = {id(tensor): index for index, tensor in enumerate(inputs)}
    graph.written = {
        output: positions[id(target)]
        for output, target in enumerate(assigned)
        if target is not None
    }
    device = next(tensor.device for tensor in inputs if tensor.device.type == "npu")
    outputs = []
    for result, target in zip(results, assigned, strict=True):
        out = (
            torch.empty(result.shape, dtype=result.dtype, device=device)
            if target is None
            else target
        )
        outputs.append(out)
        host_view(out).copy_(result)
    return outputs
