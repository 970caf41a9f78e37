"""Regions behind fixed addresses, over a stub of CUDA's driver that includes the real header."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm import LLM
from nanovllm.compile.trace import tensors
from nanovllm.kernels.cpu import build
from nanovllm.platforms import cuda_memory
from nanovllm.platforms.cpu import CpuPlatform
from nanovllm.platforms.cuda_memory import Driver, DriverError, MappedRegion, PinnedRegion
from tests.engines import greedy, random_prompts, tokens

MIB = 1 << 20
STUB = Path(__file__).with_name("driver_stub.cpp")


class StubDriver(Driver):
    """The calls go to the stub, and tensors lie in the host's memory."""

    num_released = num_released_on_host = 0

    def __init__(self, library: Path) -> None:
        super().__init__(torch.device("cuda", 3), str(library))
        self.device = torch.device("cpu")
        self.stub = ctypes.CDLL(str(library))
        self.stub.stub_used_bytes.restype = self.stub.stub_pinned_bytes.restype = ctypes.c_size_t
        self.stub.stub_set_capacity.argtypes = [ctypes.c_size_t]
        self.set_capacity(1 << 40)

    def used_bytes(self) -> int:
        return int(self.stub.stub_used_bytes())

    def set_capacity(self, num_bytes: int) -> None:
        self.stub.stub_set_capacity(num_bytes)

    def total_bytes(self) -> int:
        return 1 << 30

    def synchronize(self) -> None:
        pass

    def release_unused(self) -> None:
        self.num_released += 1

    def release_unused_on_host(self) -> None:
        self.num_released_on_host += 1

    def host_bytes(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    triton = importlib.util.find_spec("triton")
    assert triton is not None and triton.origin is not None
    header = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    out = tmp_path_factory.mktemp("stub") / "libstub.so"
    compiler = next(filter(None, map(shutil.which, build.COMPILERS)))
    flags = ["-std=c++17", "-shared", "-fPIC", "-I", str(header)]
    subprocess.run([compiler, *flags, str(STUB), "-o", str(out)], check=True)
    return out


@pytest.fixture
def driver(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubDriver]:
    monkeypatch.setattr(cuda_memory, "CHUNK_BYTES", 2 * MIB)
    monkeypatch.setattr(cuda_memory, "PIECE_BYTES", MIB)
    driver = StubDriver(library)
    yield driver
    gc.collect()
    assert driver.used_bytes() == 0 and driver.stub.stub_reserved_ranges() == 0
    assert driver.stub.stub_pinned_bytes() == 0


def test_structs_have_the_headers_sizes(driver: StubDriver) -> None:
    sizes = (ctypes.sizeof(driver._properties), ctypes.sizeof(driver._access))
    assert sizes == (driver.stub.stub_properties_bytes(), driver.stub.stub_access_bytes())


def weights() -> list[Tensor]:
    """Small tensors of odd sizes, one that spans chunks, and one that fills a chunk."""
    shapes: list[Any] = [(1,), (19, 3), (989, 1000), (2, 512, 512), (5,), (2 * MIB - 512,)]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float32, torch.int64, torch.uint8]
    return [torch.randn(shape).mul(9).to(dtype) for shape, dtype in zip(shapes, dtypes)]


def test_tensors_lie_side_by_side_in_memory_of_their_own(driver: StubDriver) -> None:
    region, originals = MappedRegion(driver), weights()
    placed = [region.place(tensor) for tensor in originals]
    zeros = region.zeros((7, 11), torch.float8_e4m3fn)
    for tensor, original in zip(placed, originals):
        assert torch.equal(tensor, original)
        assert tensor.dtype == original.dtype and tensor.is_contiguous()
        assert tensor.data_ptr() % 512 == 0 and tensor.storage_offset() == 0
    assert not zeros.float().any()
    used = sum(-(-tensor.nbytes // 512) * 512 for tensor in (*placed, zeros))
    assert zeros.data_ptr() + 512 - placed[0].data_ptr() == used
    assert region.mapped_bytes == driver.used_bytes() == -(-used // (2 * MIB)) * 2 * MIB
    region.close()


def test_memory_that_comes_back_has_its_addresses_and_contents(driver: StubDriver) -> None:
    region, originals = MappedRegion(driver), weights()
    placed = [region.place(tensor) for tensor in originals]
    addresses, used = [tensor.data_ptr() for tensor in placed], driver.used_bytes()
    for _ in range(2):
        region.drop(keep=True)
        region.drop(keep=True)
        assert driver.used_bytes() == region.mapped_bytes == 0
        assert region.take_back() and region.take_back()
        assert driver.used_bytes() == used
        assert [tensor.data_ptr() for tensor in placed] == addresses
        assert all(map(torch.equal, placed, originals))
    region.close()


@pytest.mark.parametrize("keeps_first", [False, True])
def test_dropped_contents_are_written_anew(driver: StubDriver, keeps_first: bool) -> None:
    region, originals = MappedRegion(driver), weights()
    placed = [region.place(tensor) for tensor in originals]
    region.drop(keep=keeps_first)
    region.drop(keep=False)
    assert not region.take_back()
    assert not any(map(torch.equal, placed, originals))
    place = region.refill()
    assert all(place(one) is other for one, other in zip(originals, placed))
    assert all(map(torch.equal, placed, originals))
    region.clear()
    assert not any(tensor.any() for tensor in placed)
    region.close()


def test_tensors_are_added_after_sleep(driver: StubDriver) -> None:
    region, originals = MappedRegion(driver), weights()
    placed = [region.place(tensor) for tensor in originals]
    region.drop(keep=True)
    region.take_back()
    placed += [region.place(tensor) for tensor in originals]
    assert all(map(torch.equal, placed, originals * 2))
    region.close()


def test_a_full_device_leaves_the_region_asleep(driver: StubDriver) -> None:
    region, originals = MappedRegion(driver), weights()
    placed = [region.place(tensor) for tensor in originals]
    used = driver.used_bytes()
    region.drop(keep=True)
    driver.set_capacity(used - 1)
    num_released = driver.num_released
    with pytest.raises(torch.OutOfMemoryError, match=r"has no .* MiB left"):
        region.take_back()
    assert driver.num_released == num_released + 1  # torch's own memory was released first
    assert driver.used_bytes() == region.mapped_bytes == 0
    driver.set_capacity(used)
    assert region.take_back() and all(map(torch.equal, placed, originals))
    with pytest.raises(torch.OutOfMemoryError):
        region.place(originals[2])
    assert all(map(torch.equal, placed, originals))
    region.close()


@pytest.mark.parametrize("asleep", [False, True])
@pytest.mark.parametrize("how", ["close", "del"])
def test_nothing_is_left_of_a_closed_region(driver: StubDriver, how: str, asleep: bool) -> None:
    region, other = MappedRegion(driver), MappedRegion(driver)
    kept = other.place(weights()[1])
    before = driver.used_bytes()
    for tensor in weights():
        region.place(tensor)
    if asleep:
        region.drop(keep=True)
    if how == "close":
        region.close()
        region.close()
    else:
        del region
    assert driver.used_bytes() == before
    assert driver.stub.stub_reserved_ranges() == 1
    assert kept.float().isfinite().all()
    other.close()


def test_the_device_sees_what_the_processor_writes_to_pinned_memory(driver: StubDriver) -> None:
    region, originals = PinnedRegion(driver), weights()
    written = [region.host_empty(one.shape, one.dtype).copy_(one) for one in originals]
    seen = [region.seen(tensor) for tensor in written]
    for tensor, host, original in zip(seen, written, originals):
        assert tensor.data_ptr() == host.data_ptr() and torch.equal(tensor, original)
        assert tensor.dtype == original.dtype and tensor.is_contiguous()
    written[0].fill_(19)
    assert torch.equal(seen[0], written[0])
    assert driver.used_bytes() == 0, "the device's memory is not touched"
    assert driver.stub.stub_pinned_bytes() == sum(one.nbytes for one in originals)
    # tensors of the device stay where they are, and nothing can be given back
    assert region.place(originals[0]) is originals[0]
    with pytest.raises(ValueError, match="sleep is not supported with expert_offload"):
        region.drop(keep=True)


@pytest.mark.parametrize("how", ["close", "del"])
def test_pinned_memory_is_freed_with_its_region(driver: StubDriver, how: str) -> None:
    region, other = PinnedRegion(driver), PinnedRegion(driver)
    kept = other.host_empty((99,), torch.float32).fill_(1)
    region.host_empty((5, 1000), torch.bfloat16)
    if how == "close":
        region.close()
        region.close()
    else:
        del region
    assert driver.stub.stub_pinned_bytes() == kept.nbytes and kept.sum() == 99
    other.close()


def test_a_host_without_memory_is_named(driver: StubDriver) -> None:
    region = PinnedRegion(driver)
    driver.set_capacity(4 * MIB)
    with pytest.raises(torch.OutOfMemoryError, match=r"the host has no 5 MiB left that can be pin"):
        region.host_empty((5 * MIB,), torch.uint8)
    assert region.host_empty((4 * MIB,), torch.uint8).numel() == 4 * MIB


def test_a_failed_call_is_named(driver: StubDriver) -> None:
    address = driver.reserve(4 * MIB)
    with pytest.raises(DriverError, match=r"cuMemMap failed with CUDA error 1$"):
        driver.map(address + 3 * MIB, 2 * MIB)
    with pytest.raises(DriverError, match="cuMemUnmap failed"):
        driver.unmap(address, 2 * MIB)
    assert driver.used_bytes() == 0
    driver.free(address, 4 * MIB)


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("how", ["close", "del"])
def test_an_engine_lives_in_mapped_memory(
    make_llm: Callable[..., LLM],
    driver: StubDriver,
    monkeypatch: pytest.MonkeyPatch,
    level: int,
    how: str,
) -> None:
    """The same addresses and answers after sleep. Asleep it holds nothing; nor does it later."""
    prompts = random_prompts([5, 40, 99], seed=33)
    plain = make_llm(device="cpu")
    expected = tokens(plain, prompts, greedy())
    monkeypatch.setattr(CpuPlatform, "region", lambda self: MappedRegion(driver))
    llm = make_llm(device="cpu")
    params, caches = llm.engine.runner.params, llm.engine.runner.steps.caches
    kept = [tensor for tensor in tensors((params, caches)) if tensor is not None]
    addresses = [tensor.data_ptr() for tensor in kept]
    assert params.head_VD is params.embed_VD
    assert driver.used_bytes() >= sum({one.data_ptr(): one.nbytes for one in kept}.values())
    for _ in range(2):
        assert tokens(llm, prompts, greedy()) == expected
        llm.sleep(level)
        assert driver.used_bytes() == 0
        llm.wake_up()
    assert tokens(llm, prompts, greedy()) == expected
    assert [tensor.data_ptr() for tensor in kept] == addresses
    if how == "close":
        llm.close()
    del kept, params, caches, llm
    assert driver.used_bytes() == 0 and driver.stub.stub_reserved_ranges() == 0
