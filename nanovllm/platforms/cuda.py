"""CUDA: Inductor with our Triton kernels, whole decode steps captured as CUDA graphs, tokens read one step late."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanovllm.compile.lower import inductor
from nanovllm.compile.passes.add_in_place import add_in_place
from nanovllm.compile.passes.fuse_add_norm import fuse_add_norm
from nanovllm.compile.passes.fuse_linear import fuse_linear
from nanovllm.compile.passes.fuse_rope_store import fuse_rope_store
from nanovllm.compile.passes.replace_ops import replace_ops
from nanovllm.compile.program import Lowering, Pass
from nanovllm.platforms import preload
from nanovllm.platforms.accelerator import Accelerator
from nanovllm.platforms.base import UNFUSED_PASSES, Rehearsal, Replay

# Inductor fuses norms and activation as well, but without programmatic dependent launch, and compiles for seconds a bucket.
KERNEL_OPS = frozenset(
    {
        "accept",
        "add_rms_norm",
        "advance",
        "decode_inputs",
        "fused_linear",
        "linear_",
        "paged_attention",
        "qk_norm_rope_store",
        "rms_norm",
        "sample",
        "sampling_inputs",
        "silu_mul",
        "span_inputs",
    }
)


class CudaPlatform(Accelerator):
    name = "cuda"
    default_block_size = 64
    default_cache_blocks: int | None = None
    default_batched_tokens = 8192
    default_num_seqs = 256
    run_ahead = 1
    measures_scratch = True
    max_stall_ms = 30.0
    whole_steps = False
    wants_lengths = False
    quantizations: tuple[str, ...] = ()

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("cuda", index)
        self._pool: Any = None
        self._capture_stream: Any = None
        self._first_graph: Any = None
        self.supported_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16)
        if torch.cuda.get_device_capability(self.device) >= (8, 0):
            self.supported_dtypes += (torch.bfloat16,)
        # Triton converts float8_e4m3fn from Ada on
        self.supports_fp8_cache = torch.cuda.get_device_capability(self.device) >= (8, 9)

    @property
    def runtime(self) -> Any:
        return torch.cuda

    def prepare(
        self, libraries: Path | None = None, cxx: str | None = None, may_compile: bool = True
    ) -> None:
        torch.cuda.set_device(self.device)
        try:
            from nanovllm.kernels.triton import build as triton_build
            from nanovllm.kernels.triton import register as triton_kernels
            from nanovllm.kernels.triton import step as triton_step
        except ImportError as error:
            raise ValueError("device 'cuda' needs triton: pip install triton") from error
        if not triton_kernels.supported(self.device):
            major, minor = torch.cuda.get_device_capability(self.device)
            raise ValueError(
                f"this GPU is of compute capability {major}.{minor}: at least 7.5 is needed"
            )
        triton_build.watch()
        triton_kernels.register()
        triton_step.register()

    def lowering(self) -> tuple[Lowering | None, str]:
        return inductor.lower_if_worth_it, ""

    def passes(self, fuse: bool) -> tuple[tuple[str, Pass], ...]:
        if not fuse:
            return UNFUSED_PASSES
        from nanovllm.kernels.triton import common as triton_common
        from nanovllm.kernels.triton import linear as triton_linear

        takes = (
            triton_linear.takes if triton_common.has_matrix_units(self.device) else _takes_one_row
        )
        return (
            ("fuse_rope_store", fuse_rope_store),
            ("fuse_linear", partial(fuse_linear, takes=takes)),
            ("fuse_add_norm", fuse_add_norm),
            ("add_in_place", add_in_place),
            ("replace_ops", partial(replace_ops, keep=lambda name, node: name in KERNEL_OPS)),
        )

    def fingerprint(self) -> dict[str, str]:
        import triton

        properties = torch.cuda.get_device_properties(self.device)
        is_nvidia = torch.version.hip is None
        kind = (
            f"sm_{properties.major}{properties.minor}" if is_nvidia else str(properties.gcnArchName)
        )
        return {
            "device": f"{kind}, {properties.multi_processor_count} multiprocessors",
            "cuda": str(torch.version.cuda) if is_nvidia else f"hip {torch.version.hip}",
            "driver": _driver_version(),
            "triton": triton.__version__,
        }

    def compile_workers(self, bytes_each: int, bytes_own: int) -> int:
        free_bytes, _ = torch.cuda.mem_get_info(self.device)
        fitting = (free_bytes - bytes_own) // max(bytes_each, 1 << 30)
        return max(0, min(preload.max_processes(), fitting))

    def rehearsal(self) -> Rehearsal | None:
        from nanovllm.kernels.triton import rehearsal as triton_rehearsal

        return triton_rehearsal.Rehearsal()

    def kernels_compiled(self) -> list[str]:
        from nanovllm.kernels.triton import build as triton_build

        return triton_build.compiled()

    def announce(self, seq_lens: list[int]) -> None:
        pass

    def capture(self, step: Callable[[], None]) -> Replay:
        torch.cuda.synchronize()
        if self._pool is None:
            self._pool, self._capture_stream = (
                torch.cuda.graph_pool_handle(),
                torch.cuda.Stream(self.device),
            )
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        # by hand, on the stream that torch's context manager takes: that one collects garbage each time, for 0.2 s
        self._capture_stream.wait_stream(current)
        with torch.cuda.stream(self._capture_stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        current.wait_stream(self._capture_stream)
        self._first_graph = (
            self._first_graph or graph
        )  # a pool ends with the last graph in it, and takes no other then
        return graph.replay

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def release(self) -> None:
        self._pool = self._first_graph = None
        torch.cuda.empty_cache()


def _takes_one_row(x_TD: Tensor, weight_OD: Tensor, has_norm: bool, silu_mul: bool) -> bool:
    """Without matrix units only a product with one row is a stream of weights; cuBLAS, which has them, does the others."""
    return x_TD.shape[0] == 1


def _driver_version() -> str:
    """The CUDA version that the driver supports, as it numbers them (13000 is 13.0)."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1").cuDriverGetVersion(
            ctypes.byref(version)
        )
    except (OSError, AttributeError):
        return "unknown"
    return str(version.value)
