"""CPU: our C++ kernels, and Inductor for all else. Steps are synchronous; some are recorded."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from nanovllm.compile.lower import inductor
from nanovllm.compile.passes.fuse_add_norm import fuse_add_norm
from nanovllm.compile.passes.fuse_rope_store import fuse_rope_store
from nanovllm.compile.passes.order_sums import check_order, order_sums
from nanovllm.compile.passes.replace_ops import replace_ops
from nanovllm.compile.program import Lowering, Pass
from nanovllm.kernels import order
from nanovllm.kernels.cpu import build as cpp_build
from nanovllm.kernels.cpu import clamped as cpu_clamped
from nanovllm.kernels.cpu import experts as cpu_experts
from nanovllm.kernels.cpu import gated_delta as cpu_gated_delta
from nanovllm.kernels.cpu import ggml as cpu_ggml
from nanovllm.kernels.cpu import library as cpu_library
from nanovllm.kernels.cpu import linear as cpu_linear
from nanovllm.kernels.cpu import ordered as cpu_ordered
from nanovllm.kernels.cpu import packed as cpu_packed
from nanovllm.kernels.cpu import recording as cpu_recording
from nanovllm.kernels.cpu import register as cpu_register
from nanovllm.kernels.cpu import step as cpu_step
from nanovllm.kernels.recorded import Unrecordable
from nanovllm.kernels.reference.packed import Codes
from nanovllm.platforms.base import STEP_OPS, UNFUSED_PASSES, MemoryBudget, Platform, Replay, Traits
from nanovllm.platforms.cores import usable_cores
from nanovllm.platforms.regions import HostRegion, Region

logger = logging.getLogger(__name__)

# The cache's share of free memory, and its limit: other programs need the machine's memory too.
CACHE_SHARE, CACHE_CEILING_BYTES = 0.25, 8 << 30

# Ops with our C++ kernels: as fast as Inductor's code, which is compiled for every bucket.
KERNEL_OPS = (
    STEP_OPS | {"linear_int8", "layer_norm"} | set(cpu_packed.KERNELS) | set(cpu_ggml.KERNELS)
)


TRAITS = Traits(
    name="cpu",
    supported_dtypes=(torch.float32, torch.bfloat16),
    auto_dtype=torch.float32,
    quantizations=("int8", "fp8", "int4"),
    takes_quantized=True,
    takes_blocks=True,
    supports_fp8_cache=True,
    supports_offload=True,
    ordered=frozenset({"adapters", "fp8 caches", "quantized weights"}),
    attention_backends=("sdpa",),
    block_size=32,
    batched_tokens=512,
    num_seqs=32,
    verifies_rows=True,
    max_ranks=None,
)


def problem(index: int) -> str | None:
    return None


def create(index: int, options: Mapping[str, Any]) -> CpuPlatform:
    return CpuPlatform()


class CpuPlatform(Platform):
    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), TRAITS)
        self._compiler_problem = "prepare() has not run"
        self._num_threads = torch.get_num_threads()

    def prepare(
        self, libraries: Path | None = None, cxx: str | None = None, may_compile: bool = True
    ) -> None:
        _limit_threads()
        self._num_threads = torch.get_num_threads()
        cpp_build.configure(libraries, cxx, may_compile)
        available, why = cpu_library.available()
        self._compiler_problem = "" if available else why
        if available:
            # a read-only store already has Inductor's output, or torch reports the error
            with contextlib.suppress(OSError):
                inductor.use_compiler(cpp_build.script_of_compiler())
            cpu_register.register()
            cpu_step.register()
            cpu_experts.register()
            cpu_gated_delta.register()
            cpu_packed.register()
            cpu_clamped.register()
            cpu_ggml.register()
            cpu_ordered.register()
            cpu_packed.configure(self.exact_inputs)

    def part_environment(
        self, part: int, num_parts: int, num_devices: int, own: Mapping[str, str]
    ) -> dict[str, str]:
        cores = min(usable_cores(), torch.get_num_threads())
        return {"OMP_NUM_THREADS": str(max(1, cores // num_parts))}

    def share_cores(self, num_processes: int) -> None:
        self._num_threads = max(1, self._num_threads // num_processes)
        self.enter_thread()

    def enter_thread(self) -> None:
        torch.set_num_threads(self._num_threads)  # OpenMP's thread count is per calling thread

    def lowering(self) -> tuple[Lowering | None, str]:
        if self._compiler_problem:
            why = self._compiler_problem.splitlines()[0]
            return None, f"graph mode lacks its C++ kernels, running eagerly: {why}"
        return inductor.lower_if_worth_it, ""

    def passes(self, fuse: bool) -> tuple[tuple[str, Pass], ...]:
        if not fuse:
            return UNFUSED_PASSES
        return (
            ("fuse_rope_store", fuse_rope_store),
            ("fuse_add_norm", fuse_add_norm),
            ("replace_ops", partial(replace_ops, keep=_keeps_op)),
        )

    def capture(self, step: Callable[[], None]) -> Replay:
        """Record `step`; without this a decode step of a small model is mostly Python."""
        try:
            return cpu_recording.RecordedStep(step)
        except Unrecordable as error:
            logger.debug("a step is not recorded: %s", error)
            return step

    def ordered_passes(self) -> tuple[tuple[str, Pass], ...] | None:
        if self._compiler_problem:
            return None
        ours = order.ORDERED | order.ORDERED_ON_CPU | order.BY_ROW
        kept = (ours | STEP_OPS) - {"rope"}
        return (
            ("fuse_rope_store", fuse_rope_store),
            ("fuse_add_norm", fuse_add_norm),
            ("order_sums", order_sums),
            ("replace_ops", partial(replace_ops, keep=lambda name, node: name in kept)),
            ("check_order", partial(check_order, ours=ours, pointwise=False)),
        )

    def prefers_interleaved(self, codes: Codes, depth: int) -> bool:
        weight = cpu_packed.Weight(*codes)
        return not self._compiler_problem and cpu_packed.prefers_interleaved(weight, depth)

    def fingerprint(self) -> dict[str, str]:
        return {"cpu": cpp_build.instruction_set()}

    def kernels_compiled(self) -> list[str]:
        return cpp_build.compiled()

    def write(self, target: Tensor, values: Any) -> None:
        """By NumPy: torch would divide the copy among threads, whose start takes longer."""
        if target.is_floating_point():
            super().write(target, values)
        else:
            target.numpy()[...] = values

    def memory_budget(self, utilization: float) -> MemoryBudget:
        cache_bytes = min(CACHE_SHARE * _available_bytes(), CACHE_CEILING_BYTES)
        return MemoryBudget(int(cache_bytes), scratch_bytes=0)

    def cache_limit_bytes(self) -> int:
        return _available_bytes()

    def total_bytes(self) -> int:
        return _physical_bytes()

    def enable_sleep(self) -> None:
        """Nothing to prepare: every region in host memory can be freed."""

    def region(self) -> Region:
        return HostRegion()

    def peak_bytes(self) -> int:
        """The process's peak since its start: the system cannot reset it."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def _limit_threads() -> None:
    """Use at most one thread per usable core: torch ignores the limits of control groups."""
    cores, threads = usable_cores(), torch.get_num_threads()
    if threads > cores:
        message = "%d threads instead of %d: this process may not use more cores"
        logger.info(message, cores, threads)
        torch.set_num_threads(cores)
    logger.debug("%d threads on %d usable cores", torch.get_num_threads(), cores)


def _keeps_op(name: str, node: Node) -> bool:
    if name == "linear":
        # keep a product with its residual: Inductor would have to compile C++ for the addition
        x_TD = node.all_input_nodes[0].meta["val"]
        has_residual = len(node.args) > 3 and node.args[3] is not None
        return has_residual or cpu_linear.prefers_own_linear(x_TD.shape[0], x_TD.dtype)
    return name in KERNEL_OPS


def _available_bytes() -> int:
    """Memory available to programs, or all memory where that is unknown."""
    try:
        with open("/proc/meminfo") as meminfo:
            for line in meminfo:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return _physical_bytes()


def _physical_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
