"""Memory through CUDA's driver API, called through ctypes.

Device memory behind fixed addresses can be unmapped, and mapped again in the same place. Captured
graphs contain the addresses of weights and cache. So a sleeping engine must free the memory and
keep the addresses, which the driver manages separately ("virtual memory management" in the CUDA
driver API reference).

Pinned host memory has the same address on the device, which reads it over the bus ("unified
addressing").
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nanovllm.platforms.accelerator import pinned_if_possible
from nanovllm.platforms.regions import SplitRegion, TensorRegion

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
ALIGNMENT = 512  # bytes, as in torch's allocator: kernels choose loads by alignment
CHUNK_BYTES = 32 << 20  # the least memory that a region maps at a time
PIECE_BYTES = 64 << 20  # on the host: a power of two, to which torch rounds pinned memory up

# Constants of cuda.h.
PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED
ON_DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE
READ_WRITE = 3  # CU_MEM_ACCESS_FLAGS_PROT_READWRITE
MINIMUM = 0  # CU_MEM_ALLOC_GRANULARITY_MINIMUM
FOR_ALL_CONTEXTS, MAPPED = 1, 2  # CU_MEMHOSTALLOC_PORTABLE, CU_MEMHOSTALLOC_DEVICEMAP
OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _AllocationFlags(ctypes.Structure):
    _fields_ = [
        ("compression_type", ctypes.c_ubyte),
        ("gpu_direct_rdma_capable", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    ]


class _AllocationProperties(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("requested_handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32_handle_meta_data", ctypes.c_void_p),
        ("flags", _AllocationFlags),
    ]


class _AccessDescription(ctypes.Structure):
    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


_PROPERTIES, _ACCESS = ctypes.POINTER(_AllocationProperties), ctypes.POINTER(_AccessDescription)
_ADDRESS, _HANDLE, _FLAGS = ctypes.c_ulonglong, ctypes.c_ulonglong, ctypes.c_ulonglong
_SIZE = ctypes.c_size_t
_SIGNATURES: dict[str, list[Any]] = {
    "cuMemGetAllocationGranularity": [ctypes.POINTER(_SIZE), _PROPERTIES, ctypes.c_int],
    "cuMemAddressReserve": [ctypes.POINTER(_ADDRESS), _SIZE, _SIZE, _ADDRESS, _FLAGS],
    "cuMemAddressFree": [_ADDRESS, _SIZE],
    "cuMemCreate": [ctypes.POINTER(_HANDLE), _SIZE, _PROPERTIES, _FLAGS],
    "cuMemRelease": [_HANDLE],
    "cuMemMap": [_ADDRESS, _SIZE, _SIZE, _HANDLE, _FLAGS],
    "cuMemUnmap": [_ADDRESS, _SIZE],
    "cuMemSetAccess": [_ADDRESS, _SIZE, _ACCESS, _SIZE],
    "cuMemHostAlloc": [ctypes.POINTER(ctypes.c_void_p), _SIZE, ctypes.c_uint],
    "cuMemFreeHost": [ctypes.c_void_p],
}


class DriverError(RuntimeError):
    """A call of the driver failed with this CUresult."""

    def __init__(self, call: str, code: int) -> None:
        super().__init__(f"{call} failed with CUDA error {code}")
        self.code = code


class Driver:
    """The calls of CUDA's driver for one device. Raises DriverError for one that fails."""

    def __init__(self, device: torch.device, library: str = LIBRARY) -> None:
        self.device = device
        self.synchronize()  # makes the device's context current, which the calls need
        found = ctypes.CDLL(library)
        self._functions: dict[str, Any] = {}
        for name, arguments in _SIGNATURES.items():
            function = getattr(found, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
            self._functions[name] = function
        location = _Location(ON_DEVICE, device.index)
        self._properties = _AllocationProperties(type=PINNED, location=location)
        self._access = _AccessDescription(location=location, flags=READ_WRITE)

    def granularity(self) -> int:
        """Sizes and addresses of mappings are multiples of this number of bytes."""
        found = _SIZE()
        properties = ctypes.byref(self._properties)
        self._call("cuMemGetAllocationGranularity", ctypes.byref(found), properties, MINIMUM)
        return found.value

    def reserve(self, num_bytes: int) -> int:
        """Reserve addresses without memory; returns the first one."""
        found = _ADDRESS()
        self._call("cuMemAddressReserve", ctypes.byref(found), num_bytes, 0, 0, 0)
        return found.value

    def free(self, address: int, num_bytes: int) -> None:
        """Release reserved addresses. Nothing may be mapped there."""
        self._call("cuMemAddressFree", address, num_bytes)

    def map(self, address: int, num_bytes: int) -> None:
        """Map new memory at addresses. Raises torch.OutOfMemoryError."""
        handle = self._create(num_bytes)
        try:
            self._call("cuMemMap", address, num_bytes, 0, handle, 0)
        finally:
            self._call("cuMemRelease", handle)  # the memory stays as long as it is mapped
        try:
            self._call("cuMemSetAccess", address, num_bytes, ctypes.byref(self._access), 1)
        except DriverError:
            self.unmap(address, num_bytes)
            raise

    def unmap(self, address: int, num_bytes: int) -> None:
        """Free the memory mapped by one call of `map` with the same range."""
        self._call("cuMemUnmap", address, num_bytes)

    def pin(self, num_bytes: int) -> int:
        """Allocate host memory that the device can read; returns its address, the same for both.

        Raises torch.OutOfMemoryError.
        """
        found = ctypes.c_void_p()
        try:
            flags = FOR_ALL_CONTEXTS | MAPPED
            self._call("cuMemHostAlloc", ctypes.byref(found), num_bytes, flags)
        except DriverError as error:
            if error.code != OUT_OF_MEMORY:
                raise
            message = f"the host has no {num_bytes / 2**20:.0f} MiB left that can be pinned"
            raise torch.OutOfMemoryError(message) from error
        assert found.value is not None
        return found.value

    def unpin(self, address: int) -> None:
        """Free memory allocated by `pin`."""
        self._call("cuMemFreeHost", address)

    def _create(self, num_bytes: int) -> int:
        try:
            return self._create_once(num_bytes)
        except DriverError as error:
            if error.code != OUT_OF_MEMORY:
                raise
        self.release_unused()
        try:
            return self._create_once(num_bytes)
        except DriverError as error:
            if error.code != OUT_OF_MEMORY:
                raise
            message = f"{self.device} has no {num_bytes / 2**20:.0f} MiB left for weights or cache"
            raise torch.OutOfMemoryError(message) from error

    def _create_once(self, num_bytes: int) -> int:
        handle = _HANDLE()
        self._call(
            "cuMemCreate", ctypes.byref(handle), num_bytes, ctypes.byref(self._properties), 0
        )
        return handle.value

    def _call(self, name: str, *arguments: Any) -> None:
        code = self._functions[name](*arguments)
        if code:
            raise DriverError(name, code)

    # through torch ----------------------------------------------------------------------------

    def total_bytes(self) -> int:
        """The device's memory."""
        return int(torch.cuda.get_device_properties(self.device).total_memory)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def release_unused(self) -> None:
        """Return the cached memory of torch's allocator to the device."""
        torch.cuda.empty_cache()

    def release_unused_on_host(self) -> None:
        """Return the cached pinned memory of torch's allocator to the system."""
        torch._C._host_emptyCache()

    def host_bytes(self, num_bytes: int) -> Tensor:
        return pinned_if_possible(num_bytes)


class MappedRegion(TensorRegion):
    """Consecutive tensors in a range of addresses, with memory mapped in chunks.

    The range is larger than the device's memory, so that chunks can be added for further tensors.
    """

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver.device)
        self._driver = driver
        self._granularity = driver.granularity()
        self._num_reserved = _round_up(2 * driver.total_bytes(), self._granularity)
        self._address: int | None = driver.reserve(self._num_reserved)
        self._chunks: list[tuple[int, int]] = []  # address and bytes of each mapping
        self._chunks_end = self._tensors_end = self._address
        self._is_mapped = True
        self._saved: list[Tensor] = []  # pieces of the contents, on the host

    def __del__(self) -> None:
        if hasattr(self, "_saved") and not sys.is_finalizing():
            self.close()

    @property
    def mapped_bytes(self) -> int:
        """The region's device memory."""
        return sum(size for _, size in self._chunks) if self._is_mapped else 0

    def place(self, tensor: Tensor) -> Tensor:
        return super().place(self._empty(tensor.shape, tensor.dtype).copy_(tensor))

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return super().place(self._empty(shape, dtype).zero_())

    def drop(self, *, keep: bool) -> None:
        if not self._is_mapped:
            if not keep:
                self._saved = []
            return
        self._driver.synchronize()
        saved = self._save() if keep else []
        self._unmap(self._chunks)
        self._is_mapped, self._saved = False, saved
        self._driver.release_unused()

    def take_back(self) -> bool:
        if self._is_mapped:
            return True
        done: list[tuple[int, int]] = []
        try:
            for address, size in self._chunks:
                self._driver.map(address, size)
                done.append((address, size))
        except BaseException:
            self._unmap(done)
            raise
        self._is_mapped = True
        if not self._saved:
            return False
        for target, piece in zip(self._pieces(), self._saved):
            target.copy_(piece, non_blocking=True)
        self._driver.synchronize()
        self._saved = []
        return True

    def close(self) -> None:
        super().close()
        if self._address is None:
            return
        address, self._address = self._address, None
        self._driver.synchronize()
        if self._is_mapped:
            self._unmap(self._chunks)
        self._is_mapped, self._saved = False, []
        self._driver.free(address, self._num_reserved)
        self._driver.release_unused_on_host()

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor after the last one. Adds a chunk if it does not fit."""
        start = self._tensors_end
        end = start + _round_up(math.prod(shape) * dtype.itemsize, ALIGNMENT)
        if end > self._chunks_end:
            size = _round_up(max(end - self._chunks_end, CHUNK_BYTES), self._granularity)
            self._driver.map(self._chunks_end, size)
            self._chunks.append((self._chunks_end, size))
            self._chunks_end += size
        self._tensors_end = end
        return _tensor_at(start, shape, dtype, self.device)

    def _save(self) -> list[Tensor]:
        """Copy the contents to the host."""
        saved = []
        for piece in self._pieces():
            host = self._driver.host_bytes(piece.nbytes)
            saved.append(host.copy_(piece, non_blocking=True))
        self._driver.synchronize()
        return saved

    def _pieces(self) -> list[Tensor]:
        """The bytes of all tensors, in pieces within one chunk each."""
        found = []
        for address, size in self._chunks:
            end = min(address + size, self._tensors_end)
            for start in range(address, end, PIECE_BYTES):
                num_bytes = min(PIECE_BYTES, end - start)
                found.append(_tensor_at(start, (num_bytes,), torch.uint8, self.device))
        return found

    def _unmap(self, chunks: Sequence[tuple[int, int]]) -> None:
        for address, size in chunks:
            self._driver.unmap(address, size)


class PinnedRegion(SplitRegion):
    """The host's part is pinned memory, which the device reads over the bus at its own address."""

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver.device)
        self._driver = driver
        self._addresses: list[int] = []

    def __del__(self) -> None:
        if hasattr(self, "_addresses") and not sys.is_finalizing():
            self.close()

    def host_empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        self._addresses.append(self._driver.pin(num_bytes))
        memory = (ctypes.c_byte * num_bytes).from_address(self._addresses[-1])
        return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))

    def seen(self, tensor: Tensor) -> Tensor:
        return _tensor_at(tensor.data_ptr(), tensor.shape, tensor.dtype, self.device)

    def close(self) -> None:
        addresses, self._addresses = self._addresses, []
        if addresses:
            self._driver.synchronize()
        for address in addresses:
            self._driver.unpin(address)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _tensor_at(
    address: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A tensor, with a separate storage, over memory that the caller keeps alive.

    `__cuda_array_interface__` would query the driver for the device of the address.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    storage = torch._C._construct_storage_from_data_pointer(address, device, num_bytes)
    return torch.empty(0, dtype=dtype, device=device).set_(storage).view(tuple(shape))
