"""Import lines of programs for vLLM, with `vllm` replaced by `nanovllm`."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import nanovllm
from nanovllm import AsyncEngineArgs, AsyncLLM, EngineConfig, SamplingParams, log
from nanovllm.serving import async_llm

ROOT = Path(__file__).parents[2]
LINES = """
from nanovllm.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from nanovllm.sampling_params import StructuredOutputsParams
from nanovllm.inputs import PromptType, TextPrompt, TokensPrompt
from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.utils import FlexibleArgumentParser
from nanovllm.lora.request import LoRARequest
from nanovllm.entrypoints.llm import LLM
from nanovllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from nanovllm.engine.async_llm_engine import AsyncLLMEngine
from nanovllm.v1.engine.async_llm import AsyncLLM
from nanovllm.v1.engine.llm_engine import LLMEngine
from nanovllm.engine.llm_engine import LLMEngine as NanoEngine
"""


def test_import_lines_of_vllm_work_as_the_first_ones_of_a_program() -> None:
    script = LINES + (
        "from nanovllm.utils import *\n"
        "import nanovllm, nanovllm.inputs\n"
        "assert nanovllm.SamplingParams is SamplingParams and nanovllm.LLM is LLM is NanoEngine\n"
        "assert nanovllm.inputs.TextPrompt is nanovllm.TextPrompt is TextPrompt\n"
        "assert nanovllm.AsyncLLMEngine is AsyncLLMEngine is AsyncLLM\n"
        "assert nanovllm.LLMEngine is LLMEngine and issubclass(AsyncEngineArgs, EngineArgs)\n"
        "assert len(random_uuid()) == 32\n"
        "args = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(['-tp', '2'])\n"
        "assert AsyncEngineArgs.from_cli_args(args).tensor_parallel_size == 2\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_what_is_not_there_is_refused_with_the_reason() -> None:
    with pytest.raises(AttributeError, match=r"'nanovllm\.inputs' has no 'x': it has TextPrompt"):
        _ = import_module("nanovllm.inputs").x
    with pytest.raises(ModuleNotFoundError, match=r"nanovllm\.distributed"):
        import_module("nanovllm.distributed")


def test_the_base_install_has_the_engine_for_event_loops() -> None:
    """It imports none of the packages that the server adds."""
    others = ("httptools", "llguidance", "prometheus_client", "starlette", "uvicorn", "uvloop")
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({others!r}))\n"
        "from nanovllm import *; print(AsyncLLM is AsyncLLMEngine)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "True\n", done.stderr


def test_an_async_engine_is_made_of_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[EngineConfig] = []

    class Refused(Exception):
        pass

    def process(config: EngineConfig, num_clients: int) -> None:
        made.append(config)
        raise Refused

    monkeypatch.setattr(async_llm, "EngineProcess", process)
    monkeypatch.setattr(log, "configure", lambda: None)
    args = AsyncEngineArgs(model="tiny-qwen3", block_size=32, disable_log_requests=True)
    with pytest.raises(Refused):
        AsyncLLM.from_engine_args(args, usage_context="x")
    assert made == [EngineConfig("tiny-qwen3", kvcache_block_size=32)]
    for option, value in (("start_engine_loop", False), ("stat_loggers", [])):
        with pytest.raises(ValueError, match=option):
            AsyncLLM.from_engine_args(args, **{option: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="disable_log_requests is False"):
        AsyncEngineArgs(model="tiny-qwen3", disable_log_requests=False)


def test_abort_can_be_awaited() -> None:
    ended: list[object] = []
    llm = object.__new__(AsyncLLM)
    llm.__dict__ |= {"_feeds": {"a": "A", "b": "B", "c": "C"}, "_opening": {}}
    llm.__dict__["abort_feed"] = ended.append

    async def work() -> None:
        llm.abort("a")
        await llm.abort(["c", "unknown", "b"])

    asyncio.run(work())
    assert ended == ["A", "C", "B"]


def test_an_output_has_no_metrics() -> None:
    from nanovllm.outputs import RequestOutput

    assert RequestOutput(request_id="a").metrics is None
    assert nanovllm.SamplingParams is SamplingParams
