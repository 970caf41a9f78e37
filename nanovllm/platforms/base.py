"""What the engine asks of a device. Everything that differs between devices is behind this interface."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from nanovllm.compile.passes.replace_ops import replace_ops
from nanovllm.compile.program import Lowering, Pass

# For measuring what fusion earns: only what no lowering can write by itself stays a kernel of ours.
UNFUSED_OPS = frozenset({"paged_attention", "store_kv", "sample"})
UNFUSED_PASSES: tuple[tuple[str, Pass], ...] = (
    ("replace_ops", partial(replace_ops, keep=lambda name, node: name in UNFUSED_OPS)),
)


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes of device memory, once weights are loaded and the largest step has run.

    allowance_bytes: the share that was asked for, less what weights and others on the device hold.
    scratch_bytes: what the largest step takes for a while.
    """

    allowance_bytes: int
    scratch_bytes: int

    @property
    def cache_bytes(self) -> int:
        return max(0, self.allowance_bytes - self.scratch_bytes)


def budget(
    utilization: float,
    *,
    free_bytes: int,
    total_bytes: int,
    reserved_bytes: int,
    allocated_bytes: int,
    peak_bytes: int,
) -> MemoryBudget:
    """What the device and torch's allocator (the last three) say, as a budget: memory that the allocator holds but does
    not use is as good as free."""
    held_bytes = total_bytes - free_bytes - (reserved_bytes - allocated_bytes)
    return MemoryBudget(int(utilization * total_bytes) - held_bytes, peak_bytes - allocated_bytes)


class HostCopy(Protocol):
    """A device tensor on its way to the host."""

    def tolist(self) -> list[Any]:
        """Wait for the copy and return its values."""
        ...


class Replay(Protocol):
    """A captured step: calling it runs the same launches on the same memory."""

    def __call__(self) -> None: ...


class Rehearsal(Protocol):
    """Runs steps on fake tensors, made under `mode`, to find the kernels that they would launch."""

    kernels: dict[
        str, int
    ]  # what was found: requests to compile one, each with a number that grows with its time

    @property
    def mode(self) -> AbstractContextManager[Any]: ...

    def visit(self, op: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """The result of one call of a program."""
        ...

    def compile(self, request: str) -> None:
        """Compile a kernel that a rehearsal has found, in this or another process."""
        ...


class Platform(Protocol):
    name: str
    device: torch.device
    default_block_size: int  # tokens per cache block
    default_cache_blocks: int | None  # None: as many as `memory_budget` allows
    default_batched_tokens: int  # tokens per prefill step
    default_num_seqs: int
    max_stall_ms: float  # of a prefill step while tokens are watched
    run_ahead: int  # steps launched before the tokens of the first are read
    whole_steps: (
        bool  # the compiler takes a step as one graph with static shapes, not region by region
    )
    wants_lengths: bool  # `announce` is called before every decode step
    supported_dtypes: tuple[torch.dtype, ...]
    quantizations: tuple[str, ...]  # of weights, beside none
    supports_fp8_cache: bool  # the kernels store and read keys and values in float8_e4m3fn

    def prepare(
        self, libraries: Path | None = None, cxx: str | None = None, may_compile: bool = True
    ) -> None:
        """Register this device's kernels and choose its lowering; called once per engine, before any program is built.

        C++ is compiled by `cxx` (None: whatever there is) into the folder `libraries`, unless `may_compile` is False.
        """
        ...

    def fingerprint(self) -> dict[str, str]:
        """What can change a compiled program here: versions of compilers and driver, and what they compile for."""
        ...

    def compile_workers(self, bytes_each: int, bytes_own: int) -> int:
        """Processes that should compile at a cold start, each of which takes so many bytes of the device, while this one
        takes `bytes_own`; 0 or 1 where one process is quick enough."""
        ...

    def rehearsal(self) -> Rehearsal | None:
        """A new one; None where kernels can't be found without running them, or there are none that take long."""
        ...

    def kernels_compiled(self) -> list[str]:
        """Names of the kernels and libraries that this process has compiled, once for each time."""
        ...

    def lowering(self) -> tuple[Lowering | None, str]:
        """The lowering for graph mode, or None and the reason in one line."""
        ...

    def passes(self, fuse: bool) -> tuple[tuple[str, Pass], ...]:
        """What turns a traced graph into one for the lowering: fusions into kernels of ours, then inlining of the rest.
        Without `fuse` it is `UNFUSED_PASSES`."""
        ...

    def announce(self, seq_lens: list[int]) -> None:
        """The lengths of all rows of the decode step that is about to be replayed, padding included."""
        ...

    def capture(self, step: Callable[[], None]) -> Replay:
        """Record `step`, whose programs have all run before; a device that records nothing returns it as it is."""
        ...

    def upload(self, values: Any, dtype: torch.dtype) -> Tensor:
        """Host numbers to the device without waiting."""
        ...

    def write(self, target: Tensor, values: Any) -> None:
        """Copy host numbers of the same shape over a device tensor without waiting."""
        ...

    def read_back(self, tensor: Tensor) -> HostCopy: ...

    measures_scratch: (
        bool  # whether the budget wants the largest step to have run, to see what it takes
    )

    def memory_budget(self, utilization: float) -> MemoryBudget:
        """What there is for the KV cache now; the largest step's peak lies after the last `reset_peak`."""
        ...

    def cache_limit_bytes(self) -> int:
        """The most that a cache of a size that was asked for can take."""
        ...

    def used_bytes(self) -> int:
        """Device memory in use, by whomever; 0 on a device that does not count it."""
        ...

    def reset_peak(self) -> None: ...

    def peak_bytes(self) -> int:
        """The most device memory in use since `reset_peak`."""
        ...

    def synchronize(self) -> None: ...

    def release(self) -> None:
        """Give unused cached memory back to the device."""
        ...
