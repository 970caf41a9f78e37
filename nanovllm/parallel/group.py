"""Collective operations of one engine's ranks: gloo on the CPU, NCCL on a GPU, HCCL on an NPU.

Each engine has its own process groups and neither uses nor affects torch.distributed's global one.
Ranks rendezvous through a file in a private folder. gloo listens on 127.0.0.1, NCCL on the loopback
interface unless NCCL_SOCKET_IFNAME is set.

On GPUs that can read each other's memory, `Group.peers` is such memory. Kernels all-reduce small
tensors through it.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch._C import _distributed_c10d

from nanovllm import env
from nanovllm.kernels.peers import Connect, OwnedPeers
from nanovllm.parallel import hccl

c10d: Any = _distributed_c10d  # its stub is incomplete, and some builds lack NCCL

# How long the ranks may take to connect, once all are present.
CONNECT_TIMEOUT = timedelta(seconds=15)
# Collectives have no timeout: a rank may compile or load while the others wait. The code that
# monitors the processes calls `abort`.
_NO_TIMEOUT = timedelta(days=30)
# Groups are numbered because a library may confuse two groups with one name in a process.
_number = itertools.count()
# NCCL's settings, unless the user has set them.
_NCCL_ENVIRONMENT = {
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_RAS_ENABLE": "0",  # else it listens on a fixed port
    # else torch ends the whole process when another rank fails, or writes traces to /tmp
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}


class Group:
    """The ranks of one engine. Every rank creates one and calls the same methods in the same order.

    On a GPU or NPU `all_reduce` and `all_gather` run on the current stream and do not wait for the
    device. On a GPU they can be captured in a CUDA graph. Destroy such graphs before `close`: NCCL
    waits for them.

    If a rank fails: on the CPU the others get an error as soon as its process has ended. On a GPU
    they wait until `abort`, and results read from the device after the failure are invalid: call
    `check` before using them.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device,
        folder: Path,
        check: Callable[[], None] = lambda: None,
        connect_peers: Connect | None = None,
    ) -> None:
        """Waits for all ranks. `folder` is private and the same for all; use it for one group.

        `check` raises an error if a rank has failed (`WorkerGroup.check`). It is called while
        waiting for the other ranks, and to explain an error of a collective. `connect_peers` makes
        memory that all ranks can read, for small tensors (`Platform.connect_peers`). Raises
        ValueError for a device without collectives, and RuntimeError if the ranks cannot connect.
        """
        backend = distributed.Backend.default_device_backend_map.get(device.type, "none")
        if backend not in _BACKENDS:
            raise ValueError(f"several ranks do not work on {device.type}: use a CPU, GPU or NPU")
        self.rank, self.size, self.device, self._check = rank, size, device, check
        self._all_reduce, self._min_reduce = _reduction(), _reduction(c10d.ReduceOp.MIN)
        self._all_gather = c10d.AllgatherOptions()
        self._all_gather.timeout, self._all_gather.asyncOp = _NO_TIMEOUT, False
        _meet(folder, rank, size, check)
        store = c10d.FileStore(str(folder / "store"), size)
        store.set_timeout(CONNECT_TIMEOUT)
        if rank == 0:
            store.set("name", f"nanovllm-{next(_number)}")
        self.name: str = store.get("name").decode()
        with self._explained():
            self._backend: Any = _BACKENDS[backend](store, rank, size, self.name)
            self.barrier()  # connects, which is impossible during graph capture
        self.peers: OwnedPeers | None = None
        if connect_peers is not None and not env.read().disable_peer_memory:
            self.peers = connect_peers(rank, size, self.all_gather, self._agree)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Replace contiguous x by its sum over the ranks, bit-identical on each. Returns x."""
        return self._reduced(x, self._all_reduce)

    def all_gather(self, x: Tensor) -> Tensor:
        """x of every rank, [size, *x.shape]; x has the same shape on all ranks."""
        out = x.new_empty(self.size, *x.shape)
        with self._explained():
            flat = x.contiguous().view(-1)
            _wait(self._backend._allgather_base(out.view(-1), flat, self._all_gather))
        return out

    def min_int(self, value: int) -> int:
        """The smallest value of all ranks. Waits for all of them and for the device."""
        number = torch.tensor([value], dtype=torch.int64, device=self.device)
        self._reduced(number, self._min_reduce)
        with self._explained():
            least = int(number.item())
        self._check()  # after `abort` the number is undefined
        return least

    def barrier(self) -> None:
        """Wait until all ranks are here and their devices have finished earlier work."""
        self.min_int(0)

    def abort(self) -> None:
        """Stop waiting for the other ranks. May be called from any thread.

        On a GPU it ends the running collective. On the CPU nothing needs to be done: the end of the
        other rank does that. It waits at most a second: NCCL cannot finish while a captured graph
        exists.
        """
        self._abort(seconds=1.0)

    def close(self) -> None:
        """Release the connections and NCCL's memory. Waits for no other rank."""
        self._abort(seconds=5.0)
        self._backend = None
        if self.peers is not None:
            memory, self.peers = self.peers, None
            # a device that never finishes must not block the end of the process
            thread = threading.Thread(target=memory.close, name="close", daemon=True)
            thread.start()
            thread.join(5.0)

    def _abort(self, seconds: float) -> None:
        if self._backend is None:
            return
        if self.peers is not None:
            self.peers.stop()
        thread = threading.Thread(target=self._backend.abort, name="abort", daemon=True)
        thread.start()
        thread.join(seconds)

    def _agree(self, says_yes: bool) -> bool:
        return self.min_int(int(says_yes)) == 1

    def _reduced(self, x: Tensor, options: Any) -> Tensor:
        assert x.is_contiguous()
        with self._explained():
            _wait(self._backend.allreduce([x], options))
        return x

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn errors caused by a failed rank into the error of `check`."""
        try:
            yield
        except RuntimeError:
            # a connection closes shortly before the end of its process is detected
            for _ in range(100):
                self._check()
                time.sleep(0.02)
            raise


def _meet(folder: Path, rank: int, size: int, check: Callable[[], None]) -> None:
    """Wait until all ranks are here, or `check` raises.

    torch's own waiting could not be interrupted when a rank ends.
    """
    (folder / f"rank-{rank}").touch()
    missing = {folder / f"rank-{other}" for other in range(size)}
    while missing := {path for path in missing if not path.exists()}:
        check()
        time.sleep(0.005)


def _reduction(op: Any = c10d.ReduceOp.SUM) -> Any:
    options = c10d.AllreduceOptions()
    # without asyncOp it runs on the current stream, and the host does not wait
    options.reduceOp, options.timeout, options.asyncOp = op, _NO_TIMEOUT, False
    return options


def _wait(work: Any) -> None:
    """Wait for gloo's work, and make the current stream wait for HCCL's. NCCL returns none: its
    work is on the current stream."""
    if work is not None:
        work.wait()


def _gloo(store: Any, rank: int, size: int, name: str) -> Any:
    group = c10d.ProcessGroupGloo
    options = group._Options()
    options._devices = [group.create_device(hostname="127.0.0.1", lazy_init=False)]
    options._timeout = CONNECT_TIMEOUT
    return group(store, rank, size, options)


def _nccl(store: Any, rank: int, size: int, name: str) -> Any:
    for variable, value in _NCCL_ENVIRONMENT.items():
        env.set_default(variable, value)
    group = c10d.ProcessGroupNCCL
    options = group.Options()
    options._timeout = _NO_TIMEOUT
    return group(store, rank, size, options)


def _hccl(store: Any, rank: int, size: int, name: str) -> Any:
    return hccl.connect(store, rank, size, name, _NO_TIMEOUT)


_BACKENDS: dict[str, Callable[[Any, int, int, str], Any]] = {
    "gloo": _gloo,
    "nccl": _nccl,
    "hccl": _hccl,
}
