"""Finds the kernels that a step launches, on fake tensors, and compiles one at a time.

A compiled kernel depends on the launch's constants and, for each other argument, on its type and on
whether it is 1 or a multiple of 16 (for a pointer, its address). So the launches of all steps are
known without running a step, and each kernel is compiled once, by any process that has time. A
kernel that this misses is compiled at its first launch.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import importlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode, fake_tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from nanovllm.kernels import ops
from nanovllm.kernels.collectives import COLLECTIVES
from nanovllm.kernels.cuda import nvrtc
from nanovllm.kernels.cuda.nvrtc import Function
from nanovllm.kernels.triton import common as triton_common


class TritonDryRun:
    """Runs the calls of steps on fake tensors and records their launches.

    `kernels` maps requests for `compile` to the length of the kernel's source, because long kernels
    take longest to compile. Triton inlines the functions that a kernel calls, so their length
    counts once per call.
    """

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.kernels: dict[str, int] = {}
        # Fake tensors on a GPU create its context, for gradients. Nothing here needs the context,
        # and ending it takes long.
        fake_tensor.init_gpu_context = lambda device: None  # type: ignore[assignment]

    def visit(self, op: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """The result of a call of a step, on fake tensors.

        An op of ours runs as on the device, except for its launches and for sums over ranks, which
        a dry run does not have.
        """
        kernel = (None if ops.op_name(op) in COLLECTIVES else ops.kernel_of(op, "CUDA")) or op
        with self.mode, self._keeping_launches():
            return kernel(*args, **kwargs)

    def compile(self, request: str) -> None:
        """Compile the kernel of a recorded launch into Triton's folder, or read it from there.

        The launch may come from this or another process. The launcher is built, too: up to Triton
        3.6 each signature has one in C, which takes a C compiler 0.2 s.
        """
        asked = json.loads(request)
        if "constants" in asked:
            nvrtc.compile_function(function_of(asked), torch.cuda.get_device_capability())
            return
        kernel = getattr(importlib.import_module(asked["module"]), asked["name"])
        arguments = {
            name: _like(value) if isinstance(value, dict) else value
            for name, value in asked["arguments"].items()
        }
        compiled = kernel.warmup(grid=(1,), **arguments)
        driver.active.launcher_cls(compiled.src, compiled.metadata)

    @contextlib.contextmanager
    def _keeping_launches(self) -> Iterator[None]:
        def keep(kernel: Any, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
            self.kernels[_request(kernel, dict(zip(kernel.arg_names, args)) | kwargs)] = (
                _inlined_length(kernel)
            )

        def keep_function(function: Function) -> None:
            request = json.dumps(function._asdict(), sort_keys=True)
            self.kernels[request] = len(nvrtc.source_of(function))

        launch = JITFunction.run
        JITFunction.run, triton_common.counters_are_fake = keep, True
        nvrtc.record(keep_function)
        try:
            yield
        finally:
            JITFunction.run, triton_common.counters_are_fake = launch, False
            nvrtc.record(None)


def function_of(written: dict[str, Any]) -> Function:
    """The function whose fields were written as JSON."""
    return Function(**written | {"constants": tuple(map(tuple, written["constants"]))})


class _Pointer:
    """The properties of a tensor that Triton reads."""

    def __init__(self, dtype: str, aligned: bool) -> None:
        self.dtype = getattr(torch, dtype)
        self._address = 0 if aligned else 1

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:
        """For AMD: offsets below 2 GiB have 32 bits. Triton's own stand-in returns 0, too."""
        return 0


def _like(written: dict[str, Any]) -> _Pointer | TensorDescriptor:
    """What compiles as the tensor or the descriptor that `_stand_in` wrote."""
    if "layout" not in written:
        return _Pointer(**written)
    block_shape = written["block_shape"]
    return TensorDescriptor(
        _Pointer(written["dtype"], True),
        block_shape,
        [8] * (len(block_shape) - 1) + [1],
        block_shape,
        NVMMASharedLayout(**written["layout"]),
    )


@functools.cache
def _inlined_length(kernel: JITFunction[Any]) -> int:
    """Characters of the kernel's source, with the source of our functions wherever it names one.

    A call names one, and so does the list of functions that warps of one block run side by side.
    """
    names = (node.id for node in ast.walk(kernel.parse()) if isinstance(node, ast.Name))
    named = (kernel.fn.__globals__.get(name) for name in names)
    return len(kernel.src) + sum(
        _inlined_length(one) for one in named if isinstance(one, JITFunction)
    )


def _request(kernel: Any, arguments: dict[str, Any]) -> str:
    """A launch as JSON, the same for all launches of one compiled kernel.

    TypeError for a constant that JSON cannot express.
    """
    params = {param.name: param for param in kernel.params}
    written = {
        # names that are not parameters are options of the compiler
        name: value
        if name not in params or params[name].is_constexpr
        else _stand_in(params[name], value)
        for name, value in arguments.items()
    }
    return json.dumps(
        {"module": kernel.fn.__module__, "name": kernel.fn.__name__, "arguments": written},
        sort_keys=True,
    )


def _stand_in(param: Any, value: Any) -> Any:
    """A value that compiles to the same kernel."""
    if isinstance(value, Tensor):
        aligned = value.storage_offset() * value.element_size() % 16 == 0  # allocations are aligned
        return {"dtype": str(value.dtype).removeprefix("torch."), "aligned": aligned}
    if isinstance(value, TensorDescriptor):
        return {
            "dtype": str(value.base.dtype).removeprefix("torch."),
            "block_shape": value.block_shape,
            "layout": dataclasses.asdict(value.layout),
        }
    if isinstance(value, float):
        return 0.5
    if isinstance(value, int) and not isinstance(value, bool):
        if value == 1 and not param.do_not_specialize:
            return 1
        large = 0 if -(2**31) <= value < 2**31 else 2**40
        return large + (16 if value % 16 == 0 and not param.do_not_specialize else 17)
    return value
