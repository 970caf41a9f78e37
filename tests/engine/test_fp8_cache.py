"""An engine with an fp8 cache gives the same tokens in every batch and holds more of them.

Programs have keys of their own, devices without kernels refuse the option, and the embedded model
gives almost as many right answers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams, platforms
from nanovllm.compile.keys import program_key
from nanovllm.models.model import VARYING
from nanovllm.platforms.base import MemoryBudget
from tests.engines import assert_all_free, random_prompts, tokens

# scripts import each other as files of one folder
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from tiny.tasks import held_out, is_correct

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
# The accuracy that the fp8 cache may lose on the sample. The model answers all of the 130 questions
# or all but one correctly, so a larger loss is not noise.
ACCURACY_MARGIN = 0.02
NUM_QUESTIONS = 130


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    base = random_prompts([1, 15, 16, 17, 31, 33, 64, 99, 128])
    return [*base, [*base[7][:64], 9, 8], base[7], base[4]]


@pytest.fixture(scope="module")
def expected(make_llm: Callable[..., LLM], prompts: list[list[int]]) -> list[list[int]]:
    """Tokens of each prompt alone, without cache hits."""
    llm = make_llm(kv_cache_dtype="fp8", enable_prefix_caching=False)
    return [tokens(llm, [prompt], GREEDY)[0] for prompt in prompts]


def test_the_cache_is_fp8_and_full_of_numbers(
    make_llm: Callable[..., LLM], prompts: list[list[int]]
) -> None:
    llm = make_llm(kv_cache_dtype="fp8")
    tokens(llm, prompts, GREEDY)
    for cache in llm.engine.runner.steps.caches:
        assert cache.k_CBKH.dtype is cache.v_CBKH.dtype is torch.float8_e4m3fn
        for x in (cache.k_CBKH.float(), cache.v_CBKH.float()):
            assert x.any() and not x.isnan().any() and x.abs().max() < 448


@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graph"])
def test_batches_and_prefix_hits_change_nothing(
    make_llm: Callable[..., LLM],
    prompts: list[list[int]],
    expected: list[list[int]],
    enforce_eager: bool,
) -> None:
    llm = make_llm(kv_cache_dtype="fp8", enforce_eager=enforce_eager, graph_batch_sizes=(1, 5, 16))
    assert tokens(llm, prompts, GREEDY) == expected
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == expected
    assert [output["num_cached_tokens"] for output in outputs] == [
        (len(p) - 1) // 16 * 16 for p in prompts
    ]
    assert_all_free(llm)


def test_chunks_and_preemption_change_nothing(
    make_llm: Callable[..., LLM], prompts: list[list[int]], expected: list[list[int]]
) -> None:
    llm = make_llm(
        kv_cache_dtype="fp8", num_kvcache_blocks=13, max_num_batched_tokens=48, max_model_len=160
    )
    assert tokens(llm, prompts, GREEDY) == expected
    assert llm.engine.scheduler.num_preemptions > 0
    assert_all_free(llm)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_same_memory_holds_more_tokens(
    make_llm: Callable[..., LLM], device: str, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(
        type(platforms.select(device)), "memory_budget", lambda *_: MemoryBudget(200_000, 0)
    )
    options: dict[str, Any] = {"dtype": dtype, "num_kvcache_blocks": None, "max_model_len": 64}
    plain, fp8 = make_llm(**options), make_llm(**options, kv_cache_dtype="fp8")
    ratio = getattr(torch, dtype).itemsize
    assert fp8.engine.runner.block_bytes * ratio == plain.engine.runner.block_bytes
    assert (
        fp8.engine.scheduler.cache.pool.num_blocks
        == 200_000 * ratio // plain.engine.runner.block_bytes
    )
    held = sum(
        x.nbytes for cache in fp8.engine.runner.steps.caches for x in (cache.k_CBKH, cache.v_CBKH)
    )
    assert held == fp8.engine.memory.cache_bytes <= 200_000


def test_programs_for_an_fp8_cache_have_keys_of_their_own(make_llm: Callable[..., LLM]) -> None:
    keys = []
    for kv_cache_dtype in ("auto", "fp8"):
        llm = make_llm(kv_cache_dtype=kv_cache_dtype)
        runner = llm.engine.runner
        inputs: dict[str, object] = {"kv": runner.steps.caches[0]}
        keys.append(program_key(runner.model.layer, inputs, varying=VARYING, common={}))
    lines = keys[0].differences(keys[1].ingredients)
    assert (
        len(lines) == 4
        and any("float8_e4m3fn" in line for line in lines)
        and any("k_scale" in line for line in lines)
    )


def test_a_device_without_kernels_for_it_refuses(
    make_llm: Callable[..., LLM], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = platforms.select(device)
    platform.traits = replace(platform.traits, supports_fp8_cache=False)
    monkeypatch.setattr(platforms, "select", lambda *_, **__: platform)
    with pytest.raises(
        ValueError, match=f"kv_cache_dtype is 'fp8', which is not supported on this {device} device"
    ):
        make_llm(kv_cache_dtype="fp8")
    make_llm().close()


def test_the_embedded_model_answers_as_well() -> None:
    tasks = held_out(NUM_QUESTIONS, 1)
    accuracy = {}
    for kv_cache_dtype in ("auto", "fp8"):
        llm = LLM(
            "tiny-qwen3", kv_cache_dtype=kv_cache_dtype, enforce_eager=True, max_model_len=512
        )
        params = SamplingParams(temperature=0, max_tokens=64)
        outputs = llm.chat([task.messages for task in tasks], params, use_tqdm=False)
        right = [
            is_correct(task, output["text"]) for task, output in zip(tasks, outputs, strict=True)
        ]
        accuracy[kv_cache_dtype] = sum(right) / len(right)
        llm.close()
    assert accuracy["fp8"] >= accuracy["auto"] - ACCURACY_MARGIN > 0.9, accuracy
