"""The interface between the engine and a device, with defaults that suit a synchronous device."""

# ruff: noqa: B027  (methods that do nothing by default)

from __future__ import annotations

import math
import platform as machine
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nanovllm.compile.passes.replace_ops import replace_ops
from nanovllm.compile.program import Lowering, Pass
from nanovllm.kernels.collectives import COLLECTIVES
from nanovllm.kernels.flash_attention import Flash, Missing
from nanovllm.kernels.peers import Agree, Gather, OwnedPeers
from nanovllm.kernels.reference.packed import Codes
from nanovllm.platforms.regions import Region, SplitRegion

# Ops whose reference reads the routing on the host, so that it cannot be traced.
OFFLOAD_OPS = ("fetch_experts", "stream_experts", "offloaded_experts")
OTHER_EXPERT_OPS = ("clamped_experts", "gelu_experts", "packed_clamped_experts")  # the same
PACKED_EXPERT_OPS = (  # the same
    "fp8_expert_linear", "fp8_experts", "ggml_expert_linear", "packed_expert_linear",
    "packed_experts",
)  # fmt: skip
LATENT_OPS = ("head_linear", "latent_attention", "latent_inputs", "latent_span_attention")
# Ops that go through the tokens of rows one by one, or in chunks.
DELTA_OPS = ("causal_conv", "gated_delta", "gated_delta_step", "ssd")
LORA_OPS = ("adapter_tiles", "add_lora", "add_lora_", "add_lora_silu", "lora_linear")
# Ops of a step with our kernels on CPU and CUDA, or whose reference a lowering makes no faster.
STEP_OPS = frozenset({
    "accept", "add_rms_norm", "advance", "decode_inputs", "draft_inputs", "expert_linear",
    "experts", "group_topk", "next_tokens", "paged_attention", "qk_norm_rope_store", "rms_norm",
    "rms_norm_each", "sample", "sample_of", "sampling_inputs", "segment_attention", "silu_mul",
    "span_inputs", "topk_softmax", "varlen_attention",
    *LATENT_OPS, *DELTA_OPS, *LORA_OPS, *OFFLOAD_OPS, *OTHER_EXPERT_OPS, *PACKED_EXPERT_OPS,
    *COLLECTIVES,
})  # fmt: skip
# The passes of fuse=False: our kernels are used only for ops that no lowering can generate.
UNFUSED_OPS = frozenset({
    "paged_attention", "segment_attention", "varlen_attention", "store_kv", "sample", "group_topk",
    "topk_softmax", "experts", "expert_linear", *LATENT_OPS, *DELTA_OPS, *OFFLOAD_OPS,
    *OTHER_EXPERT_OPS, *LORA_OPS, *PACKED_EXPERT_OPS, *COLLECTIVES,
})  # fmt: skip
UNFUSED_PASSES: tuple[tuple[str, Pass], ...] = (
    ("replace_ops", partial(replace_ops, keep=lambda name, node: name in UNFUSED_OPS)),
)


@dataclass(frozen=True, kw_only=True)
class Traits:
    """Facts about a device, and its defaults for options of `LLM` that are None.

    name: the device's name in the option `device`.
    supported_dtypes: dtypes that a model can run in.
    auto_dtype: the dtype of dtype="auto"; None means the checkpoint's.
    quantizations: supported values of the option `quantization`.
    takes_quantized: True if weights of quantized checkpoints stay as they are stored.
    takes_blocks: True if there are products of the blocks of GGUF files.
    supports_fp8_cache: True if kernels read and write a float8_e4m3fn cache.
    supports_latents: True if attention over latents runs.
    supports_adapters: True if requests may have adapters.
    supports_offload: True if kernels can read experts in host memory.
    ordered: what deterministic engines take beside plain weights and caches: some of "adapters",
        "fp8 caches" and "quantized weights".
    attention_backends: supported values of the option `attention_backend` besides "auto".
    block_size: default tokens per cache block.
    cache_blocks: default number of cache blocks; None means as many as `memory_budget` allows.
    batched_tokens: default tokens per prefill step.
    num_seqs: default number of requests that run at the same time.
    max_stall_ms: the largest default of the bound on the time of a prefill step while a request
        streams (`PrefillLatencyBound.in_proportion`); infinite: no bound by default.
    run_ahead: default number of steps launched before the tokens of the first are read.
    decode_rows: default decode buckets in rows, ascending.
    prefill_growth: ratio of adjacent prefill buckets above 512 tokens.
    graphs_have_sinks: True if attention with sinks can be part of a graph.
    whole_steps: True if a step compiles as one graph with static shapes, not region by region.
    verifies_rows: True if the tokens of a step that verifies drafts are rows of the kernels of
        plain decode steps, however many they are: then both have the same sums.
    wants_lengths: True if the runner must call `announce` before every decode step.
    max_ranks: the most ranks of one engine; None means no limit.
    """

    name: str
    supported_dtypes: tuple[torch.dtype, ...]
    auto_dtype: torch.dtype | None = None
    quantizations: tuple[str, ...] = ()
    takes_quantized: bool = False
    takes_blocks: bool = False
    supports_fp8_cache: bool = False
    supports_latents: bool = True
    supports_adapters: bool = True
    supports_offload: bool = False
    ordered: frozenset[str] = frozenset()
    attention_backends: tuple[str, ...] = ()
    block_size: int
    cache_blocks: int | None = None
    batched_tokens: int
    num_seqs: int
    max_stall_ms: float = math.inf
    run_ahead: int = 0
    decode_rows: tuple[int, ...] = (1, 4, 16, 32)
    prefill_growth: int = 2
    graphs_have_sinks: bool = True
    whole_steps: bool = False
    verifies_rows: bool = False
    wants_lengths: bool = False
    max_ranks: int | None = 1


@dataclass(frozen=True)
class MemoryBudget:
    """Device memory in bytes, measured after loading weights and running the largest step.

    allowance_bytes: the requested share, less weights and the memory of other processes.
    scratch_bytes: temporary memory of the largest step.
    """

    allowance_bytes: int
    scratch_bytes: int

    @property
    def cache_bytes(self) -> int:
        return max(0, self.allowance_bytes - self.scratch_bytes)


class HostCopy(Protocol):
    """A copy of a device tensor that may still be in progress."""

    def tolist(self) -> list[Any]:
        """Wait for the copy and return its values."""
        ...

    def numpy(self) -> np.ndarray:
        """Wait for the copy and return its values as an array, which may share its memory."""
        ...


class Replay(Protocol):
    """A captured step. Calling it runs the same launches on the same memory."""

    def __call__(self) -> None: ...


class DryRun(Protocol):
    """Runs steps on fake tensors, made under `mode`, and records the kernels they would launch.

    kernels: compile requests, each with a number that grows with its compile time.
    """

    kernels: dict[str, int]

    @property
    def mode(self) -> AbstractContextManager[Any]: ...

    def visit(self, op: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Return the result of one call of a program."""
        ...

    def compile(self, request: str) -> None:
        """Compile a kernel that a dry run recorded, in this or another process."""
        ...


class Platform(ABC):
    """The engine's interface to a device. Override what differs from the defaults."""

    exact_inputs = False  # kernels keep the inputs of packed weights as they are

    def __init__(self, device: torch.device, traits: Traits) -> None:
        self.device, self.traits = device, traits

    def prepare(
        self, libraries: Path | None = None, cxx: str | None = None, may_compile: bool = True
    ) -> None:
        """Register this device's kernels. An engine calls this once, before it builds programs.

        C++ kernels are compiled by `cxx` (None: any compiler found) into the folder `libraries`.
        With may_compile=False only existing libraries are used.
        """

    # Compiling -----------------------------------------------------------------------------

    @abstractmethod
    def lowering(self) -> tuple[Lowering | None, str]:
        """The lowering of graph mode and "", or None and the reason in one line."""

    @abstractmethod
    def passes(self, fuse: bool) -> tuple[tuple[str, Pass], ...]:
        """Named passes that run between tracing and lowering; without `fuse`, `UNFUSED_PASSES`."""

    def ordered_passes(self) -> tuple[tuple[str, Pass], ...] | None:
        """`passes` of deterministic engines: the sums of what they leave have one order. None: the
        device has no kernels for this."""
        return None

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """Properties that change compiled programs: versions of compilers and driver, the chip."""

    def compile_workers(self, bytes_each: int, bytes_own: int) -> int:
        """Number of processes that compile at a cold start; below 2, this process compiles alone.

        bytes_each: device memory of one such process.
        bytes_own: device memory that this process will take.
        """
        return 0

    def dry_run(self) -> DryRun | None:
        """A new dry run; None where kernels compile fast or only running steps finds them."""
        return None

    def kernels_compiled(self) -> list[str]:
        """Names of kernels and libraries compiled by this process, one entry per compilation."""
        return []

    # Running steps -------------------------------------------------------------------------

    def enter_thread(self) -> None:
        """Prepare the calling thread to run steps. The thread that made the platform is ready."""

    def connect_peers(
        self, rank: int, num_ranks: int, gather: Gather, agree: Agree
    ) -> OwnedPeers | None:
        """Memory that the devices of all ranks can read; None where no kernel uses it.

        All ranks call it at the same time, and all get memory or all get None.
        """
        return None

    def rank_environment(self, rank: int, own: Mapping[str, str]) -> dict[str, str]:
        """Environment variables with which a process sees only the device of one rank, from our
        environment `own`."""
        return {}

    def part_environment(
        self, part: int, num_parts: int, num_devices: int, own: Mapping[str, str]
    ) -> dict[str, str]:
        """Environment variables that give a process one of `num_parts` parts of the machine:
        `num_devices` devices, or an equal share of the cores. `own` is our environment."""
        return {}

    def share_cores(self, num_processes: int) -> None:
        """Use one of `num_processes` equal shares of the machine's cores. Call `prepare` first."""

    def capture(self, step: Callable[[], None]) -> Replay:
        """Capture `step`, whose programs have all run before, or return it unchanged."""
        return step

    def announce(self, seq_lens: list[int]) -> None:
        """Set the lengths of all rows, padding included, of the decode step that runs next."""

    def upload(self, values: Any, dtype: torch.dtype) -> Tensor:
        """Copy host numbers to a new device tensor; does not wait."""
        return torch.as_tensor(values, dtype=dtype).to(self.device)

    def write(self, target: Tensor, values: Any) -> None:
        """Copy host numbers of the same shape into a device tensor; does not wait."""
        target.copy_(torch.as_tensor(values, dtype=target.dtype))

    def read_back(self, tensor: Tensor) -> HostCopy:
        """Start a copy of `tensor` to the host."""
        return tensor.to("cpu", copy=True)

    def host_buffer(self, num_bytes: int) -> Tensor:
        """Bytes on the host that are copied to the device many times."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def synchronize(self) -> None:
        """Wait for all work on the device."""

    # Memory --------------------------------------------------------------------------------

    @abstractmethod
    def memory_budget(self, utilization: float) -> MemoryBudget:
        """Memory available to the KV cache. Scratch memory is the peak since `reset_peak`."""

    @abstractmethod
    def cache_limit_bytes(self) -> int:
        """The largest KV cache that a user may request."""

    def total_bytes(self) -> int:
        """The device's memory; 0 if unknown."""
        return 0

    def used_bytes(self) -> int:
        """Device memory in use by all processes; 0 if the device does not count it."""
        return 0

    def reset_peak(self) -> None:
        """Start a new measurement of `peak_bytes`."""

    def peak_bytes(self) -> int:
        """The most device memory in use since `reset_peak`."""
        return self.used_bytes()

    def release(self) -> None:
        """Return unused cached memory to the device."""

    def enable_sleep(self) -> None:
        """Make `region` return regions that can be freed for sleep. Raises ValueError if
        unsupported."""
        raise ValueError(
            f"enable_sleep_mode is True, but sleep is not supported on a {self.traits.name} device"
        )

    def region(self) -> Region:
        """A new, empty region of device memory."""
        name = self.traits.name
        return Region(self.device, f"sleep is not supported on a {name} device")

    def split_region(self) -> SplitRegion:
        """A new region for weights that are partly in host memory."""
        return SplitRegion(self.device)

    def prefers_interleaved(self, codes: Codes, depth: int) -> bool:
        """Whether products with packed codes, of `depth` inputs, are faster here if their rows are
        interleaved (`reference.packed`)."""
        return False

    # Information ---------------------------------------------------------------------------

    def describe(self) -> str:
        """A description of the hardware."""
        return machine.processor() or machine.machine()

    def own_attention(self) -> str:
        """Whether this device's own attention kernels run here, and why."""
        return f"runs with 'auto': the kernels for {self.traits.name}"

    def hardware_name(self) -> str:
        """The model of the hardware, as its driver names it; "" if nothing depends on it."""
        return ""

    def flash_attn(self) -> tuple[tuple[Flash, ...], tuple[Missing, ...]]:
        """The flash-attn interfaces for this device: installed ones, and missing ones."""
        return (), (Missing(f"needs a GPU, and the device is {self.traits.name}", ""),)
