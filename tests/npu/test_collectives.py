"""An all-reduce in a traced region becomes HCCL's op, as tensor parallelism will need it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from nanovllm.compile.lower import torchair
from nanovllm.compile.trace import trace
from tests.npu.ge import Ge


@pytest.fixture
def two_ranks(ge: Ge, tmp_path: Path) -> Iterator[None]:
    """A process group of two ranks that sends nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("two_ranks")
def test_all_reduce_is_lowered(ge: Ge) -> None:
    from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef

    def region(x: Tensor, weight: Tensor) -> Tensor:
        return collectives.all_reduce(x @ weight.T, "sum", dist.group.WORLD) + 1

    inputs: dict[str, object] = {
        "x": torch.zeros(8, 64, dtype=torch.bfloat16).npu(),
        "weight": torch.zeros(32, 64, dtype=torch.bfloat16).npu(),
    }
    graph, fakes, _ = trace(region, inputs)
    code = torchair.generate(graph, fakes, torchair.Settings())
    # only the graph is checked: running it would need two ranks
    line = next(line for line in code.splitlines() if line.startswith("serialized_graph = "))
    (found,) = ModelDef.FromString(ast.literal_eval(line.removeprefix("serialized_graph = "))).graph
    types = [op.type for op in found.op]
    assert types.count("HcomAllReduce") == 1 and types.count("MatMul") == 1, types
    reduce = next(op for op in found.op if op.type == "HcomAllReduce")
    assert reduce.attr["reduction"].s == b"sum" and reduce.input[0].startswith("MatMul")
