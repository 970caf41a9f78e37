"""Ranks exchange regions, and either all have them or none. Memory and driver are stand-ins."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nanovllm.kernels import peers
from nanovllm.platforms import cuda_peers
from tests.models.thread_ranks import ThreadGroup, on_ranks

CPU = torch.device("cpu")


class Machine:
    """Memory of all ranks, which are threads. A handle is the number of an allocation."""

    def __init__(self, fails: str = "", loses_writes: bool = False) -> None:
        self.memory: dict[int, Any] = {}
        self.fails, self.loses_writes, self.num_opened, self.num_calls = fails, loses_writes, 0, 0

    def __call__(self, name: str, *arguments: Any) -> None:
        if name == self.fails:
            self.num_calls += 1
            if self.num_calls == 1:  # on one rank alone
                raise cuda_peers.PeersUnavailable(f"{name} failed with CUDA error 217")
        getattr(self, name)(*arguments)

    def cuMemAlloc_v2(self, found: Any, num_bytes: int) -> None:
        memory = ctypes.create_string_buffer(num_bytes)
        found._obj.value = ctypes.addressof(memory)
        self.memory[found._obj.value] = memory

    def cuMemHostAlloc(self, found: Any, num_bytes: int, flags: int) -> None:
        self.cuMemAlloc_v2(found, num_bytes)

    def cuMemsetD8_v2(self, address: int, value: int, num_bytes: int) -> None:
        ctypes.memset(address, value, num_bytes)

    def cuIpcGetMemHandle(self, found: Any, address: int) -> None:
        found._obj.reserved[:8] = list(address.to_bytes(8, "little"))

    def cuIpcOpenMemHandle_v2(self, found: Any, handle: Any, flags: int) -> None:
        self.num_opened += 1
        found._obj.value = int.from_bytes(bytes(handle.reserved[:8]), "little")
        if self.loses_writes:  # a copy, as if the bus did not reach the memory
            self.cuMemAlloc_v2(found, peers.REGION_BYTES)

    def cuIpcCloseMemHandle(self, address: int) -> None:
        self.num_opened -= 1

    def cuMemFree_v2(self, address: int) -> None:
        del self.memory[address]

    def cuMemFreeHost(self, address: int) -> None:
        del self.memory[address]


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    yield


def connected(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, num_ranks: int
) -> list[tuple[cuda_peers.PeerMemory | None, str]]:
    monkeypatch.setattr(cuda_peers, "_Driver", lambda: machine)

    def work(group: ThreadGroup) -> tuple[cuda_peers.PeerMemory | None, str]:
        return cuda_peers._connected(
            group.rank, num_ranks, CPU, group.all_gather, lambda yes: group.min_int(int(yes)) == 1
        )

    return on_ranks(num_ranks, work)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_all_ranks_get_the_regions_of_all_in_the_order_of_ranks(
    monkeypatch: pytest.MonkeyPatch, num_ranks: int
) -> None:
    machine = Machine()
    memories = [memory for memory, _ in connected(monkeypatch, machine, num_ranks)]
    tables = []
    for rank, memory in enumerate(memories):
        assert memory is not None
        tables.append(memory.table.tolist())
        assert tables[rank][: num_ranks + 1] == [*tables[0][:num_ranks], rank]
        assert tables[rank][num_ranks + 1] == tables[rank][rank]
        region = (ctypes.c_byte * peers.REGION_BYTES).from_address(tables[rank][rank])
        content = torch.frombuffer(region, dtype=torch.int8)
        assert not content[: peers.WORDS_AT].any(), "zeros at the start"
        assert (content[peers.WORDS_AT :] == -1).all(), "no launch's number"
        stop = ctypes.c_int32.from_address(tables[rank][num_ranks + 2])
        assert stop.value == 0
        memory.stop()
        assert stop.value == 1
    for memory in memories:
        assert memory is not None
        memory.close()
        memory.close()
    assert machine.num_opened == 0 and not machine.memory


@pytest.mark.parametrize(
    "step", ["cuMemAlloc_v2", "cuMemHostAlloc", "cuIpcGetMemHandle", "cuIpcOpenMemHandle_v2"]
)
def test_a_step_that_fails_on_one_rank_leaves_none_with_regions(
    monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    machine = Machine(fails=step)
    results = connected(monkeypatch, machine, 2)
    assert [memory for memory, _ in results] == [None, None]
    assert {why for _, why in results} == {
        f"{step} failed with CUDA error 217",
        "another rank could not",
    }
    assert machine.num_opened == 0 and not machine.memory


def test_a_bus_that_loses_numbers_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    results = connected(monkeypatch, Machine(loses_writes=True), 2)
    assert all(memory is None and "arrived as" in why for memory, why in results)


def test_other_devices_and_numbers_of_ranks_say_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "nanovllm"):
        assert cuda_peers.connect(0, 2, CPU, lambda x: x, lambda yes: yes) is None
    assert "it needs NVIDIA GPUs under Linux" in caplog.text
    why = cuda_peers.problem(3, torch.device("cuda", 0), lambda x: x)
    assert why == "there are 3 ranks, not one of (2, 4, 8)"
