"""CUDA: our Triton kernels, cuBLAS and Inductor. Steps are captured; tokens come a step late."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanovllm.compile.lower import inductor
from nanovllm.compile.passes.add_in_place import add_in_place
from nanovllm.compile.passes.fuse_add_norm import fuse_add_norm
from nanovllm.compile.passes.fuse_linear import fuse_linear
from nanovllm.compile.passes.fuse_lora import fuse_lora
from nanovllm.compile.passes.fuse_reduce_norm import fuse_reduce_norm
from nanovllm.compile.passes.fuse_rope_store import fuse_rope_store
from nanovllm.compile.passes.fuse_router import fuse_router
from nanovllm.compile.passes.lora_in_place import lora_in_place
from nanovllm.compile.passes.order_sums import check_order, order_sums
from nanovllm.compile.passes.reduce_in_place import reduce_in_place
from nanovllm.compile.passes.replace_ops import replace_ops
from nanovllm.compile.program import Lowering, Pass
from nanovllm.kernels import flash_attention, ops, order
from nanovllm.kernels.flash_attention import Flash, Missing
from nanovllm.kernels.peers import Agree, Gather, OwnedPeers
from nanovllm.platforms import cuda_memory, cuda_peers, preload
from nanovllm.platforms.accelerator import Accelerator, visible_devices
from nanovllm.platforms.base import STEP_OPS, UNFUSED_PASSES, DryRun, Replay, Traits
from nanovllm.platforms.cuda_memory import Driver, MappedRegion, PinnedRegion
from nanovllm.platforms.regions import Region, SplitRegion

# Ops with our Triton kernels. Inductor could fuse norms and activations too, but it has no
# programmatic dependent launch and takes seconds per bucket.
KERNEL_OPS = STEP_OPS | {
    "fp8_linear", "fused_fp8_linear", "fused_linear", "fused_packed_linear", "layer_norm",
    "linear_", "norm_router_topk", "packed_linear", "packed_lookup", "ssd_step",
}  # fmt: skip


VISIBLE = "CUDA_VISIBLE_DEVICES"

# Traits of GPUs of compute capability 7.5; `CudaPlatform` adds what newer GPUs support.
TRAITS = Traits(
    name="cuda",
    supported_dtypes=(torch.float32, torch.float16),
    attention_backends=("triton", "flash_attn", "sdpa"),
    block_size=64,
    batched_tokens=8192,
    num_seqs=256,
    max_stall_ms=60.0,
    run_ahead=1,
    # Close together up to 32 rows, where padding costs a large share of a short step. Above 160
    # rows, sizes at which cuBLAS is fast on an H200 (docs/log.md).
    decode_rows=(1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 176, 208, 224, 256),
    quantizations=("fp8", "int4"),
    takes_quantized=True,
)


def problem(index: int) -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    num_devices = torch.cuda.device_count()
    return None if index < num_devices else f"torch finds {num_devices} CUDA device(s)"


def create(index: int, options: Mapping[str, Any]) -> CudaPlatform:
    return CudaPlatform(index)


class CudaPlatform(Accelerator):
    runtime = torch.cuda

    def __init__(self, index: int = 0) -> None:
        device = torch.device("cuda", index)
        capability = torch.cuda.get_device_capability(device)
        bfloat16 = (torch.bfloat16,) if capability >= (8, 0) else ()
        traits = replace(
            TRAITS,
            supported_dtypes=TRAITS.supported_dtypes + bfloat16,
            supports_fp8_cache=capability >= (8, 9),  # Triton converts float8_e4m3fn from 8.9 on
            # without matrix units, a tile of latents does not fit the shared memory
            supports_latents=capability >= (8, 0),
            supports_offload=torch.version.hip is None,
            ordered=frozenset({"fp8 caches"}),
            max_ranks=torch.cuda.device_count(),
        )
        super().__init__(device, traits)
        self._pool: Any = None
        self._capture_stream: Any = None
        self._first_graph: Any = None
        self._driver: Driver | None = None
        self._regions: list[MappedRegion] = []

    def prepare(
        self, libraries: Path | None = None, cxx: str | None = None, may_compile: bool = True
    ) -> None:
        torch.cuda.set_device(self.device)
        try:
            from nanovllm.kernels.cuda import nvrtc
            from nanovllm.kernels.triton import compile_log, packed_register
            from nanovllm.kernels.triton import register as triton_kernels
            from nanovllm.kernels.triton import step as triton_step
        except ImportError as error:
            raise ValueError("device 'cuda' needs triton: pip install triton") from error
        if not triton_kernels.supported(self.device):
            major, minor = torch.cuda.get_device_capability(self.device)
            raise ValueError(
                f"this GPU is of compute capability {major}.{minor}: at least 7.5 is needed"
            )
        compile_log.watch()
        triton_kernels.register()
        triton_step.register()
        packed_register.register()
        nvrtc.configure(libraries)

    def rank_environment(self, rank: int, own: Mapping[str, str]) -> dict[str, str]:
        return self.part_environment(rank, 0, 1, own)

    def part_environment(
        self, part: int, num_parts: int, num_devices: int, own: Mapping[str, str]
    ) -> dict[str, str]:
        return {VISIBLE: visible_devices(part * num_devices, num_devices, own.get(VISIBLE))}

    def connect_peers(
        self, rank: int, num_ranks: int, gather: Gather, agree: Agree
    ) -> OwnedPeers | None:
        return cuda_peers.connect(rank, num_ranks, self.device, gather, agree)

    def lowering(self) -> tuple[Lowering | None, str]:
        return inductor.lower_if_worth_it, ""

    def passes(self, fuse: bool) -> tuple[tuple[str, Pass], ...]:
        if not fuse:
            return UNFUSED_PASSES
        from nanovllm.kernels.triton import all_reduce as triton_all_reduce
        from nanovllm.kernels.triton import common as triton_common
        from nanovllm.kernels.triton import linear as triton_linear
        from nanovllm.kernels.triton import lora_row as triton_lora
        from nanovllm.kernels.triton import packed_linear as triton_packed
        from nanovllm.kernels.triton import topk_softmax as triton_topk

        has_matrix_units = triton_common.has_matrix_units(self.device)
        takes = triton_linear.takes if has_matrix_units else _takes_one_row
        all_takes: dict[Any, Callable[..., bool]] = {
            ops.linear: takes,
            ops.packed_linear: triton_packed.takes_packed,
            ops.fp8_linear: triton_packed.takes_fp8,
        }
        return (
            ("fuse_rope_store", fuse_rope_store),
            ("fuse_router", partial(fuse_router, takes=triton_topk.takes)),
            ("fuse_lora", partial(fuse_lora, takes=triton_lora.takes)),
            ("fuse_linear", partial(fuse_linear, takes=all_takes)),
            ("fuse_add_norm", fuse_add_norm),
            ("fuse_reduce_norm", partial(fuse_reduce_norm, takes=triton_all_reduce.has_few_rows)),
            ("lora_in_place", lora_in_place),
            ("add_in_place", add_in_place),
            ("reduce_in_place", reduce_in_place),
            ("replace_ops", partial(replace_ops, keep=lambda name, node: name in KERNEL_OPS)),
        )

    def ordered_passes(self) -> tuple[tuple[str, Pass], ...] | None:
        is_nvidia = torch.version.hip is None
        if not is_nvidia or torch.cuda.get_device_capability(self.device) != (9, 0):
            return None  # others have no instruction that takes one row and many

        ours = order.ORDERED | order.BY_ROW
        kept = ours | KERNEL_OPS
        return (
            ("fuse_rope_store", fuse_rope_store),
            ("order_sums", partial(order_sums, fuses_silu=True)),
            ("replace_ops", partial(replace_ops, keep=lambda name, node: name in kept)),
            ("check_order", partial(check_order, ours=ours, pointwise=True)),
        )

    def fingerprint(self) -> dict[str, str]:
        import triton

        gpu = torch.cuda.get_device_properties(self.device)
        is_nvidia = torch.version.hip is None
        kind = f"sm_{gpu.major}{gpu.minor}" if is_nvidia else str(gpu.gcnArchName)
        return {
            "device": f"{kind}, {gpu.multi_processor_count} multiprocessors",
            "cuda": str(torch.version.cuda) if is_nvidia else f"hip {torch.version.hip}",
            "driver": _driver_version(),
            "triton": triton.__version__,
        }

    def compile_workers(self, bytes_each: int, bytes_own: int) -> int:
        free_bytes, _ = torch.cuda.mem_get_info(self.device)
        fitting = (free_bytes - bytes_own) // max(bytes_each, 1 << 30)
        return max(0, min(preload.max_processes(), fitting))

    def dry_run(self) -> DryRun | None:
        from nanovllm.kernels.triton import dry_run as triton_dry_run

        return triton_dry_run.TritonDryRun()

    def kernels_compiled(self) -> list[str]:
        from nanovllm.kernels.cuda import nvrtc
        from nanovllm.kernels.triton import compile_log

        return compile_log.compiled() + nvrtc.compiled()

    def capture(self, step: Callable[[], None]) -> Replay:
        torch.cuda.synchronize()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._capture_stream = torch.cuda.Stream(self.device)
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        # not torch.cuda.graph(), which collects garbage at every capture for 0.2 s
        self._capture_stream.wait_stream(current)
        with torch.cuda.stream(self._capture_stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        current.wait_stream(self._capture_stream)
        # keep one graph alive: a pool without graphs is freed and cannot be used again
        self._first_graph = self._first_graph or graph
        return graph.replay

    def release(self) -> None:
        self._pool = self._first_graph = None
        super().release()

    def enable_sleep(self) -> None:
        if torch.version.hip is not None:
            raise ValueError("enable_sleep_mode is True, but sleep is not supported on AMD GPUs")
        self._driver = Driver(self.device)

    def region(self) -> Region:
        if self._driver is None:
            return Region(self.device, "sleep needs an engine loaded with enable_sleep_mode=True")
        region = MappedRegion(self._driver)
        self._regions.append(region)
        return region

    def split_region(self) -> SplitRegion:
        return PinnedRegion(Driver(self.device))

    def total_bytes(self) -> int:
        return int(torch.cuda.get_device_properties(self.device).total_memory)

    def peak_bytes(self) -> int:
        # torch's statistics leave out mapped memory
        return super().peak_bytes() + sum(region.mapped_bytes for region in self._regions)

    def describe(self) -> str:
        properties = torch.cuda.get_device_properties(self.device)
        major, minor = torch.cuda.get_device_capability(self.device)
        is_nvidia = torch.version.hip is None
        runtime = f"CUDA {torch.version.cuda}" if is_nvidia else f"ROCm {torch.version.hip}"
        dtypes = (str(dtype).removeprefix("torch.") for dtype in self.traits.supported_dtypes)
        return (
            f"{properties.name}, compute capability {major}.{minor}, {runtime}, "
            f"{properties.total_memory / 2**30:.0f} GiB; {', '.join(dtypes)}"
        )

    def own_attention(self) -> str:
        if importlib.util.find_spec("triton") is None:
            return "not available: pip install triton"
        why = "runs with 'auto': needs no package besides torch's, balances unequal lengths"
        capability = torch.cuda.get_device_capability(self.device)
        if torch.version.hip is not None:
            return f"{why}; on AMD it has been compiled but never run"
        if capability < (8, 0):
            return f"{why}; Triton uses no tensor cores on this GPU, and bf16 is missing"
        if capability[0] != 9:
            return f"{why}; on this GPU it has been compiled but never run"
        return why

    def hardware_name(self) -> str:
        return str(torch.cuda.get_device_name(self.device))

    def flash_attn(self) -> tuple[tuple[Flash, ...], tuple[Missing, ...]]:
        capability = torch.cuda.get_device_capability(self.device)
        return flash_attention.find(capability, is_nvidia=torch.version.hip is None)


def _takes_one_row(x_TD: Tensor, weight_OD: Tensor, has_norm: bool, silu_mul: bool) -> bool:
    """True for products with one row. Without tensor cores, cuBLAS is faster for all others."""
    return x_TD.shape[0] == 1


def _driver_version() -> str:
    """The CUDA version that the driver supports; 13000 means 13.0."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL(cuda_memory.LIBRARY).cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return "unknown"
    return str(version.value)
