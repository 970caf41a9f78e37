"""GPU memory that the other ranks of the host read and write, through CUDA's driver API.

Every rank allocates a region and gives the others a handle of it (CUDA's inter-process handles: 64
bytes, valid only for processes of this user on this machine). The others map it. No multicast is
used. Only its own GPU is visible to a rank, which is enough: a mapping needs no visible device.
"""

from __future__ import annotations

import ctypes
import logging
import socket
import sys
from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels import peers
from nanovllm.kernels.peers import Agree, Gather

logger = logging.getLogger(__name__)

_LIBRARY = "libcuda.so.1"
_HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
_FOR_ALL_CONTEXTS, _MAPPED = 1, 2  # CU_MEMHOSTALLOC_PORTABLE, CU_MEMHOSTALLOC_DEVICEMAP
_STOP_BYTES = 4096
_HOST_BYTES = 64  # for the name of the machine


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * _HANDLE_BYTES)]


_ADDRESS, _POINTER = ctypes.c_uint64, ctypes.c_void_p
_SIGNATURES: dict[str, list[Any]] = {
    "cuMemAlloc_v2": [ctypes.POINTER(_ADDRESS), ctypes.c_size_t],
    "cuMemFree_v2": [_ADDRESS],
    "cuMemsetD8_v2": [_ADDRESS, ctypes.c_ubyte, ctypes.c_size_t],
    "cuIpcGetMemHandle": [ctypes.POINTER(_Handle), _ADDRESS],
    "cuIpcOpenMemHandle_v2": [ctypes.POINTER(_ADDRESS), _Handle, ctypes.c_uint],
    "cuIpcCloseMemHandle": [_ADDRESS],
    "cuMemHostAlloc": [ctypes.POINTER(_POINTER), ctypes.c_size_t, ctypes.c_uint],
    "cuMemFreeHost": [_POINTER],
}


class PeersUnavailable(RuntimeError):
    """The GPUs cannot read each other's memory; the message has the reason."""


class _Driver:
    """Calls of CUDA's driver in the current context. Raises Unavailable for one that fails."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(_LIBRARY)
            for name, arguments in _SIGNATURES.items():
                function = getattr(self._library, name)
                function.argtypes, function.restype = arguments, ctypes.c_int
        except (OSError, AttributeError) as error:
            raise PeersUnavailable(f"CUDA's driver cannot be called: {error}") from error

    def __call__(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise PeersUnavailable(f"{name} failed with CUDA error {code}")


class PeerMemory:
    """The regions of all ranks (`kernels.peers.OwnedPeers`)."""

    def __init__(self, rank: int, num_ranks: int, device: torch.device) -> None:
        """Allocates this rank's region. Raises Unavailable."""
        self.rank, self.num_ranks, self._device = rank, num_ranks, device
        self._mapped: list[int] = []
        self._own = self._stop = 0
        torch.cuda.synchronize(device)  # makes the device's context current
        self._driver = _Driver()
        address, host = _ADDRESS(), _POINTER()
        try:
            self._driver("cuMemAlloc_v2", ctypes.byref(address), peers.REGION_BYTES)
            self._own = address.value
            num_zeros = peers.WORDS_AT
            self._driver("cuMemsetD8_v2", self._own, 0, num_zeros)
            num_words_bytes = peers.REGION_BYTES - num_zeros
            self._driver("cuMemsetD8_v2", self._own + num_zeros, 0xFF, num_words_bytes)
            flags = _FOR_ALL_CONTEXTS | _MAPPED
            self._driver("cuMemHostAlloc", ctypes.byref(host), _STOP_BYTES, flags)
            assert host.value is not None
            self._stop = host.value
            ctypes.memset(self._stop, 0, _STOP_BYTES)
            torch.cuda.synchronize(device)  # the zeros are written before another rank writes
        except BaseException:
            self.close()
            raise

    def handle(self) -> Tensor:
        """The handle with which another rank maps this region, on the device. Raises
        Unavailable."""
        found = _Handle()
        self._driver("cuIpcGetMemHandle", ctypes.byref(found), self._own)
        return torch.tensor(list(found.reserved), dtype=torch.uint8, device=self._device)

    def map(self, handles: Tensor) -> None:
        """Map the regions of the other ranks: [num_ranks, bytes]. Raises Unavailable."""
        addresses = []
        for rank, content in enumerate(handles.cpu().tolist()):
            address = _ADDRESS(self._own)
            if rank != self.rank:
                handle = _Handle((ctypes.c_ubyte * _HANDLE_BYTES)(*content))
                self._driver(
                    "cuIpcOpenMemHandle_v2", ctypes.byref(address), handle, _LAZY_PEER_ACCESS
                )
                self._mapped.append(address.value)
            addresses.append(address.value)
        numbers = [*addresses, self.rank, self._own, self._stop]
        self.table = torch.tensor(numbers, dtype=torch.int64, device=self._device)

    def write_probe(self) -> None:
        """Write a number to each rank's region, for `check_probe`."""
        for rank in range(self.num_ranks):
            self._numbers(rank)[self.rank] = 1000 * self.rank + rank + 1
        torch.cuda.synchronize(self._device)

    def check_probe(self) -> None:
        """Check the numbers of all ranks: some machines' buses lose writes. Raises Unavailable."""
        found = [self._numbers(rank).tolist()[: self.num_ranks] for rank in range(self.num_ranks)]
        ranks = range(self.num_ranks)
        if found != [[1000 * writer + rank + 1 for writer in ranks] for rank in ranks]:
            raise PeersUnavailable(f"numbers that GPUs wrote to each other arrived as {found}")

    def clear_probe(self) -> None:
        """Reset the flags to zero."""
        self._numbers(self.rank).zero_()
        torch.cuda.synchronize(self._device)

    def stop(self) -> None:
        """Make kernels stop waiting for other ranks, from now on. Any thread may call it."""
        if self._stop:
            ctypes.c_int32.from_address(self._stop).value = 1

    def close(self) -> None:
        """Free the memory after all launched work is done."""
        self.stop()
        torch.cuda.synchronize(self._device)
        for address in self._mapped:
            self._driver("cuIpcCloseMemHandle", address)
        own, stop, self._mapped, self._own, self._stop = self._own, self._stop, [], 0, 0
        if own:
            self._driver("cuMemFree_v2", own)
        if stop:
            self._driver("cuMemFreeHost", stop)

    def _numbers(self, rank: int) -> Tensor:
        """The first flags of a rank's region, as int32."""
        address = int(self.table[rank])
        num_bytes = 4 * peers.MAX_RANKS
        storage = torch._C._construct_storage_from_data_pointer(address, self._device, num_bytes)
        return torch.empty(0, dtype=torch.int32, device=self._device).set_(storage)


def problem(num_ranks: int, device: torch.device, gather: Gather) -> str | None:
    """Why the ranks cannot share memory, from checks before trying; None if none fails."""
    if device.type != "cuda" or torch.version.hip is not None or sys.platform != "linux":
        return "it needs NVIDIA GPUs under Linux"
    if num_ranks not in peers.NUM_RANKS:
        return f"there are {num_ranks} ranks, not one of {peers.NUM_RANKS}"
    name = socket.gethostname().encode()[:_HOST_BYTES].ljust(_HOST_BYTES)
    names = gather(torch.tensor(list(name), dtype=torch.uint8, device=device))
    return None if bool((names == names[0]).all()) else "the ranks are on several machines"


def connect(
    rank: int, num_ranks: int, device: torch.device, gather: Gather, agree: Agree
) -> PeerMemory | None:
    """The regions of all ranks, or None where that is impossible; logs the reason.

    All ranks call it at the same time, and all get regions or all get None.
    """
    why = problem(num_ranks, device, gather)
    if why is None:
        memory, why = _connected(rank, num_ranks, device, gather, agree)
        if memory is not None:
            return memory
    logger.info("NCCL does all sums over ranks, without memory that GPUs share: %s", why)
    return None


def _connected(
    rank: int, num_ranks: int, device: torch.device, gather: Gather, agree: Agree
) -> tuple[PeerMemory | None, str]:
    """The regions, or None and the reason. When a step fails on one rank, all ranks stop after
    it."""
    memory, why = None, ""
    handle = torch.zeros(_HANDLE_BYTES, dtype=torch.uint8, device=device)
    try:
        memory = PeerMemory(rank, num_ranks, device)
        handle = memory.handle()
    except PeersUnavailable as error:
        why = str(error)
    handles = gather(handle)
    if not agree(not why) or memory is None:
        return _given_up(memory, why)
    # after each step all ranks wait for each other
    steps = (lambda: memory.map(handles), memory.write_probe, memory.check_probe)
    for step in (*steps, memory.clear_probe):
        try:
            step()
        except RuntimeError as error:  # of this file or of torch
            why = str(error)
        if not agree(not why):
            return _given_up(memory, why)
    return memory, ""


def _given_up(memory: PeerMemory | None, why: str) -> tuple[None, str]:
    if memory is not None:
        memory.close()
    return None, why or "another rank could not"
