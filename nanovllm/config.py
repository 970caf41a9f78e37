"""The engine's options, checked before anything is loaded."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

from nanovllm.checks import Rule, check_fields, is_json_object, one_of, refuse_unknown, sizes, whole
from nanovllm.media.options import LIMITS, MediaOptions
from nanovllm.option_names import translated
from nanovllm.speculative import SpeculativeConfig
from nanovllm.tuning import MAX_TOKENS, Tuning, moved

# Far above what any machine can use: larger numbers are mistakes, and the allocator's error would
# not name the option.
MAX_ROWS, MAX_LENGTH = 1 << 17, 1 << 24
MAX_BLOCKS, MAX_BLOCK_TOKENS = 1 << 31, 1 << 16
MAX_DEVICES, MAX_DRAFT_TOKENS = 1024, 1024
MAX_LORAS, MAX_LORA_RANK, MAX_CPU_LORAS = 1024, 512, 1 << 16


# What a model that pools is used for; "pooling" is what its checkpoint is made for.
POOLING_TASKS = ("embed", "classify", "score", "reward", "pooling")
POOLER_FIELDS = ("pooling_type", "seq_pooling_type", "normalize", "use_activation")


def _are_counts(values: Iterable[object]) -> bool:
    return all(type(one) is int and one >= 0 for one in values)


_UNITS = {"B": 1} | {
    prefix + unit: base ** (power + 1)
    for unit, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT")
}


def num_bytes(text: str) -> int:
    """The bytes of a text such as "8GiB" or "500 MB". Raises ValueError for any other text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(\w+)", text.strip(), re.ASCII)
    unit = _UNITS.get(match[2].replace("k", "K")) if match else None
    if match is None or unit is None or math.isinf(float(match[1]) * unit):
        raise ValueError(f"{text!r} is not a number of bytes, such as '8GiB' or '500MB'")
    return int(float(match[1]) * unit)


def _is_experts_or_bytes(value: int | str) -> bool:
    if isinstance(value, int):
        return value >= 1
    try:
        return num_bytes(value) >= 1
    except ValueError:
        return False


# The allowed values of options, beyond their types. None is also allowed where it is the default.
ALLOWED: dict[str, Rule] = {
    "task": one_of("generate", *POOLING_TASKS),
    "pooler_config": (
        f"a dict with some of {', '.join(POOLER_FIELDS)}",
        lambda value: value.keys() <= set(POOLER_FIELDS),
    ),
    "dtype": one_of("auto", "float32", "float16", "bfloat16"),
    "attention_backend": one_of("auto", "triton", "flash_attn", "sdpa"),
    "graph_batch_sizes": sizes(MAX_ROWS),
    "draft_lengths": sizes(MAX_DRAFT_TOKENS, may_be_empty=True),
    "max_num_seqs": whole(1, MAX_ROWS),
    "max_num_batched_tokens": whole(16, MAX_TOKENS),
    "max_stall_ms": ("a number above 0, or inf", lambda value: value > 0),
    "max_model_len": whole(2, MAX_LENGTH, " (one token of the prompt and one of the answer)"),
    "gpu_memory_utilization": ("a number in (0, 1]", lambda value: 0 < value <= 1),
    "num_kvcache_blocks": whole(2, MAX_BLOCKS, " (one is for padding)"),
    "kvcache_block_size": (
        f"a multiple of 16, at least 16, at most {MAX_BLOCK_TOKENS}",
        lambda value: 16 <= value <= MAX_BLOCK_TOKENS and value % 16 == 0,
    ),
    "kv_cache_dtype": one_of("auto", "fp8"),
    "max_loras": whole(1, MAX_LORAS),
    "max_lora_rank": whole(1, MAX_LORA_RANK),
    "max_cpu_loras": whole(1, MAX_CPU_LORAS),
    "state_dtype": one_of("auto", "float32", "bfloat16"),
    "seed": ("a whole number of 64 bits", lambda value: -(2**63) <= value < 2**63),
    "tensor_parallel_size": whole(1, MAX_DEVICES),
    "expert_parallel": (
        "True, False or 'auto'",
        lambda value: isinstance(value, bool) or value == "auto",
    ),
    "data_parallel_size": whole(1, MAX_DEVICES),
    "distributed_executor_backend": one_of("mp", "ray"),
    "npu_graph_mode": one_of("ascend_ir", "aclgraph", "npugraph_ex", None),
    "expert_offload": (
        "a number of experts per layer, at least 1, or bytes with a unit, such as '8GiB'",
        _is_experts_or_bytes,
    ),
    "quantization": one_of("int8", "fp8", "int4", None),
    "hf_overrides": ("a dict of fields of config.json, with JSON values", is_json_object),
    "compile_cache": ("a folder's path", lambda value: str(value) != ""),
    "compile_cache_mode": one_of("auto", "require"),
    "generation_config": one_of("auto", "vllm"),
    "max_grammar_bytes": whole(1),
    "grammar_timeout_s": ("a number above 0", lambda value: 0 < value < math.inf),
    "max_cached_grammars": whole(0),
    "limit_mm_per_prompt": (
        "a dict with whole numbers of at least 0 for 'image', 'video' and 'audio'",
        lambda value: value.keys() <= {"image", "video", "audio"} and _are_counts(value.values()),
    ),
    "media_limits": (
        f"a dict of numbers above 0 for {', '.join(LIMITS)}",
        lambda value: value.keys() <= set(LIMITS),
    ),
}


@dataclass(frozen=True)
class EngineConfig:
    """Options of `LLM` and `LLMEngine`. None: the device's default (see `nanovllm/platforms`).

    Values are checked against the annotations below and the limits in ALLOWED.

    model: a folder with a checkpoint in transformers' layout, a GGUF file, a Hub id (owner/name, or
        owner/name:TYPE for a GGUF file), or an embedded model: "tiny-qwen3",
        "tiny-mixtral", "tiny-qwen3.5" or "tiny-qwen3-vl".
    dtype: "auto" is the checkpoint's dtype, except float32 on a CPU, and float16 for a bfloat16
        checkpoint on a device without bfloat16.
    device: "auto", "cpu", "cuda", "cuda:N", "npu", "npu:N" or "mps".
    attention_backend: "auto" is the device's own kernels ("triton" on a GPU), and for prefill an
        installed flash-attn where it was measured to be faster on this GPU. "flash_attn" is an
        installed package of flash-attn for all steps, "sdpa" torch's attention over gathered pages.
        `print_attention_backend_info` lists the available ones.
    enforce_eager: run the regions as plain Python, without graphs.
    deterministic: a request's logits, tokens and log-probabilities have the same bits whatever else
        runs. What cannot have them is refused. See docs/determinism.md.
    graph_batch_sizes: rows of the decode graphs. Larger batches run in several decode steps.
    draft_lengths: the numbers of draft tokens (see `Engine.propose`) that a decode step can verify
        per row. A graph is built for each length and batch size.
    speculative_config: what proposes draft tokens on the device, such as {"method": "draft_model",
        "model": "Qwen/Qwen3-0.6B", "num_speculative_tokens": 4}. See docs/speculation.md.
    max_num_seqs: the most requests that run at the same time.
    max_num_batched_tokens: prompt tokens per prefill step. Longer prompts are split.
    max_stall_ms: the longest prefill step in milliseconds, by an estimate, while another request
        streams. Longer prompts are split further. inf: no limit. None: twelve times the shortest
        prefill step of the model, at most 60 on CUDA, and no limit on other devices.
    max_model_len: tokens per request, prompt and answer together. A number above the checkpoint's
        limit is lowered to it, with a warning. The limit is max_position_embeddings; rope types
        that extend it multiply (yarn: original_max_position_embeddings · factor; linear) or have
        none (dynamic). None: that limit (max_position_embeddings for dynamic, the original length
        for longrope), or what the cache holds.
    gpu_memory_utilization: the share of device memory for weights, cache and scratch together.
    num_kvcache_blocks, kvcache_block_size: the size of the cache in blocks, and of a block in
        tokens (a multiple of 16).
    kv_cache_dtype: "auto" is the model's dtype. "fp8" is float8_e4m3fn with scales per head that
        are computed from the weights: half the bytes of bf16. It changes results.
    state_dtype: the dtype of recurrent states, of models that have some. "auto" is float32.
        "bfloat16" takes half the bytes and rounds the state after each token.
    enable_lora: requests may have adapters (`LoRARequest`): see docs/lora.md.
    max_loras: the most adapters in one step. Each linear layer has memory for so many.
    max_lora_rank: the largest rank of an adapter.
    max_cpu_loras: the most adapters in host memory. None: max_loras.
    lora_biases: adapters may change the biases of linear layers.
    lora_experts: adapters may change experts, each of which then has memory as a linear layer has.
    lora_embeddings: adapters may change the table of tokens and the head.
    enable_prefix_caching: requests that begin with the same tokens share cache blocks.
    seed: the seed from which requests without a seed draw theirs.
    tensor_parallel_size: the number of devices that share the model, each with a part of every
        weight. It must divide the attention heads.
    expert_parallel: how tensor-parallel devices divide experts. True: each has an equal number of
        whole experts. False: each has a part of every expert. "auto" chooses by the experts' width:
        see docs/parallel.md.
    data_parallel_size: the number of engines that share the requests. Each is a process with all
        weights on `tensor_parallel_size` devices of its own.
    distributed_executor_backend: "mp" runs these engines as processes of this machine. "ray" runs
        them on the nodes of a Ray cluster, also a single one. See docs/parallel.md.
    npu_graph_mode: on an NPU, "ascend_ir" (the default: GE compiles whole steps), "aclgraph" (the
        engine captures decode steps) or "npugraph_ex" (torch_npu's compiler of that name rewrites
        and captures them).
    random_weights: draw weights from a seeded normal distribution. Only config.json is needed.
    quantization: converts the weights of linear layers as they are read: "int8", on a CPU, with a
        factor per output; "fp8" with a factor per output, experts too; "int4" with a factor for 128
        inputs, experts too, the head not. None: weights keep their dtype. See docs/quantization.md.
    expert_offload: keep all experts in host memory, and some of them on the device as well: a
        number of experts per layer, or bytes for the experts of all layers, such as "8GiB" or
        "500MB". See docs/experts.md.
    hf_overrides: fields of config.json and the values that replace them; dicts are merged. For
        example, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
        "original_max_position_embeddings": 32768}} extends Qwen3 to 131,072 positions.
    compile_cache: the folder of artifacts and kernels, which only its owner may access. None:
        NANOVLLM_CACHE.
    tokenizer: the folder or Hub id of another tokenizer. None: the checkpoint's.
    chat_template: a chat template, or the path of a file with one, in place of the checkpoint's.
    skip_tokenizer_init: load no tokenizer: prompts are token ids, and outputs have no text.
    revision: the branch, tag or commit of a Hub id.
    generation_config: "auto" takes sampling parameters from the checkpoint's generation_config.json
        for requests without any. "vllm" takes the defaults of `SamplingParams`.
    enable_sleep_mode: place weights and cache so that `LLM.sleep` can free them and captured graphs
        stay valid. Only `LLM.sleep` needs it.
    allowed_media_domains: hosts from which prompts may load images and videos by https URL.
    allowed_local_media_path: the folder from which prompts may load image and video files.
    limit_mm_per_prompt: the most images, videos and audio clips per prompt, such as {"image": 4,
        "video": 0}.
    media_limits: further limits on images, videos and audio, by their names in `MediaOptions`.
    max_grammar_bytes: the largest JSON schema, regular expression or grammar of a request, in
        bytes.
    grammar_timeout_s: the time in which a grammar must compile, in seconds; slower ones are
        refused.
    max_cached_grammars: the number of compiled grammars kept for later requests.
    disable_log_stats: False logs throughput, requests and cache use every ten seconds of work.
    task: "generate", or for a model that pools "embed", "classify", "score" or "reward", or
        "pooling" for what its checkpoint is made for: see docs/embeddings.md.
    pooler_config: how a model pools, in place of what the checkpoint says: {"pooling_type": "LAST",
        "CLS" or "MEAN", "normalize": True or False}.
    tuning: options for developers and measurements, by their names in `Tuning`, such as
        {"run_ahead": 0}. See nanovllm/tuning.py.
    compile_cache_mode: "auto" loads artifacts and compiles the missing ones. "require" compiles
        nothing and raises an error that lists what is missing and why.
    """

    model: str
    dtype: str = "auto"
    device: str = "auto"
    attention_backend: str = "auto"
    enforce_eager: bool = False
    deterministic: bool = False
    graph_batch_sizes: Sequence[int] | None = None
    draft_lengths: Sequence[int] = ()
    speculative_config: Mapping[str, object] | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_stall_ms: float | None = None
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    num_kvcache_blocks: int | None = None
    kvcache_block_size: int | None = None
    kv_cache_dtype: str = "auto"
    state_dtype: str = "auto"
    enable_lora: bool = False
    max_loras: int = 1
    max_lora_rank: int = 16
    max_cpu_loras: int | None = None
    lora_biases: bool = False
    lora_experts: bool = False
    lora_embeddings: bool = False
    enable_prefix_caching: bool = True
    seed: int = 0
    tensor_parallel_size: int = 1
    expert_parallel: bool | str = "auto"
    data_parallel_size: int = 1
    distributed_executor_backend: str = "mp"
    npu_graph_mode: str | None = None
    random_weights: bool = False
    quantization: str | None = None
    expert_offload: int | str | None = None
    hf_overrides: Mapping[str, object] | None = None
    compile_cache: str | PathLike[str] | None = None
    compile_cache_mode: str = "auto"
    tokenizer: str | PathLike[str] | None = None
    chat_template: str | PathLike[str] | None = None
    skip_tokenizer_init: bool = False
    revision: str | None = None
    generation_config: str = "auto"
    enable_sleep_mode: bool = False
    allowed_media_domains: Sequence[str] = ()
    allowed_local_media_path: str | PathLike[str] | None = None
    limit_mm_per_prompt: Mapping[str, int] | None = None
    media_limits: Mapping[str, int | float] | None = None
    max_grammar_bytes: int = 1 << 18
    grammar_timeout_s: float = 10.0
    max_cached_grammars: int = 128
    disable_log_stats: bool = True
    task: str = "generate"
    pooler_config: Mapping[str, object] | None = None
    tuning: Mapping[str, object] | None = None

    @classmethod
    def from_options(cls, model: str | PathLike[str], options: Mapping[str, Any]) -> EngineConfig:
        """The config for these options, which may have vLLM's names (see `options.translated`)."""
        known = [field.name for field in fields(cls)]
        options = moved(translated(options, known))
        refuse_unknown(cls, options)
        return cls(os.fspath(model) if isinstance(model, PathLike) else model, **options)

    def __post_init__(self) -> None:
        check_fields(self, ALLOWED)
        # through JSON, so that other processes get an equal value (`to_options`)
        if self.hf_overrides is not None:
            given = json.loads(json.dumps(self.hf_overrides))
            object.__setattr__(self, "hf_overrides", given)
        if self.tuning is not None:
            checked = {name: getattr(self.tuned, name) for name in self.tuning}
            object.__setattr__(self, "tuning", checked)
        if self.speculative is not None:
            object.__setattr__(self, "speculative_config", self.speculative.given)
        self._check_tuning(self.tuned)
        self._check_combinations()
        assert self.media
        assert self.template is None or self.template

    @property
    def tuned(self) -> Tuning:
        """The options of `tuning`. Raises ValueError or TypeError for invalid ones."""
        given: dict[str, Any] = dict(self.tuning or {})
        refuse_unknown(Tuning, given)
        return Tuning(**given)

    @property
    def speculative(self) -> SpeculativeConfig | None:
        """The values of `speculative_config`, None without it. Raises ValueError for invalid
        ones."""
        given = self.speculative_config
        return None if given is None else SpeculativeConfig.of(given)

    @property
    def verified_lengths(self) -> tuple[int, ...]:
        """The numbers of draft tokens that a decode step can verify per row, ascending."""
        if self.speculative is None:
            return tuple(sorted(set(self.draft_lengths)))
        return self.speculative.draft_lengths(adapts=self.adapts_drafts)

    @property
    def not_persistent(self) -> tuple[str, str] | None:
        """The option with which no decode step is one kernel, and why; None without one."""
        if self.enforce_eager:
            return "enforce_eager=True", "eager mode runs op by op"
        if self.deterministic:
            return "deterministic=True", "its sums have another order"
        if not self.tuned.fuse:
            return "tuning={'fuse': False}", "the kernel is fused"
        return None

    @property
    def adapts_drafts(self) -> bool:
        """Whether steps have as many draft tokens as pay. Batches without padding are not timed."""
        return self.tuned.adapt_draft_length and self.tuned.pad_batches

    @property
    def media(self) -> MediaOptions:
        """The options of media. Raises ValueError for invalid ones."""
        limits: dict[str, Any] = dict(self.media_limits or {})
        limits |= {f"max_{kind}s": num for kind, num in (self.limit_mm_per_prompt or {}).items()}
        return MediaOptions(
            tuple(self.allowed_media_domains), self.allowed_local_media_path or None, **limits
        )

    @property
    def template(self) -> str | None:
        """The chat template of the options, if any. Raises ValueError if it cannot be read."""
        given = self.chat_template
        if given is None or (isinstance(given, str) and ("{" in given or "\n" in given)):
            return given
        try:
            text = Path(given).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"chat_template is {str(given)!r}, neither a template nor a text file: {error}"
            ) from error
        if not text.strip():
            raise ValueError(f"chat_template is {str(given)!r}: the file is empty")
        return text

    @property
    def pools(self) -> bool:
        """Whether the model gives vectors or scores of whole prompts, and no text."""
        return self.task in POOLING_TASKS

    @property
    def num_cpu_loras(self) -> int:
        """The most adapters in host memory."""
        return self.max_loras if self.max_cpu_loras is None else self.max_cpu_loras

    @property
    def replicas_option(self) -> str:
        """The option that puts engines in other processes, as users write it; "" if none is set."""
        if self.data_parallel_size > 1:
            return f"data_parallel_size={self.data_parallel_size}"
        if self.distributed_executor_backend != "mp":
            return f"distributed_executor_backend={self.distributed_executor_backend!r}"
        return ""

    def _check_combinations(self) -> None:
        if self.skip_tokenizer_init and self.tokenizer is not None:
            raise ValueError(
                f"skip_tokenizer_init=True does not go with tokenizer={str(self.tokenizer)!r}"
            )
        if self.skip_tokenizer_init and self.chat_template is not None:
            raise ValueError("skip_tokenizer_init=True does not go with chat_template")
        if self.compile_cache_mode == "require" and self.enforce_eager:
            raise ValueError(
                "compile_cache_mode='require' needs enforce_eager=False: eager mode has no programs"
            )
        if self.speculative_config is not None and self.draft_lengths:
            raise ValueError(
                f"draft_lengths={list(self.draft_lengths)} does not go with speculative_config, "
                "which sets the numbers of draft tokens itself"
            )
        self._check_replicas()
        self._check_determinism()
        self._check_adapters()
        self._check_pooling()
        if self.expert_parallel is True and self.tensor_parallel_size == 1:
            raise ValueError(
                "expert_parallel=True needs tensor_parallel_size above 1: there is one device"
            )
        if self.expert_offload is not None and self.enable_sleep_mode:
            raise ValueError(
                f"expert_offload={self.expert_offload!r} does not go with enable_sleep_mode=True"
            )

    def _check_tuning(self, tuned: Tuning) -> None:
        if not tuned.pad_batches and not self.enforce_eager:
            raise ValueError("pad_batches=False needs enforce_eager=True: graphs have fixed sizes")
        if not tuned.fuse and self.enforce_eager:
            raise ValueError(
                "fuse=False needs enforce_eager=False: eager mode runs no graph passes"
            )
        if tuned.persistent_step and self.not_persistent is not None:
            option, why = self.not_persistent
            raise ValueError(f"persistent_step=True does not go with {option}: {why}")
        if tuned.expert_prefetch and self.expert_offload is None:
            raise ValueError("expert_prefetch=True needs expert_offload: all are on the device")
        captures = self.npu_graph_mode in ("aclgraph", "npugraph_ex")
        if captures and (tuned.run_ahead or not tuned.capture):
            raise ValueError(
                f"npu_graph_mode={self.npu_graph_mode!r} does not go with run_ahead="
                f"{tuned.run_ahead}, capture={tuned.capture}: captured steps wait "
                "for the tokens of the previous step"
            )

    def _check_determinism(self) -> None:
        unsupported = {
            f"attention_backend={self.attention_backend!r}": self.attention_backend != "auto",
            f"expert_offload={self.expert_offload!r}": self.expert_offload is not None,
            f"tensor_parallel_size={self.tensor_parallel_size}": self.tensor_parallel_size > 1,
            f"task={self.task!r}": self.pools,
            "tuning={'fuse': False}": not self.tuned.fuse,
            "tuning={'pad_batches': False}": not self.tuned.pad_batches,
        }
        for option, is_used in unsupported.items():
            if self.deterministic and is_used:
                raise ValueError(f"deterministic=True does not go with {option} yet")

    def _check_adapters(self) -> None:
        defaults = {
            "max_loras": 1, "max_lora_rank": 16, "max_cpu_loras": None, "lora_biases": False,
            "lora_experts": False, "lora_embeddings": False,
        }  # fmt: skip
        for name, default in defaults.items():
            value = getattr(self, name)
            if not self.enable_lora and value != default:
                raise ValueError(f"{name}={value} needs enable_lora=True: there are no adapters")
        if self.num_cpu_loras < self.max_loras:
            raise ValueError(
                f"max_cpu_loras is {self.max_cpu_loras}: it must be at least max_loras "
                f"({self.max_loras})"
            )
        if self.enable_lora and self.kv_cache_dtype == "fp8":
            raise ValueError(
                "kv_cache_dtype='fp8' does not go with enable_lora=True: the cache's scales are "
                "computed from the weights, without those of adapters"
            )

    def _check_pooling(self) -> None:
        unsupported = {
            "enable_lora=True": self.enable_lora,
            "enable_sleep_mode=True": self.enable_sleep_mode,
            f"draft_lengths={list(self.draft_lengths)}": bool(self.draft_lengths),
            f"speculative_config={self.speculative_config}": self.speculative_config is not None,
            f"expert_offload={self.expert_offload!r}": self.expert_offload is not None,
            f"kv_cache_dtype={self.kv_cache_dtype!r}": self.kv_cache_dtype != "auto",
            f"attention_backend={self.attention_backend!r}": self.attention_backend != "auto",
        }
        for option, is_used in unsupported.items():
            if self.pools and is_used:
                raise ValueError(f"task={self.task!r} does not go with {option}")
        if self.pooler_config is not None and not self.pools:
            raise ValueError(f"pooler_config needs a task that pools: task is {self.task!r}")

    def _check_replicas(self) -> None:
        unsupported = {
            "enable_sleep_mode=True": self.enable_sleep_mode,
            f"draft_lengths={list(self.draft_lengths)}": bool(self.draft_lengths),
            f"device={self.device!r}": ":" in self.device,
        }
        for option, is_used in unsupported.items():
            if self.replicas_option and is_used:
                raise ValueError(f"{self.replicas_option} does not go with {option}")
