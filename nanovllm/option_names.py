"""vLLM's option names: those with the same meaning here, and those with one supported value.

`nanovllm/config.py` defines the options. No option is silently ignored: an unimplemented option of
vLLM is accepted with its default, which means "off", and refused by name with any other value.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

logger = logging.getLogger(__name__)

SAME_MEANING = {
    "block_size": "kvcache_block_size",
    "num_gpu_blocks_override": "num_kvcache_blocks",
    "cudagraph_capture_sizes": "graph_batch_sizes",
    "enable_expert_parallel": "expert_parallel",
    "mamba_ssm_cache_dtype": "state_dtype",
    "override_pooler_config": "pooler_config",
}
# vLLM's short flags
SHORT = {
    "tensor_parallel_size": ("-tp",), "data_parallel_size": ("-dp",),
    "pipeline_parallel_size": ("-pp",), "quantization": ("-q",),
}  # fmt: skip
# vLLM's names for the server's flags
SERVER_FLAGS = {
    "api_processes": ("--api-server-count", "-asc"),
    "access_log": ("--enable-log-requests",),
}
NO_ACCESS_LOG = ("--disable-log-requests", "--disable-uvicorn-access-log")
OF_LOGS = ("enable_log_requests", "disable_log_requests")
# vLLM's None, for options whose default here is not None
NONE_IS_DEFAULT = (
    "seed", "enforce_eager", "enable_prefix_caching", "distributed_executor_backend"
)  # fmt: skip
DTYPES = {"half": "float16", "float": "float32"}
CACHE_DTYPES = {"fp8_e4m3": "fp8"}
LOAD_FORMATS = {"auto": False, "safetensors": False, "dummy": True}
# The accepted values of unimplemented vLLM options. The first one is vLLM's default.
ONE_VALUE: dict[str, tuple[Any, ...]] = {
    "tokenizer_mode": ("auto", "hf"),
    "trust_remote_code": (False, True),
    "download_dir": (None,),
    "config_format": ("auto", "hf"),
    "hf_config_path": (None,),
    "hf_token": (None,),
    "code_revision": (None,),
    "tokenizer_revision": (None,),
    "served_model_name": (None,),
    "pipeline_parallel_size": (1,),
    "max_parallel_loading_workers": (None,),
    "disable_sliding_window": (False,),
    "disable_cascade_attn": (False,),
    "disable_custom_all_reduce": (False,),
    "enable_chunked_prefill": (True, None),
    "max_num_partial_prefills": (1,),
    "scheduling_policy": ("fcfs", "priority"),
    "async_scheduling": (None,),
    "swap_space": (4, 0),
    "cpu_offload_gb": (0,),
    "kv_cache_memory_bytes": (None,),
    "max_logprobs": (20,),
    "compilation_config": (None,),
    "max_cudagraph_capture_size": (None,),
    "mm_processor_kwargs": (None,),
    "lora_dtype": ("auto",),
    "fully_sharded_loras": (False,),
    "default_mm_loras": (None,),
    "logits_processors": (None,),
    "override_generation_config": (None, {}),
    "model_impl": ("auto",),
    "calculate_kv_scales": (False, None),
    "mamba_cache_dtype": ("auto",),
    "kv_transfer_config": (None,),
    "enable_return_routed_experts": (False,),
    "use_tqdm_on_load": (True,),
    "worker_cls": ("auto",),
    "rope_scaling": (None, {}),
    "rope_theta": (None,),
    "enable_log_requests": (False,),
    "disable_log_requests": (True,),
}

# What vLLM's values of `runner` and `convert` mean for `task`
RUNNERS = {"auto": "auto", "generate": "generate", "pooling": "pooling"}
CONVERTS = {
    "auto": "auto", "none": "auto", "embed": "embed", "classify": "classify", "reward": "reward",
}  # fmt: skip

# Warnings for accepted values other than False.
WARNINGS = {
    "trust_remote_code": "has no effect: code in checkpoints is never run. Checkpoints that need "
    "theirs are refused"
}


def translated(options: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """Options under the names in `known`. Unknown names are kept, for the caller to refuse.

    Raises ValueError for an unsupported value of a vLLM option, and for an option set under both
    names.
    """
    found = dict(options)
    for name in NONE_IS_DEFAULT:
        if name in found and found[name] is None:
            del found[name]
    for theirs, ours in SAME_MEANING.items():
        if theirs in found:
            _rename(found, theirs, ours)
    if "load_format" in found and LOAD_FORMATS[_allowed_format(found.pop("load_format"))]:
        found["random_weights"] = True
    for name in found.keys() & ONE_VALUE.keys() - set(known):
        value = found.pop(name)
        # True == 1, but they mean different things
        kind = isinstance(value, bool)
        if not any(value == one and kind == isinstance(one, bool) for one in ONE_VALUE[name]):
            raise ValueError(f"{name} is {value!r}: only {ONE_VALUE[name][0]!r} is supported")
        if name in WARNINGS and value:
            logger.warning("%s=%r %s", name, value, WARNINGS[name])
    _translate_values(found)
    _translate_task(found)
    return found


def _translate_task(options: dict[str, Any]) -> None:
    """The option `task` from vLLM's `runner` and `convert`. Raises ValueError for unknown values,
    and for options that contradict each other."""
    runner, convert = (options.pop(name, "auto") for name in ("runner", "convert"))
    for name, value, known in (("runner", runner, RUNNERS), ("convert", convert, CONVERTS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(known)}")
    given = options.pop("task", None)
    found = {
        one for one in (given, RUNNERS[runner], CONVERTS[convert]) if one not in (None, "auto")
    }
    if len(found) > 1:
        found.discard("pooling")  # the others say for what
    if len(found) > 1 or (found and runner == "pooling" and "generate" in found):
        raise ValueError(
            f"task is {given!r}, runner {runner!r} and convert {convert!r}: they contradict each "
            "other"
        )
    if found:
        options["task"] = found.pop()


def _translate_values(options: dict[str, Any]) -> None:
    """Replace vLLM's names of values that have another name here."""
    if "dtype" in options:
        options["dtype"] = _dtype(options["dtype"])
    cache_dtype = options.get("kv_cache_dtype")
    if isinstance(cache_dtype, str):
        options["kv_cache_dtype"] = CACHE_DTYPES.get(cache_dtype, cache_dtype)
    has_one_rank = all(options.get(f"{kind}_parallel_size", 1) == 1 for kind in ("tensor", "data"))
    if options.get("distributed_executor_backend") == "uni" and has_one_rank:
        options["distributed_executor_backend"] = "mp"  # also one process


def _allowed_format(given: object) -> str:
    if not isinstance(given, str) or given not in LOAD_FORMATS:
        raise ValueError(f"load_format is {given!r}: use one of {', '.join(LOAD_FORMATS)}")
    return given


def _rename(options: dict[str, Any], theirs: str, ours: str) -> None:
    value = options.pop(theirs)
    if ours in options and options[ours] != value:
        raise ValueError(f"{theirs} and {ours} are the same option: use one of them")
    options[ours] = value


def _dtype(value: Any) -> Any:
    """The name of a dtype from a torch.dtype or vLLM's shorthand."""
    if type(value).__module__ == "torch":
        return str(value).removeprefix("torch.")
    return DTYPES.get(value, value) if isinstance(value, str) else value
