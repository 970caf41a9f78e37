"""Replaces HCCL by gloo on the memory that the stub's npu tensors have.

It carries out what a `Group` asks of its backend, op by op and in captured graphs, and the ops
HcomAllReduce and HcomAllGather of Ascend IR, which name a group.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C import _distributed_c10d

from nanovllm.parallel import hccl
from tests.npu.host import Host, host_view

c10d: Any = _distributed_c10d

connect_hccl = hccl.connect  # the real one
groups: dict[str, Any] = {}  # those of this process by name, as gloo's process groups


class Backend:
    """What `Group` uses of torch_npu's ProcessGroupHCCL, for npu tensors."""

    def __init__(self, gloo: Any, host: Host) -> None:
        self._gloo, self._host = gloo, host

    def allreduce(self, tensors: list[Tensor], options: Any) -> None:
        (x,) = tensors
        assert x.device.type == "npu"

        def run() -> None:
            self._gloo.allreduce([host_view(x)], options).wait()

        self._run(run)

    def _allgather_base(self, out: Tensor, x: Tensor, options: Any) -> None:
        assert out.device.type == x.device.type == "npu"

        def run() -> None:
            self._gloo._allgather_base(host_view(out), host_view(x), options).wait()

        self._run(run)

    def abort(self) -> None:
        self._gloo.abort()

    def _run(self, run: Any) -> None:
        run()
        self._host.record(run)


def install(host: Host, monkeypatch: Any) -> None:
    def connect(store: Any, rank: int, size: int, name: str, timeout: timedelta) -> Backend:
        options = c10d.ProcessGroupGloo._Options()
        options._devices = [c10d.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=60)
        groups[name] = c10d.ProcessGroupGloo(store, rank, size, options)
        return Backend(groups[name], host)

    monkeypatch.setattr(hccl, "connect", connect)


def all_reduce(group: str, x: Tensor) -> Tensor:
    """HcomAllReduce with reduction "sum"."""
    out = x.clone(memory_format=torch.contiguous_format)
    groups[group].allreduce([out], c10d.AllreduceOptions()).wait()
    return out


def all_gather(group: str, x: Tensor, num_ranks: int) -> Tensor:
    """HcomAllGather: the rows of all ranks, one rank's after the other's."""
    assert groups[group].size() == num_ranks
    out = x.new_empty(num_ranks * x.shape[0], *x.shape[1:])
    groups[group]._allgather_base(out, x.contiguous(), c10d.AllgatherOptions()).wait()
    return out
