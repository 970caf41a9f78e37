"""What of vLLM's and nano-vllm's interfaces works here: the content of docs/compatibility.md.

    python -m tests.compat.table        # writes the file

Every name is tried with vLLM's default and with another value. `works` is claimed for names that a
test uses, `refused` for names that raise an error with the name in it.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from nanovllm import (
    LLM,
    AsyncLLM,
    CompletionOutput,
    EngineConfig,
    LLMEngine,
    RequestOutput,
    SamplingParams,
)
from nanovllm.cli.main import COMMANDS
from nanovllm.compat.modules import MODULES
from nanovllm.compat.modules import ROOT as PACKAGE
from nanovllm.flags import Parser
from nanovllm.option_names import CONVERTS, LOAD_FORMATS, ONE_VALUE, RUNNERS, SAME_MEANING, WARNINGS
from nanovllm.sampling import RequestOutputKind
from tests.compat import formats

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
CALLS, METHODS = "tests/compat/test_vllm_calls.py", "tests/engine/test_methods.py"
OUTPUTS = "tests/test_llm_outputs.py"
IMPORTS, FLAGS = "tests/compat/test_imports.py", "tests/cli/test_flags.py"
ASYNC = "tests/serving/test_async_llm.py"
ADAPTERS, SERVED = "tests/engine/test_adapters.py", "tests/api/test_served_adapters.py"
ADAPTER_OPTIONS = "tests/engine/test_refused_adapters.py"
POOLING = "tests/pooling/test_decoders.py"
POOLING_IMAGES = "tests/pooling/test_pooling_images.py"
SLEEP, NANO = "tests/engine/test_sleep.py", "tests/compat/test_nano_vllm.py"

# vLLM's SamplingParams: each field with a value that is not its default, and the test of its effect
SAMPLING: dict[str, tuple[Any, str]] = {
    "n": (2, OUTPUTS),
    "presence_penalty": (0.5, "tests/runner/test_logit_edits.py"),
    "frequency_penalty": (0.5, "tests/runner/test_logit_edits.py"),
    "repetition_penalty": (1.5, "tests/runner/test_sampling.py"),
    "temperature": (0.5, "tests/runner/test_sampling.py"),
    "top_p": (0.5, "tests/runner/test_sampling.py"),
    "top_k": (5, "tests/runner/test_sampling.py"),
    "min_p": (0.5, "tests/runner/test_sampling.py"),
    "seed": (7, "tests/engine/test_seeds.py"),
    "stop": (["x"], "tests/engine/test_endings.py"),
    "stop_token_ids": ([7], "tests/engine/test_endings.py"),
    "ignore_eos": (True, "tests/engine/test_endings.py"),
    "max_tokens": (None, METHODS),
    "min_tokens": (3, "tests/engine/test_endings.py"),
    "logprobs": (-1, OUTPUTS),
    "prompt_logprobs": (-1, OUTPUTS),
    "detokenize": (False, OUTPUTS),
    "skip_special_tokens": (False, OUTPUTS),
    "spaces_between_special_tokens": (False, "tests/schedule/test_outputs.py"),
    "include_stop_str_in_output": (True, OUTPUTS),
    "output_kind": (RequestOutputKind.DELTA, CALLS),
    "logit_bias": ({7: 1.0}, METHODS),
    "allowed_token_ids": ([7], METHODS),
    "bad_words": (["x"], METHODS),
    "truncate_prompt_tokens": (7, METHODS),
    "best_of": (2, ""),
    "structured_outputs": ({"regex": "x"}, "tests/structured/test_answers.py"),
    "disable_spec_decode": (True, "tests/engine/test_speculation.py"),
    "guided_decoding": ({"regex": "x"}, ""),
    "logits_processors": ([print], ""),
    "extra_args": ({"x": 1}, ""),
    "flat_logprobs": (True, ""),
    "logprob_token_ids": ([7], ""),
    "prompt_logprob_token_ids": ([7], ""),
    "prompt_logprob_start": (1, ""),
    "repetition_detection": (object(), ""),
    "thinking_token_budget": (7, ""),
    "skip_reading_prefix_cache": (True, ""),
    "stream_interval": (2, ""),
}
# options of ours that vLLM has under the same name
SAME_NAME = {
    "model": CALLS, "tokenizer": METHODS, "skip_tokenizer_init": METHODS,
    "revision": "tests/test_hub.py", "dtype": CALLS, "seed": "tests/engine/test_seeds.py",
    "max_model_len": METHODS, "max_num_seqs": METHODS,
    "max_num_batched_tokens": "tests/engine/test_logprobs.py",
    "gpu_memory_utilization": "tests/platforms/test_mps.py",
    "kv_cache_dtype": "tests/engine/test_fp8_cache.py",
    "enable_prefix_caching": "tests/engine/test_invariance.py", "enforce_eager": CALLS,
    "hf_overrides": "tests/startup/test_config_file.py", "generation_config": METHODS,
    "chat_template": "tests/test_chat.py", "disable_log_stats": METHODS, "enable_sleep_mode": SLEEP,
    "quantization": "tests/models/test_int8.py",
    "allowed_local_media_path": "tests/engine/test_images.py",
    "allowed_media_domains": "tests/media/test_media_fetch.py",
    "limit_mm_per_prompt": "tests/engine/test_bad_images.py",
    "data_parallel_size": "tests/replicas/test_data_parallel.py",
    "tensor_parallel_size": "tests/engine/test_tensor_parallel.py",
    "distributed_executor_backend": "tests/replicas/test_ray_replicas.py",
    "speculative_config": "tests/engine/test_speculation_options.py",
    **dict.fromkeys(
        ("enable_lora", "max_loras", "max_lora_rank", "max_cpu_loras"), ADAPTER_OPTIONS
    ),
    "task": CALLS, "pooler_config": CALLS,
}  # fmt: skip
# vLLM's methods of LLM and LLMEngine
LLM_METHODS = {
    "generate": CALLS, "chat": CALLS, "beam_search": METHODS, "get_tokenizer": CALLS,
    "set_tokenizer": METHODS, "get_default_sampling_params": CALLS, "llm_engine": CALLS,
    "reset_prefix_cache": CALLS, "get_metrics": METHODS, "sleep": SLEEP, "wake_up": SLEEP,
    "encode": POOLING, "embed": POOLING_IMAGES, "classify": POOLING_IMAGES, "reward": POOLING,
    "score": POOLING,
}  # fmt: skip
LLM_WORDS = {
    **dict.fromkeys(("embed", "classify"), "works, also for images and conversations"),
    "score": "works for pairs of texts",
}
LLM_REFUSED = ("start_profile", "stop_profile")
LLM_ABSENT = ("collective_rpc", "apply_model", "reset_mm_cache")
ASYNC_METHODS = {
    "from_engine_args": IMPORTS, "generate": "tests/serving/test_clients.py",
    "abort": IMPORTS, "encode": "tests/pooling/test_served_pooling.py", "shutdown": ASYNC,
    "add_lora": SERVED, "remove_lora": SERVED,
}  # fmt: skip
ASYNC_REFUSED = ("start_profile", "stop_profile")
# vLLM's flags of `vllm serve` that are no options of an engine, or that have other forms here
SERVE_FLAGS = {
    "-tp": "the same as `--tensor-parallel-size`", "-dp": "the same as `--data-parallel-size`",
    "-q": "the same as `--quantization`", "--config": "a YAML file with flags",
    "--chat-template": "a file or a text", "--host": "", "--port": "", "--api-key": "",
    "--served-model-name": "", "--ssl-certfile": "", "--ssl-keyfile": "", "--root-path": "",
    "--allowed-origins": "a list, not JSON", "--uvicorn-log-level": "",
    "--api-server-count": "the same as `--api-processes`; by default one for each replica",
    "-asc": "the same",
    "--disable-log-requests": "the same as `--no-access-log`",
    "--disable-uvicorn-access-log": "the same",
    "--enable-log-requests": "the same as `--access-log`",
    "--default-chat-template-kwargs": "",
    "--lora-modules": "`NAME=FOLDER`, not JSON",
    "--tool-call-parser": "`auto` is the default; `llama3_json`, `deepseek_v3`, `deepseek_v31`, "
    "`qwen3_xml` and `glm47` are other names ([tools.md](tools.md)); `openai` is that of gpt-oss",
    "--reasoning-parser": "`auto` is the default; `qwen3`, `deepseek_r1` and `glm45` are `think`; "
    "`openai_gptoss` is that of gpt-oss",
    "--enable-auto-tool-choice": "not needed",
}  # fmt: skip
ENGINE_METHODS = (
    "from_engine_args", "add_request", "abort_request", "step", "has_unfinished_requests",
    "get_num_unfinished_requests", "get_metrics",
)  # fmt: skip
REQUEST_OUTPUT = (
    "request_id", "prompt", "prompt_token_ids", "prompt_logprobs", "outputs", "finished",
    "lora_request", "encoder_prompt", "metrics",
)  # fmt: skip
COMPLETION_OUTPUT = (
    "index", "text", "token_ids", "cumulative_logprob", "logprobs", "finish_reason", "stop_reason",
    "finished", "lora_request",
)  # fmt: skip
NANO_NAMES = (
    "add_request", "step", "is_finished", "exit", "nanovllm.sampling_params",
    "nanovllm.engine.llm_engine",
)  # fmt: skip


def refusal(make: Callable[[], object], name: str) -> str:
    """The error of a call, which must have the name in it; "" if there is none."""
    try:
        make()
    except (ValueError, TypeError, AttributeError) as error:
        assert name in str(error), f"{name}: {error}"
        return "ValueError" if isinstance(error, ValueError) else type(error).__name__
    return ""


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def shown(name: str, path: str) -> str:
    """A link to the test of a name, which must be in the file."""
    assert name in (ROOT / path).read_text(encoding="utf-8"), f"{path} does not use {name}"
    return f"[{Path(path).name}](../{path})"


def sampling_rows() -> list[str]:
    rows = []
    for name, (value, path) in SAMPLING.items():
        default = getattr(SamplingParams, name)
        assert not refusal(
            lambda name=name, default=default: SamplingParams(**{name: default}), name
        )
        error = refusal(lambda name=name, value=value: SamplingParams(**{name: value}), name)
        assert bool(error) == (not path), name
        rows.append(
            row(f"`{name}`", "works", shown(name, path))
            if path
            else row(f"`{name}`", f"only `{default}`", error)
        )
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert fields == set(SAMPLING), fields ^ set(SAMPLING)
    return rows


def option_rows() -> list[str]:
    def make(**options: Any) -> Callable[[], object]:
        return lambda: EngineConfig.from_options("m", options)

    rows = [row(f"`{name}`", "works", shown(name, path)) for name, path in SAME_NAME.items()]
    ours = {field.name for field in dataclasses.fields(EngineConfig)}
    assert set(SAME_NAME) <= ours
    for theirs, name in SAME_MEANING.items():
        rows.append(row(f"`{theirs}`", f"works, as `{name}`", shown(theirs, CALLS)))
    for name, values in (("runner", RUNNERS), ("convert", CONVERTS)):
        words = f"{', '.join(f'`{one}`' for one in values)} work"
        rows.append(row(f"`{name}`", words, shown(name, CALLS)))
    formats = ", ".join(f"`{one}`" for one in LOAD_FORMATS)
    rows.append(row("`load_format`", f"{formats} work", shown("load_format", CALLS)))
    for name in WARNINGS:
        assert not refusal(make(**{name: True}), name)
        words = "`False`; `True` has no effect and logs a warning"
        rows.append(row(f"`{name}`", words, shown(name, CALLS)))
    for name, values in ONE_VALUE.items():
        if name in WARNINGS:
            continue
        for value in values:
            assert not refusal(make(**{name: value}), name)
        error = refusal(make(**{name: object()}), name)
        assert error, name
        rows.append(row(f"`{name}`", "only " + ", ".join(f"`{one!r}`" for one in values), error))
    error = refusal(make(an_option_of_tomorrow=1), "an_option_of_tomorrow")
    return [*rows, row("any other", "refused by name", error)]


def method_rows() -> list[str]:
    rows = []
    for name, path in LLM_METHODS.items():
        assert hasattr(LLM, name)
        rows.append(row(f"`LLM.{name}`", LLM_WORDS.get(name, "works"), shown(name, path)))
    for name in LLM_REFUSED:
        method = getattr(LLM, name)
        error = refusal(lambda method=method: method(None), name)
        assert error, name
        rows.append(row(f"`LLM.{name}`", "refused by name", error))
    for name in LLM_ABSENT:
        error = refusal(lambda name=name: getattr(LLM, name), name)
        assert error, name
        rows.append(row(f"`LLM.{name}`", "absent", error))
    for name in ENGINE_METHODS:
        assert hasattr(LLMEngine, name)
        rows.append(row(f"`LLMEngine.{name}`", "works", shown(name, CALLS)))
    for name, path in ASYNC_METHODS.items():
        assert hasattr(AsyncLLM, name)
        rows.append(row(f"`AsyncLLM.{name}`", "works", shown(name, path)))
    for name in ASYNC_REFUSED:
        error = refusal(lambda name=name: asyncio.run(getattr(AsyncLLM, name)(None)), name)
        assert error, name
        rows.append(row(f"`AsyncLLM.{name}`", "refused by name", error))
    return rows


def import_rows() -> list[str]:
    rows = []
    for path, names in MODULES.items():
        module = import_module(f"{PACKAGE}.{path}")
        for name in names:
            assert hasattr(module, name)
            cells = "works", shown(path, IMPORTS)
            rows.append(row(f"`from nanovllm.{path} import {name}`", *cells))
    for name in ("RequestOutput", "CompletionOutput"):
        assert hasattr(import_module(f"{PACKAGE}.outputs"), name)
        cells = "works", shown("outputs", IMPORTS)
        rows.append(row(f"`from nanovllm.outputs import {name}`", *cells))
    return rows


def flag_rows() -> list[str]:
    parser = Parser(prog="serve")
    import_module(COMMANDS["serve"].module).add_arguments(parser)
    known, rows = parser._option_string_actions, []
    for flag, words in SERVE_FLAGS.items():
        assert flag in known, flag
        text = f"works: {words}" if words else "works"
        rows.append(row(f"`{flag}`", text, shown(flag, FLAGS)))
    return rows


def output_rows() -> list[str]:
    rows = []
    kinds = ((RequestOutput, REQUEST_OUTPUT), (CompletionOutput, COMPLETION_OUTPUT))
    for kind, names in kinds:
        for name in names:
            is_none = name in kind.ABSENT_AS_NONE and name not in kind.__annotations__
            assert is_none or name in kind.__annotations__ or hasattr(kind, name), name
            test = ADAPTERS if name == "lora_request" else OUTPUTS
            cells = ("always None", "") if is_none else ("works", shown(name, test))
            rows.append(row(f"`{kind.__name__}.{name}`", *cells))
    cached = shown("num_cached_tokens", CALLS)
    return [*rows, row("`RequestOutput.num_cached_tokens`", "works", cached)]


FORMATS_TEXT = """Tests on a CPU show eager steps, graphs, several ranks and experts: logits are those of the same
numbers, dequantized by other code. "kernel": linear layers of the format have a kernel that reads
its codes. "dequantized at the load": weights have the dtype of the model. The kernels of CUDA have tests
of their own. [quantization.md](quantization.md) says what a format covers.
"""  # noqa: E501


def page() -> str:
    head = "| name | here | shown by, or error |\n|---|---|---|"
    nano = [row(f"`{name}`", "works", shown(name, NANO)) for name in NANO_NAMES]
    sections = {
        "Options of `LLM` and `EngineArgs`": option_rows(),
        "Fields of `SamplingParams`": sampling_rows(),
        "Methods": method_rows(),
        "Outputs": output_rows(),
        "Import paths": import_rows(),
        "Flags of `nanovllm serve`": flag_rows(),
        "nano-vllm": nano,
    }
    text = """# Coming from vLLM or nano-vllm

Change the import. Every option and field has the same meaning as in vLLM, or is refused with an
error that names it. Nothing is silently ignored.

`tests/compat/table.py` writes this page, and a test compares the two. It tries every name below
with its default and with another value.

Differences: `max_tokens` is 64 by default (vLLM: 16). `max_model_len` above the
checkpoint's limit is lowered to it with a warning, as nano-vllm does. Requests always run by
priority, first come, first served within one. The metrics of `get_metrics` are named
`nanovllm:…`; those of a server have vLLM's names ([metrics.md](metrics.md)). Outputs can also be
read as dicts: `output["text"]`. On the command line numbers may end with a letter, as in vLLM: `2k`
is 2,000 and `2K` is 2,048.
"""
    for title, rows in sections.items():
        text += f"\n## {title}\n\n{head}\n" + "\n".join(rows) + "\n"
    return text + f"\n## Formats of quantized weights\n\n{FORMATS_TEXT}\n{formats.table()}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
