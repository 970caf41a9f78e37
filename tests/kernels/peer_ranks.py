"""Ranks as forks of this process, with regions in shared memory: kernels in Triton's interpreter.

A fork has its parent's addresses, so all ranks use one table of addresses. They run at the same
time and wait for each other's flags, as on GPUs.
"""

from __future__ import annotations

import mmap
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.kernels import collectives, peers

SECONDS = 90.0


@dataclass(frozen=True)
class ForkedPeers:
    """A `Peers`."""

    num_ranks: int
    table: Tensor


@dataclass(frozen=True)
class ForkedGroup:
    """A `Communicator` that can communicate through the regions alone."""

    rank: int
    size: int
    peers: ForkedPeers
    name: str = ""

    def all_reduce(self, x: Tensor) -> None:
        raise AssertionError("too large for the regions")

    def all_gather(self, x: Tensor) -> Tensor:
        raise AssertionError("too large for the regions")

    def min_int(self, value: int) -> int:
        raise AssertionError


def shared(num_bytes: int) -> Tensor:
    """Zeroed bytes that this process and its forks share."""
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)


class Regions:
    """The regions of `num_ranks` ranks."""

    def __init__(self, num_ranks: int, counter: int = 0) -> None:
        """`counter`: the even number from which counters and flags go on."""
        self.num_ranks = num_ranks
        self.stop = shared(4096).view(torch.int32)
        self.memory = [shared(peers.REGION_BYTES) for _ in range(num_ranks)]
        for memory in self.memory:
            memory[: peers.DATA_AT].view(torch.int32).fill_(counter)
            # what no rank has written must not be read
            memory[peers.DATA_AT :].fill_(0xFF)

    def group(self, rank: int) -> ForkedGroup:
        addresses = [memory.data_ptr() for memory in self.memory]
        table = torch.tensor([*addresses, rank, addresses[rank], self.stop.data_ptr()])
        return ForkedGroup(rank, self.num_ranks, ForkedPeers(self.num_ranks, table))

    def run(self, work: Callable[[int], Tensor], ranks: tuple[int, ...] = ()) -> list[Tensor]:
        """What `work(rank)`, at most 1 MiB, returns on each rank, or on `ranks` alone."""
        results = [shared(1 << 20) for _ in range(self.num_ranks)]
        found: list[Tensor] = []
        pids = [self._fork(rank, work, results[rank]) for rank in ranks or range(self.num_ranks)]
        _wait_for(pids)
        for rank in ranks or range(self.num_ranks):
            num, kind = results[rank][:16].view(torch.int64).tolist()
            dtype = DTYPES[kind]
            found.append(results[rank][16 : 16 + num * dtype.itemsize].view(dtype).clone())
        return found

    def _fork(self, rank: int, work: Callable[[int], Tensor], result: Tensor) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            torch.set_num_threads(1)
            with collectives.using(self.group(rank)):
                out = work(rank).flatten()
            result[:16].view(torch.int64).copy_(
                torch.tensor([out.numel(), DTYPES.index(out.dtype)])
            )
            result[16 : 16 + out.nbytes].copy_(out.view(torch.uint8))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64]


def _wait_for(pids: list[int]) -> None:
    """Wait until all processes have ended well; an error or a long wait kills them."""
    deadline, waiting = time.monotonic() + SECONDS, list(pids)
    try:
        while waiting:
            assert time.monotonic() < deadline, f"ranks wait for more than {SECONDS} s"
            for pid in list(waiting):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    waiting.remove(pid)
                    assert status == 0, "a rank has failed"
            time.sleep(0.002)
    finally:
        for pid in waiting:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
