"""Steps as lists of kernel calls, which the C++ library runs without Python between them.

A step of a small model has some 300 kernels of a few microseconds, and Python takes as long for
each: its arguments, its results, the call. All of it is equal in each run of a step with static
inputs. So one run is recorded: kernels and copies are noted and not run, and their memory is kept.

A step is recorded only if it consists of these: our kernels, new and viewed tensors, copies, and
products, look-ups and joins of torch. Others, such as those that read numbers on the host, run as
before.
Addresses change when memory is freed for sleep (`recorded.moved`); the step is then recorded again.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm.kernels import ops
from nanovllm.kernels.cpu import build, copies
from nanovllm.kernels.cpu import library as cpu_library
from nanovllm.kernels.cpu import step as cpu_step
from nanovllm.kernels.recorded import State, Unrecordable

# The most that a recorded step keeps. Larger steps take so long that Python hardly counts.
MAX_BYTES = 16 << 20

_NEW = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
_COPIES = frozenset({"_to_copy", "clone"})
_LIBRARY = frozenset({"addmm", "clamp", "embedding", "index_select", "mm"})
_WRITES = frozenset({"add_", "copy_", "fill_", "index_copy_", "zero_"})
_ARGUMENTS = (ctypes.c_char_p,)
# These only answer; what follows from the answer is recorded.
_QUESTIONS = frozenset({"nanovllm_packed_is_integer"})

Step = Callable[[], None]


class _Calls:
    """Kernel calls that follow each other."""

    def __init__(self, calls: list[tuple[Any, bytes]]) -> None:
        """`calls` are functions of our libraries and their arguments."""
        self._names = [function.__name__ for function, _ in calls]
        self._arguments = ctypes.create_string_buffer(b"".join(one for _, one in calls))
        at, entries = ctypes.addressof(self._arguments), []
        for function, arguments in calls:
            address = ctypes.cast(function, ctypes.c_void_p).value
            entries.append(struct.pack("@PPq", address, at, function.restype is not None))
            at += len(arguments)
        self._entries = b"".join(entries)
        self._replay = cpu_library.load().nanovllm_replay

    def __call__(self) -> None:
        if failed := self._replay(self._entries, len(self._names)):
            raise IndexError(f"{self._names[failed - 1]} refuses its arguments: a row or an expert")


class _Recorder(TorchDispatchMode):
    """Notes what a step does."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()
        self.kept: list[Tensor] = []
        self.parts: list[Callable[[], object]] = []
        self._calls: list[tuple[Any, bytes]] = []
        self._num_bytes = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: torch would import Dynamo for this class, which takes a second of a warm start."""
        return False

    def note_call(self, function: Any, arguments: bytes) -> int:
        self._calls.append((function, arguments))
        return 1  # as a kernel that takes its arguments

    def note(self, part: Callable[[], object]) -> None:
        self.end_calls()
        self.parts.append(part)

    def end_calls(self) -> None:
        if self._calls:
            self.parts.append(_Calls(self._calls))
            self._calls = []

    def keep(self, found: Tensor) -> Tensor:
        self._num_bytes += found.untyped_storage().nbytes()
        if self._num_bytes > MAX_BYTES:
            raise Unrecordable(f"it takes more than {MAX_BYTES >> 20} MiB")
        self.kept.append(found)
        return found

    def copy(self, out: Tensor, x: Tensor) -> None:
        self.kept += (out, x)
        if not copies.copy(out, x):
            self.note(lambda: out.copy_(x))

    def by_rows(self, name: str, args: tuple[Any, ...], out: Tensor) -> bool:
        """Whether an op of _LIBRARY or _WRITES is noted as a copy of rows."""
        self.kept += [one for one in args if isinstance(one, Tensor)]
        if name == "copy_":
            return copies.copy(out, args[1])
        if name == "index_select" and args[1] == 0:
            return copies.gather(out, args[0], args[2])
        if name == "index_copy_" and args[1] == 0:
            return copies.scatter(out, args[2], args[3])
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        kernel = ops.kernel_of(func, "CPU")
        if kernel is not None:
            with self:  # its own tensors and copies are noted as well
                return kernel(*args, **kwargs)
        if func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        if func.is_view and func.namespace == "aten":
            return func(*args, **kwargs)
        return self._noted(func, args, kwargs)

    def _noted(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note an op of torch; returns its result, whose memory is kept."""
        name = func._schema.name.removeprefix("aten::")
        if name in _NEW:
            return self.keep(func(*args, **kwargs))
        if name in _COPIES:
            copy = self.keep(torch.empty_like(func(*args, **kwargs)))
            self.copy(copy, args[0])
            return copy
        if name in _JOINS:
            joined = self.keep(func(*args, **kwargs))
            for part, one in zip(_JOINS[name](joined, *args, **kwargs), args[0], strict=True):
                self.copy(part, one)
            return joined
        if name in _LIBRARY:
            out = self.keep(_result_of(name, args))
            if not self.by_rows(name, args, out):
                self.note(lambda: out.copy_(func(*args, **kwargs)))
            return out
        if name in _WRITES:
            self.kept += [one for one in args if isinstance(one, Tensor)]
            if not self.by_rows(name, args, args[0]):
                self.note(lambda: func(*args, **kwargs))
            return args[0]
        raise Unrecordable(f"{func} is not a kernel of ours")


def _parts_of_cat(joined: Tensor, given: Sequence[Tensor], dim: int = 0) -> Sequence[Tensor]:
    return joined.split([one.shape[dim] for one in given], dim)


def _parts_of_stack(joined: Tensor, given: Sequence[Tensor], dim: int = 0) -> Sequence[Tensor]:
    return joined.unbind(dim)


_JOINS = {"cat": _parts_of_cat, "stack": _parts_of_stack}  # where each tensor is in the result


def _result_of(name: str, args: tuple[Any, ...]) -> Tensor:
    """Memory for the result of one of _LIBRARY. (On meta tensors torch would import SymPy.)"""
    if name == "clamp":
        return torch.empty_like(args[0])
    if name == "index_select":
        x, dim, index = args
        return x.new_empty((*x.shape[:dim], len(index), *x.shape[dim + 1 :]))
    if name == "embedding":
        weight_VD, index = args
        return weight_VD.new_empty((*index.shape, weight_VD.shape[1]))
    *_, x_TD, weight_DO = (one for one in args if isinstance(one, Tensor))
    return x_TD.new_empty((x_TD.shape[0], weight_DO.shape[1]))


@contextmanager
def _recording(recorder: _Recorder) -> Iterator[None]:
    """Have calls of our libraries by this thread noted instead of run."""
    cpu_step.load()  # has the copies
    libraries = build.loaded()
    replaced = [
        (library, name, function)
        for library in libraries
        for name, function in vars(library).items()
        if getattr(function, "argtypes", None) == _ARGUMENTS and name not in _QUESTIONS
    ]

    def noted(function: Any) -> Callable[[bytes], Any]:
        def call(arguments: bytes) -> Any:
            if threading.get_ident() != recorder.thread:
                return function(arguments)
            return recorder.note_call(function, arguments)

        return call

    try:
        for library, name, function in replaced:
            setattr(library, name, noted(function))
        State.thread = recorder.thread
        yield
    finally:
        State.thread = None
        for library, name, function in replaced:
            setattr(library, name, function)
    if len(build.loaded()) != len(libraries):
        raise Unrecordable("a library was loaded meanwhile")


_lock = threading.Lock()  # libraries are shared by all threads


class RecordedStep:
    """A step that has been recorded. Raises Unrecordable if it cannot be."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._record()

    def __call__(self) -> None:
        if self._circumstances != _circumstances():
            try:
                self._record()
            except Unrecordable:
                return self._step()
        for part in self._parts:
            part()

    def _record(self) -> None:
        recorder = _Recorder()
        with _lock, torch.no_grad(), _recording(recorder), recorder:
            self._step()
        recorder.end_calls()
        self._parts, self._kept = recorder.parts, recorder.kept
        self._circumstances = _circumstances()


def _circumstances() -> tuple[int, int]:
    """What recorded arguments depend on, beside the step's own memory."""
    return State.num_moves, torch.get_num_threads()
