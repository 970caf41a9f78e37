"""The engine's options, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

CACHE_MODES = ("auto", "require")
DTYPES = ("auto", "float32", "float16", "bfloat16")
KV_CACHE_DTYPES = ("auto", "fp8")
GRAPH_MODES = ("ascend_ir", "aclgraph")
QUANTIZATIONS = ("int8",)
ATTENTION_BACKENDS = ("auto", "triton", "flash_attn", "sdpa")


@dataclass(frozen=True)
class EngineConfig:
    """Options of `LLM` and `LLMEngine`. None means: what suits the device (see `nanovllm/platforms`).

    model: a folder with a checkpoint in transformers' layout, a Hub id, or "tiny-qwen3", the embedded model.
    dtype: "auto" is the checkpoint's own, float32 on a CPU, float16 for a bfloat16 checkpoint on a device without bfloat16.
    device: "auto", "cpu", "cuda", "cuda:N", "npu", "npu:N" or "mps".
    enforce_eager: run the regions as plain Python, without graphs.
    attention_backend: "auto" is the device's own kernels, on a GPU "triton". "flash_attn" is the package of that name, which
        has to be installed, "sdpa" torch's attention over gathered pages. `print_attention_backend_info` says what there is.
    graph_batch_sizes: rows of the decode graphs. Larger batches run in several decode steps.
    draft_lengths: numbers of proposed tokens that one decode step can verify for each row, as
        `LLMEngine.propose` gives them. A graph is built for each of them and each batch size.
    capture: record decode steps as device graphs, on devices that have them; False launches each kernel by itself.
    fuse: fuse ops into kernels of our own; False leaves all but attention, the cache write and the sampler to the lowering,
        as plain torch.
    run_ahead: steps launched before the tokens of the first are read, 0 or 1.
    pad_batches: in eager mode, whether batches are padded to the graphs' sizes all the same.
    max_num_seqs: requests that run at the same time.
    max_num_batched_tokens: prompt tokens per prefill step; longer prompts are split.
    max_stall_ms: milliseconds that a prefill step may take, as estimated from steps timed at warm-up, while a request
        decodes whose tokens somebody watches come; longer prompts are split further. inf: no bound.
    max_model_len: tokens per request, prompt and answer together; default the checkpoint's, or what the cache holds.
    gpu_memory_utilization: share of the device's memory that weights, cache and scratch may take together.
    num_kvcache_blocks, kvcache_block_size: the cache, in blocks and tokens per block (a multiple of 16).
    kv_cache_dtype: "auto" is the model's dtype. "fp8" is float8_e4m3fn, half the bytes of bf16, with scales per head that
        follow from the weights; it changes results.
    enable_prefix_caching: requests with the same beginning share its blocks.
    seed: what the seeds of requests without one are drawn from.
    tensor_parallel_size: 1.
    npu_graph_mode: on an NPU, "ascend_ir" (the default: GE compiles whole steps) or "aclgraph" (steps are captured).
    npu_graph_options: on an NPU, fields of torchair's CompilerConfig by their path, such as
        {"experimental_config.tiling_schedule_optimize": True}.
    random_weights: draw weights from a seeded normal distribution; only the checkpoint's config.json is needed.
    quantization: "int8" stores the weights of linear layers as int8 with a factor for each output, on a CPU; None: as they are.
    compile_cache: the folder of compiled programs and kernels; default NANOVLLM_CACHE. Made for its owner alone.
    compile_cache_mode: "auto" takes what is there and adds what is not; "require" compiles nothing, and stops with a list
        of what is missing and why.
    """

    model: str
    dtype: str = "auto"
    device: str = "auto"
    attention_backend: str = "auto"
    enforce_eager: bool = False
    capture: bool = True
    fuse: bool = True
    run_ahead: int | None = None
    graph_batch_sizes: Sequence[int] | None = None
    pad_batches: bool = True
    draft_lengths: Sequence[int] = ()
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_stall_ms: float | None = None
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    num_kvcache_blocks: int | None = None
    kvcache_block_size: int | None = None
    kv_cache_dtype: str = "auto"
    enable_prefix_caching: bool = True
    seed: int = 0
    tensor_parallel_size: int = 1
    npu_graph_mode: str | None = None
    npu_graph_options: Mapping[str, object] | None = None
    random_weights: bool = False
    quantization: str | None = None
    compile_cache: str | PathLike[str] | None = None
    compile_cache_mode: str = "auto"

    @classmethod
    def from_options(cls, model: str, options: dict[str, Any]) -> EngineConfig:
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise TypeError(
                f"unknown option {', '.join(unknown)}; the options are {', '.join(known)}"
            )
        return cls(model, **options)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(
                f"dtype {self.dtype!r} is not supported: use one of {', '.join(DTYPES)}"
            )
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise ValueError(
                f"quantization {self.quantization!r} is not supported: use None or one of {', '.join(QUANTIZATIONS)}"
            )
        if self.attention_backend not in ATTENTION_BACKENDS:
            names = ", ".join(ATTENTION_BACKENDS)
            raise ValueError(
                f"attention_backend {self.attention_backend!r} is not supported: use one of {names}"
            )
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            names = ", ".join(KV_CACHE_DTYPES)
            raise ValueError(
                f"kv_cache_dtype {self.kv_cache_dtype!r} is not supported: use one of {names}"
            )
        for name in ("max_num_seqs", "max_model_len"):
            _check_whole(name, getattr(self, name), 1)
        _check_whole("max_num_batched_tokens", self.max_num_batched_tokens, 16)
        _check_whole("num_kvcache_blocks", self.num_kvcache_blocks, 2, " (one is for padding)")
        _check_whole("kvcache_block_size", self.kvcache_block_size, 16)
        if self.graph_batch_sizes is not None:
            given = self.graph_batch_sizes
            sizes = tuple(given) if isinstance(given, Iterable) else ()
            if not sizes or any(
                isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes
            ):
                raise ValueError(
                    f"graph_batch_sizes is {given!r}: it must hold whole numbers of at least 1"
                )
            object.__setattr__(self, "graph_batch_sizes", sizes)
        lengths = tuple(self.draft_lengths) if isinstance(self.draft_lengths, Iterable) else (None,)
        if any(type(length) is not int or length < 1 for length in lengths):
            raise ValueError(
                f"draft_lengths is {self.draft_lengths!r}: it must hold whole numbers of at least 1"
            )
        object.__setattr__(self, "draft_lengths", lengths)
        if self.kvcache_block_size is not None and self.kvcache_block_size % 16:
            raise ValueError(
                f"kvcache_block_size is {self.kvcache_block_size}: it must be a multiple of 16"
            )
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0.0 < share <= 1.0:
            raise ValueError(f"gpu_memory_utilization is {share!r}: it must be a number in (0, 1]")
        stall = self.max_stall_ms
        if stall is not None and (
            isinstance(stall, bool) or not isinstance(stall, (int, float)) or not stall > 0
        ):
            raise ValueError(f"max_stall_ms is {stall!r}: it must be a number above 0, or inf")
        if not self.pad_batches and not self.enforce_eager:
            raise ValueError("pad_batches=False needs enforce_eager=True: graphs have fixed sizes")
        if self.compile_cache_mode not in CACHE_MODES:
            raise ValueError(
                f"compile_cache_mode is {self.compile_cache_mode!r}: use one of {', '.join(CACHE_MODES)}"
            )
        if self.compile_cache_mode == "require" and self.enforce_eager:
            raise ValueError(
                "compile_cache_mode='require' asks for compiled programs, and enforce_eager=True for none"
            )
        if self.compile_cache is not None and (
            not isinstance(self.compile_cache, (str, PathLike)) or not str(self.compile_cache)
        ):
            raise ValueError(f"compile_cache is {self.compile_cache!r}: it must be a folder's path")
        if not self.fuse and self.enforce_eager:
            raise ValueError(
                "fuse=False needs enforce_eager=False: in eager mode there are no passes to leave out"
            )
        # two ahead would gain nothing, since with one there is always a step behind that which runs
        if self.run_ahead is not None and (
            type(self.run_ahead) is not int or self.run_ahead not in (0, 1)
        ):
            raise ValueError(f"run_ahead is {self.run_ahead!r}: it must be 0 or 1")
        if self.npu_graph_mode not in (None, *GRAPH_MODES):
            raise ValueError(
                f"npu_graph_mode is {self.npu_graph_mode!r}: it must be one of {', '.join(GRAPH_MODES)}"
            )
        if self.npu_graph_mode == "aclgraph" and (self.run_ahead or not self.capture):
            raise ValueError(
                f"npu_graph_mode='aclgraph' does not go with run_ahead={self.run_ahead}, capture={self.capture}: its steps are "
                "captured, and each waits for the tokens of the one before"
            )
        if self.npu_graph_options is not None and not isinstance(self.npu_graph_options, Mapping):
            raise ValueError(
                f"npu_graph_options is {self.npu_graph_options!r}: it must be a dict of options by path"
            )
        if self.tensor_parallel_size != 1:
            raise ValueError(
                f"tensor_parallel_size is {self.tensor_parallel_size}: only 1 is supported"
            )


def _check_whole(name: str, value: int | None, low: int, why: str = "") -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
        raise ValueError(f"{name} is {value!r}: it must be a whole number, at least {low}{why}")
