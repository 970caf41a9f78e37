"""CPU: Inductor's C++ with our own attention and small-batch products; no capture, no run-ahead."""

from __future__ import annotations

import logging
import math
import os
import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from nanovllm.compile.lower import inductor
from nanovllm.compile.passes.fuse_add_norm import fuse_add_norm
from nanovllm.compile.passes.fuse_rope_store import fuse_rope_store
from nanovllm.compile.passes.replace_ops import replace_ops
from nanovllm.compile.program import Lowering, Pass
from nanovllm.kernels.cpu import build as cpp_build
from nanovllm.kernels.cpu import kernels as cpu_kernels
from nanovllm.kernels.cpu import step as cpu_step
from nanovllm.platforms.base import UNFUSED_PASSES, HostCopy, MemoryBudget, Rehearsal, Replay
from nanovllm.platforms.cores import usable_cores

logger = logging.getLogger(__name__)

# The cache's share of the memory that is free when it is allocated, and its ceiling: a machine's RAM is not the engine's.
CACHE_SHARE, CACHE_CEILING_BYTES = 0.25, 8 << 30

# C++ of our own for all of them: as fast as what Inductor writes, and compiled once instead of once per bucket.
KERNEL_OPS = frozenset(
    {
        "accept",
        "add_rms_norm",
        "advance",
        "decode_inputs",
        "linear_int8",
        "paged_attention",
        "qk_norm_rope_store",
        "rms_norm",
        "sample",
        "sampling_inputs",
        "silu_mul",
        "span_inputs",
    }
)


class CpuPlatform:
    name = "cpu"
    default_block_size = 32
    default_cache_blocks: int | None = None
    default_batched_tokens = 512
    default_num_seqs = 32
    run_ahead = 0
    measures_scratch = False
    max_stall_ms = math.inf
    whole_steps = False
    wants_lengths = False
    supported_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    quantizations: tuple[str, ...] = ("int8",)
    supports_fp8_cache = True

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._compiler_problem = "prepare() has not run"

    def prepare(
        self, libraries: Path | None = None, cxx: str | None = None, may_compile: bool = True
    ) -> None:
        _limit_threads()
        cpp_build.configure(libraries, cxx, may_compile)
        available, problem = cpu_kernels.available()
        self._compiler_problem = "" if available else problem
        if available:
            cpu_kernels.register()
            cpu_step.register()

    def lowering(self) -> tuple[Lowering | None, str]:
        if self._compiler_problem:
            return (
                None,
                f"no C++ compiler for graph mode, running eagerly: {self._compiler_problem.splitlines()[0]}",
            )
        return inductor.lower_if_worth_it, ""

    def passes(self, fuse: bool) -> tuple[tuple[str, Pass], ...]:
        if not fuse:
            return UNFUSED_PASSES
        return (
            ("fuse_rope_store", fuse_rope_store),
            ("fuse_add_norm", fuse_add_norm),
            ("replace_ops", partial(replace_ops, keep=_keeps_op)),
        )

    def fingerprint(self) -> dict[str, str]:
        return {"cpu": cpp_build.instruction_set()}

    def compile_workers(self, bytes_each: int, bytes_own: int) -> int:
        return 0

    def rehearsal(self) -> Rehearsal | None:
        return None

    def kernels_compiled(self) -> list[str]:
        return cpp_build.compiled()

    def announce(self, seq_lens: list[int]) -> None:
        pass

    def capture(self, step: Callable[[], None]) -> Replay:
        return step

    def upload(self, values: Any, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(values, dtype=dtype)

    def write(self, target: Tensor, values: Any) -> None:
        target.copy_(torch.as_tensor(values, dtype=target.dtype))

    def read_back(self, tensor: Tensor) -> HostCopy:
        return tensor.clone()

    def memory_budget(self, utilization: float) -> MemoryBudget:
        return MemoryBudget(
            int(min(CACHE_SHARE * _available_bytes(), CACHE_CEILING_BYTES)), scratch_bytes=0
        )

    def cache_limit_bytes(self) -> int:
        return _available_bytes()

    def used_bytes(self) -> int:
        return 0

    def reset_peak(self) -> None:
        pass

    def peak_bytes(self) -> int:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux

    def synchronize(self) -> None:
        pass

    def release(self) -> None:
        pass


def _limit_threads() -> None:
    """No more threads than cores: torch knows the affinity it started with, but no control group's limit."""
    cores = usable_cores()
    if torch.get_num_threads() > cores:
        logger.info(
            "%d threads instead of %d: this process may use so many cores",
            cores,
            torch.get_num_threads(),
        )
        torch.set_num_threads(cores)
    logger.debug("%d threads on %d usable cores", torch.get_num_threads(), cores)


def _keeps_op(name: str, node: Node) -> bool:
    if name == "linear":
        # with a residual it stays whole, or Inductor would write and compile C++ for the addition
        x: Any = node.args[0]
        has_residual = len(node.args) > 3 and node.args[3] is not None
        return has_residual or cpu_kernels.prefers_own_linear(
            x.meta["val"].shape[0], x.meta["val"].dtype
        )
    return name in KERNEL_OPS


def _available_bytes() -> int:
    """Memory that programs may still take; the whole of it where the system does not say."""
    try:
        with open("/proc/meminfo") as meminfo:
            for line in meminfo:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
