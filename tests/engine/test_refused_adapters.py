"""Adapters that do not work are refused, or end their own requests alone."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, LoRARequest, platforms
from nanovllm.checks import InvalidValue
from nanovllm.config import EngineConfig
from nanovllm.models.lora.peft_config import WEIGHTS
from nanovllm.runner.tp_driver import TPDriver
from nanovllm.startup.resolve import resolve_without_weights
from tests.engine.adapter_cases import PROMPTS, SIZES, Asked, adapters, alone, asked, eager, make
from tests.engines import greedy
from tests.models import lora_cases

__all__ = ["adapters", "alone", "asked", "eager"]  # fixtures


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("a", 0, "/a"), "lora_int_id is 0: it must be a whole number, 1 …"),
        (("a", -1, "/a"), "lora_int_id is -1"),
        (("a", True, "/a"), "lora_int_id is True"),
        (("", 1, "/a"), "lora_name is '': it must be a text, and not empty"),
        (("a", 1, None), "lora_path is None"),
    ],
)
def test_requests_that_name_no_adapter_are_refused(arguments: Any, error: str) -> None:
    with pytest.raises(InvalidValue, match=error):
        LoRARequest(*arguments)


def test_adapters_that_do_not_work_are_refused_and_leave_nothing(
    eager: LLM, asked: Asked, tmp_path: Path, checkpoint: Path
) -> None:
    before = eager.engine.adapters.requests
    refused = {
        LoRARequest("x", 90, str(tmp_path)): "adapter 'x': .*adapter_config.json cannot be read",
        LoRARequest("french", 2, "/elsewhere"): "lora_int_id 2 is that of 'german' from .*, not of",
    }
    asked(eager, [PROMPTS[1]], ["german"], 1)
    for request, error in refused.items():
        with pytest.raises(InvalidValue, match=error) as raised:
            eager.generate([PROMPTS[1]] * 2, greedy(2), lora_request=[None, request])
        assert raised.value.field == "lora_request"
    with pytest.raises(ValueError, match="lora_request is 5: it must be a LoRARequest, or None"):
        eager.generate([PROMPTS[1]], greedy(2), lora_request=[5])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="1 lora requests for 2 prompts"):
        eager.generate([PROMPTS[1]] * 2, greedy(2), lora_request=[None])
    assert not eager.engine.has_unfinished
    assert {one.lora_name for one in before} <= {one.lora_name for one in asked.adapters.values()}


def test_an_engine_without_adapters_refuses_them(eager_llm: LLM, asked: Asked) -> None:
    with pytest.raises(InvalidValue, match="'french': adapters need the option enable_lora=True"):
        eager_llm.generate([[5]], greedy(1), lora_request=asked.of("french"))
    assert not eager_llm.engine.has_unfinished


@pytest.mark.parametrize("is_read_at_once", [False, True])
def test_numbers_that_are_not_finite_end_their_requests_alone(
    eager: LLM,
    tmp_path: Path,
    checkpoint: Path,
    alone: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    is_read_at_once: bool,
) -> None:
    """They are found as a thread reads the file, which may end before the request is queued."""
    folder = lora_cases.save_adapter(tmp_path, checkpoint, std=float("inf"))
    runner, requests = eager.engine.runner, [LoRARequest("bad", 50, str(folder)), None]

    def read(adapter_id: int) -> None:
        type(runner).read_adapter(runner, adapter_id)
        runner.wait_for_adapters(60)

    if is_read_at_once:
        monkeypatch.setattr(runner, "read_adapter", read)
    outputs = eager.generate(
        [PROMPTS[1], PROMPTS[0]], greedy(12), use_tqdm=False, lora_request=requests
    )
    assert outputs[0]["finish_reason"] == "error"
    assert "adapter 'bad': " in outputs[0]["error"] and "not finite" in outputs[0]["error"]
    assert outputs[1]["token_ids"] == alone[0]
    assert 50 not in {one.lora_int_id for one in eager.engine.adapters.requests}


def test_too_little_host_memory_ends_the_requests_of_an_adapter_alone(
    checkpoint: Path, asked: Asked, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(num_bytes: int) -> torch.Tensor:
        raise RuntimeError("can't allocate memory\nExceptions raised from …")

    llm = make(checkpoint)
    requests, prompts = [asked.of(name) for name in ("french", None)], [PROMPTS[1], PROMPTS[0]]
    with monkeypatch.context() as patched:
        patched.setattr(llm.engine.runner.platform, "host_buffer", allocate)
        found = llm.generate(prompts, greedy(12), use_tqdm=False, lora_request=requests)
    assert found[0]["finish_reason"] == "error"
    assert found[0]["error"] == (
        "reading adapter 'french' has failed: RuntimeError: can't allocate memory"
    )
    assert found[1]["token_ids"] == alone[0] and not llm.engine.adapters.requests
    assert asked.tokens(llm, PROMPTS[1:2], ["french"]) == alone[1:2]
    llm.close()


def test_a_read_that_fails_on_another_rank_ends_its_requests_alone(
    tmp_path: Path,
    checkpoint: Path,
    asked: Asked,
    alone: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its file changes once the first rank has read it."""
    folder = lora_cases.save_adapter(tmp_path / "good", checkpoint)
    damaged = lora_cases.save_adapter(tmp_path / "bad", checkpoint, std=float("inf"))
    llm = make(checkpoint, tensor_parallel_size=2)
    runner = llm.engine.runner
    assert isinstance(runner, TPDriver)
    send = runner.ranks.send

    def send_late(name: str, payload: bytes = b"") -> None:
        if name == "read_adapter":
            runner.adapters.wait(60)
            shutil.copyfile(damaged / WEIGHTS, folder / WEIGHTS)
        send(name, payload)

    requests = [LoRARequest("bad", 50, str(folder)), None]
    with monkeypatch.context() as patched:
        patched.setattr(runner.ranks, "send", send_late)
        found = llm.generate(
            [PROMPTS[1], PROMPTS[0]], greedy(12), use_tqdm=False, lora_request=requests
        )
    assert found[0]["finish_reason"] == "error"
    assert "adapter 'bad': rank 1: " in found[0]["error"] and "not finite" in found[0]["error"]
    assert found[1]["token_ids"] == alone[0] and not llm.engine.adapters.requests
    assert asked.tokens(llm, PROMPTS[1:2], ["french"]) == alone[1:2]
    llm.close()


def test_options_of_adapters_that_do_not_go_together_are_refused(checkpoint: Path) -> None:
    for options, error in (
        ({"max_cpu_loras": 1}, "max_cpu_loras is 1: it must be at least max_loras"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8' does not go with enable_lora=True"),
        ({"max_lora_rank": 513}, "max_lora_rank is 513"),
        ({"enable_lora": False}, "max_loras=2 needs enable_lora=True"),
    ):
        with pytest.raises(ValueError, match=error):
            make(checkpoint, **options)


def test_a_device_whose_kernels_are_not_ready_refuses_the_option() -> None:
    config = EngineConfig.from_options("tiny-qwen3", {**SIZES, "enable_lora": True})
    platform = platforms.select("cpu")
    platform.traits = replace(platform.traits, supports_adapters=False)
    with pytest.raises(ValueError, match="enable_lora=True is not supported on the device cpu"):
        resolve_without_weights(config, platform)
