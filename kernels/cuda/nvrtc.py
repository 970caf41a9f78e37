"""Compiles CUDA C++ of ours by NVRTC, which torch ships, and launches it.

A program is compiled once for each source, constants, NVRTC and GPU, and kept on disk with its
digest (`code_files.py`). Users need no CUDA toolkit.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from nanovllm.kernels.code_files import CodeFolder

HERE = Path(__file__).parent
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)
FLAGS = ("--std=c++17", "-default-device")
# cuda.h: attributes of launches and functions
_COOPERATIVE, _PROGRAMMATIC_STREAM_SERIALIZATION = 2, 6
_MAX_DYNAMIC_SHARED_BYTES, _SHARED_CARVEOUT = 8, 9
_SHARED_BYTES = 48 << 10  # that a launch may use without asking


class Function(NamedTuple):
    """A kernel: the file of its source, without .cu, and the constants it is compiled with.

    The kernel has the name of the file. is_specific: it has instructions of one architecture that
    later ones lack, such as sm_90a.
    """

    source: str
    constants: tuple[tuple[str, int], ...]
    is_specific: bool = False


class Launch(NamedTuple):
    """The sizes of a launch. `overlaps`: with programmatic dependent launch. `all_run`: the driver
    refuses a grid whose programs cannot all run at the same time (a cooperative launch)."""

    grid: tuple[int, int, int]
    num_threads: int
    shared_bytes: int
    overlaps: bool
    all_run: bool = False


class _State:
    folder: Path | None = None
    compiled: list[str] = []  # noqa: RUF012
    # Called with a function in the place of its launch, while a dry run records launches.
    recorder: Callable[[Function], None] | None = None


def configure(folder: Path | None) -> None:
    """Where compiled programs are kept; None is ~/.cache/nanovllm/cuda."""
    _State.folder = folder


def record(recorder: Callable[[Function], None] | None) -> None:
    """Call `recorder` with each function that is launched from now on; None: launch again."""
    _State.recorder = recorder


def compiled() -> list[str]:
    """Names of the kernels that this process compiled."""
    return list(_State.compiled)


def source_of(function: Function) -> str:
    """The source, with the headers of ours that it includes in their places."""
    return _with_headers((HERE / f"{function.source}.cu").read_text())


def _with_headers(text: str) -> str:
    return _INCLUDE.sub(lambda found: _with_headers((HERE / found[1]).read_text()), text)


def compile_function(function: Function, capability: tuple[int, int]) -> bytes:
    """The program of a kernel for a GPU, from disk or from NVRTC.

    Raises RuntimeError if NVRTC is not found or refuses the source.
    """
    text = source_of(function)
    suffix = "a" if function.is_specific else ""
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}{suffix}", *FLAGS]
    options += [f"-D{name}={value}" for name, value in function.constants]
    folder = CodeFolder(_State.folder or Path.home() / ".cache" / "nanovllm" / "cuda")
    key = repr((text, options, nvrtc_version()))

    def build() -> bytes:
        _State.compiled.append(function.source)
        return _compile(function.source, text, options)

    return folder.get(function.source, key, ".cubin", build)


def launch(
    function: Function, how: Launch, arguments: Callable[[], bytes], device: torch.device
) -> None:
    """Launch a kernel on the current stream. `arguments` returns its only argument, a struct."""
    if _State.recorder is not None:
        _State.recorder(function)
        return
    handle = load(function, how.shared_bytes, device)
    kind = _COOPERATIVE if how.all_run else _PROGRAMMATIC_STREAM_SERIALIZATION
    attribute = _Attribute(kind, 0, 1)
    config = _Config(
        *how.grid, how.num_threads, 1, 1, how.shared_bytes,
        torch.cuda.current_stream(device).cuda_stream, ctypes.pointer(attribute),
        int(how.overlaps or how.all_run),
    )  # fmt: skip
    packed = arguments()
    struct = ctypes.create_string_buffer(packed, len(packed))
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(struct))
    check(driver().cuLaunchKernelEx(ctypes.byref(config), handle, parameters, None))


def load(function: Function, shared_bytes: int, device: torch.device) -> ctypes.c_void_p:
    """The kernel on a GPU, for launches with so much shared memory. It is compiled if need be."""
    handle = _loaded(function, device.index or 0)
    if shared_bytes > _SHARED_BYTES:
        _allow_shared(function, device.index or 0, shared_bytes)
    return handle


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, whose value has 64 bytes."""

    _fields_ = [
        ("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    ]  # fmt: skip


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        *((f"{kind}_{axis}", ctypes.c_uint) for kind in ("grid", "block") for axis in "xyz"),
        ("shared_bytes", ctypes.c_uint), ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)), ("num_attributes", ctypes.c_uint),
    ]  # fmt: skip


@functools.cache
def _loaded(function: Function, device_index: int) -> ctypes.c_void_p:
    program = compile_function(function, torch.cuda.get_device_capability(device_index))
    module, handle = ctypes.c_void_p(), ctypes.c_void_p()
    check(driver().cuModuleLoadData(ctypes.byref(module), program))
    name = function.source.encode()
    check(driver().cuModuleGetFunction(ctypes.byref(handle), module, name))
    return handle


_allowed: dict[tuple[Function, int], int] = {}


def _allow_shared(function: Function, device_index: int, num_bytes: int) -> None:
    if num_bytes > _allowed.get((function, device_index), 0):
        handle = _loaded(function, device_index)
        check(driver().cuFuncSetAttribute(handle, _MAX_DYNAMIC_SHARED_BYTES, num_bytes))
        # in percent: the multiprocessor's memory, so that programs of two kernels can fit it
        check(driver().cuFuncSetAttribute(handle, _SHARED_CARVEOUT, 100))
        _allowed[function, device_index] = num_bytes


@functools.cache
def driver() -> ctypes.CDLL:
    """The library of the CUDA driver."""
    return ctypes.CDLL("libcuda.so.1")


def check(status: int) -> None:
    """Raises RuntimeError with the driver's words for a status other than success."""
    if status:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA error {status}: {(text.value or b'').decode()}")


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """The library that torch's own runtime compiler uses; beside a torch without CUDA any."""
    major = torch.version.cuda.partition(".")[0] if torch.version.cuda else "*"
    packages = Path(torch.__file__).parents[1] / "nvidia"
    names = [f"libnvrtc.so.{major}", *map(str, packages.glob(f"*/lib/libnvrtc.so.{major}"))]
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise RuntimeError(f"NVRTC is not found ({names[0]}): pip install nvidia-cuda-nvrtc")


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def _compile(name: str, text: str, options: list[str]) -> bytes:
    library, program = _nvrtc(), ctypes.c_void_p()
    library.nvrtcCreateProgram(
        ctypes.byref(program), text.encode(), f"{name}.cu".encode(), 0, None, None
    )
    try:
        flags = (ctypes.c_char_p * len(options))(*(one.encode() for one in options))
        if library.nvrtcCompileProgram(program, len(options), flags):
            log = _output(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program)
            raise RuntimeError(f"NVRTC refuses {name}.cu: {log.decode(errors='replace')[:2000]}")
        return _output(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _output(
    size_of: Callable[..., int], read: Callable[..., int], program: ctypes.c_void_p
) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    read(program, buffer)
    return buffer.raw


def constants(values: Mapping[str, int | bool]) -> tuple[tuple[str, int], ...]:
    """Constants as a `Function` has them."""
    return tuple((name, int(value)) for name, value in values.items())
