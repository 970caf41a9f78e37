"""Sums and gathers over ranks as ops of HCCL: in graphs of GE and as a group's backend."""

from __future__ import annotations

import ast
import importlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._C import _distributed_c10d

from nanovllm.compile.lower import torchair
from nanovllm.compile.passes.replace_ops import replace_ops
from nanovllm.compile.trace import trace
from nanovllm.kernels import collectives, ops
from nanovllm.kernels.npu import kernels as npu_kernels
from nanovllm.platforms.npu import NpuPlatform
from tests.npu import hccl
from tests.npu.ge import Ge
from tests.npu.op_runs import compare

c10d: Any = _distributed_c10d
FACTORS = (1, 10)  # rank r has FACTORS[r] / FACTORS[own rank] times what this process has


class Echo(NamedTuple):
    """A `Communicator` of two ranks, one of which is imagined."""

    rank: int
    size: int = 2
    name: str = "echo"
    peers: None = None

    def factor(self, rank: int) -> float:
        return FACTORS[rank] / FACTORS[self.rank]

    def all_reduce(self, x: Tensor) -> None:
        x *= self.factor(0) + self.factor(1)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack([x * self.factor(0), x * self.factor(1)])

    def min_int(self, value: int) -> int:
        return value


@pytest.fixture(params=[0, 1])
def rank(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """This process is one of two ranks, in eager ops and for the interpreter."""
    group = Echo(request.param)

    def all_reduce(name: str, x: Tensor) -> Tensor:
        assert name == group.name
        return x * (group.factor(0) + group.factor(1))

    def all_gather(name: str, x: Tensor, num_ranks: int) -> Tensor:
        assert (name, num_ranks) == (group.name, group.size)
        return group.all_gather(x).flatten(0, 1)

    monkeypatch.setattr(hccl, "all_reduce", all_reduce)
    monkeypatch.setattr(hccl, "all_gather", all_gather)
    with collectives.using(group):
        yield group.rank


@pytest.mark.parametrize("num_rows", [1, 19])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.usefixtures("rank")
def test_all_reduce_is_the_sum(run: Callable[..., Any], num_rows: int, has_residual: bool) -> None:
    tensors = {"x": torch.randn(num_rows, 99)}
    if has_residual:
        tensors["residual"] = torch.randn(num_rows, 99)
    compare(run, ops.all_reduce, collectives.all_reduce, tensors)


@pytest.mark.parametrize("num_columns", [18, 17])
@pytest.mark.usefixtures("rank")
def test_gathered_columns_are_in_the_order_of_ranks(
    run: Callable[..., Any], num_columns: int
) -> None:
    tensors = {"x": torch.randn(5, 9)}
    compare(run, ops.gather_columns, collectives.gather_columns, tensors, num_columns)


@pytest.mark.usefixtures("rank")
def test_a_rank_looks_up_its_own_tokens(run: Callable[..., Any]) -> None:
    """The first and last tokens of both parts; the other rank's tokens give zeros."""
    tensors = {"token": torch.tensor([0, 8, 9, 17, 3]), "table": torch.randn(9, 7)}
    compare(run, ops.shard_embedding, collectives.shard_embedding, tensors)


def test_a_graph_is_the_same_on_every_rank(ge: Ge) -> None:
    NpuPlatform().prepare()

    def region(token_T: Tensor, table_WD: Tensor) -> Tensor:
        x_TD = ops.all_reduce(ops.shard_embedding(token_T, table_WD))
        return ops.gather_columns(x_TD @ table_WD.T, 17)

    inputs: dict[str, object] = {
        "token_T": torch.zeros(3, dtype=torch.int64).npu(),
        "table_WD": torch.zeros(9, 7).npu(),
    }
    codes = []
    for rank, name in ((0, "nanovllm-0"), (1, "nanovllm-1")):
        with collectives.using(Echo(rank, name=name)):
            graph, fakes, _ = trace(region, inputs)
            graph = replace_ops(graph, fakes, table=npu_kernels.IN_GRAPH)
            codes.append(torchair.generate(graph, fakes, torchair.TorchairOptions()))
    graphs = [_serialized(code) for code in codes]
    assert graphs[0].op == graphs[1].op and "nanovllm-" not in codes[0]
    types = [op.type for op in graphs[0].op]
    assert types.count("HcomAllReduce") == types.count("HcomAllGather") == 1, types
    by_type = {op.type: op for op in graphs[0].op}
    assert by_type["HcomAllReduce"].attr["reduction"].s == b"sum"
    assert by_type["HcomAllGather"].attr["rank_size"].i == 2
    assert types.count("Data") == 3  # the inputs and the rank


def _serialized(code: str) -> Any:
    from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef

    line = next(line for line in code.splitlines() if line.startswith("serialized_graph = "))
    (found,) = ModelDef.FromString(ast.literal_eval(line.removeprefix("serialized_graph = "))).graph
    return found


def connect(folder: Path) -> Any:
    """The one rank of a group of HCCL, on the stub."""
    store = c10d.FileStore(str(folder / "store"), 1)
    return hccl.connect_hccl(store, 0, 1, "nanovllm-7", timedelta(days=30))


def test_a_communicator_gets_the_name_of_the_group(tmp_path: Path, ge: Ge) -> None:
    backend: Any = importlib.import_module("torch_npu._C._distributed_c10d")

    class Named(backend.ProcessGroupHCCL):
        """The stub's HCCL does not tell the name."""

        def get_hccl_comm_name(self, rank: int) -> str:
            return self.options.hccl_config["group_name"]

    given = {"HCCL_HOST_SOCKET_PORT_RANGE": "50000-50020"}
    with patch.dict(os.environ, given), patch.object(backend, "ProcessGroupHCCL", Named):
        group = connect(tmp_path)
        assert os.environ["HCCL_SOCKET_IFNAME"] == "=lo"
        assert os.environ["HCCL_HOST_SOCKET_PORT_RANGE"] == "50000-50020"
    assert group.options.hccl_config == {"group_name": "nanovllm-7"}
    assert group.options._timeout == timedelta(days=30)


def test_another_name_of_the_communicator_is_refused(tmp_path: Path, ge: Ge) -> None:
    with (
        patch.dict(os.environ),
        pytest.raises(ValueError, match="names its communicator '' instead of 'nanovllm-7'"),
    ):
        connect(tmp_path)
