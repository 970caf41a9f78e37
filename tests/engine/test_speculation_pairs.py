"""Drafts together with other capabilities: answers are those without drafts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, LoRARequest, SamplingParams
from nanovllm.cli.main import run
from tests.conftest import save_tiny
from tests.engines import assert_all_free, greedy, random_prompts, tokens
from tests.models import lora_cases
from tests.models.test_vision_text import Given, answers, engine, saved
from tests.runner import test_dflash
from tests.runner.heads import EagleCase

NUM = 3
METHODS = ("ngram", "draft_model", "eagle3", "dflash")
PROMPTS = [*random_prompts([19, 40, 7], seed=3), random_prompts([7], seed=4)[0] * 5]
DRAWN = SamplingParams(temperature=0.9, seed=4, max_tokens=12, ignore_eos=True)
SIZES: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "enforce_eager": True, "max_model_len": 128,
    "kvcache_block_size": 16, "max_num_seqs": 4, "max_num_batched_tokens": 64,
    "num_kvcache_blocks": 60, "skip_tokenizer_init": True,
}  # fmt: skip
Opened = Callable[..., Any]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    return save_tiny(folder, "qwen3", vocab_size=512, hidden_size=64, num_hidden_layers=4)


@pytest.fixture(scope="module")
def heads(target: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What each method reads beside the model."""
    root = tmp_path_factory.mktemp("heads")
    eagle = EagleCase("midlayer").save(root / "eagle3")
    return {"draft_model": target, "eagle3": eagle, "dflash": test_dflash.save(root / "dflash")}


def speculative(method: str, heads: dict[str, Path]) -> dict[str, Any]:
    """The options of a method whose steps always have drafts."""
    given: dict[str, Any] = {"method": method, "num_speculative_tokens": NUM}
    if method in heads:
        given["model"] = str(heads[method])
    tuning = {"adapt_draft_length": False, "run_ahead": 1}
    return {"speculative_config": given, "tuning": tuning}


@contextmanager
def opened(folder: Path, **options: Any) -> Iterator[LLM]:
    llm = LLM(str(folder), **{**SIZES, **options})
    try:
        yield llm
        assert_all_free(llm)
    finally:
        llm.close()


def assert_drafts(llm: LLM) -> None:
    assert llm.engine.scheduler.counts.num_drafts > 10


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_the_model_may_be_quantized(
    quantization: str, target: Path, heads: dict[str, Path]
) -> None:
    with opened(target, quantization=quantization) as plain:
        expected = [tokens(plain, PROMPTS, params) for params in (greedy(12), DRAWN)]
    for method in METHODS:
        options = {"quantization": quantization, **speculative(method, heads)}
        with opened(target, **options) as llm:
            assert [tokens(llm, PROMPTS, params) for params in (greedy(12), DRAWN)] == expected
            assert_drafts(llm)


def test_the_draft_model_may_be_quantized(target: Path, tmp_path: Path) -> None:
    """A quantized copy of the model is right nearly always."""
    copy = tmp_path / "int8"
    assert run("quantize", [str(target), "--format", "int8", "-o", str(copy), "--quiet"]) is None
    with opened(target) as plain:
        expected = [tokens(plain, PROMPTS, params) for params in (greedy(12), DRAWN)]
    with opened(target, **speculative("draft_model", {"draft_model": copy})) as llm:
        assert [tokens(llm, PROMPTS, params) for params in (greedy(12), DRAWN)] == expected
        counts = llm.engine.scheduler.counts
        assert counts.num_accepted_tokens > counts.num_draft_tokens / 2


@pytest.mark.parametrize("option", [{"deterministic": True}, {"kv_cache_dtype": "fp8"}], ids=str)
def test_options_that_change_sums_go_with_each_method(
    option: dict[str, Any], target: Path, heads: dict[str, Path]
) -> None:
    with opened(target, **option) as plain:
        expected = [tokens(plain, PROMPTS, params) for params in (greedy(12), DRAWN)]
    for method in METHODS:
        with opened(target, **option, **speculative(method, heads)) as llm:
            assert [tokens(llm, PROMPTS, params) for params in (greedy(12), DRAWN)] == expected
            assert_drafts(llm)


def test_experts_in_host_memory_go_with_drafts() -> None:
    sizes: dict[str, Any] = {**SIZES, "expert_offload": 2}
    with opened(Path("tiny-mixtral"), **sizes) as plain:
        expected = tokens(plain, PROMPTS, greedy(12))
    with opened(Path("tiny-mixtral"), **{**sizes, **speculative("ngram", {})}) as llm:
        assert tokens(llm, PROMPTS, greedy(12)) == expected
        assert_drafts(llm)


def test_rows_with_adapters_have_drafts(
    target: Path, heads: dict[str, Path], tmp_path: Path
) -> None:
    folders = [lora_cases.save_adapter(tmp_path / str(i), target, seed=i) for i in range(2)]
    adapters = [LoRARequest(f"a{i}", i + 1, str(one)) for i, one in enumerate(folders)]
    chosen = [adapters[0], None, adapters[1], adapters[0]]
    lora: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}

    def answer(llm: LLM) -> list[Any]:
        found = llm.generate(PROMPTS, greedy(12), use_tqdm=False, lora_request=chosen)
        return [one["token_ids"] for one in found]

    with opened(target, **lora) as plain:
        expected = answer(plain)
        assert expected[1:2] == tokens(plain, PROMPTS[1:2], greedy(12))
    for method in METHODS:
        with opened(target, **lora, **speculative(method, heads)) as llm:
            assert answer(llm) == expected, method
            assert_drafts(llm)


@pytest.mark.parametrize("method", METHODS)
def test_drafts_go_on_after_preemption_prefix_hits_and_sleep(
    method: str, target: Path, heads: dict[str, Path]
) -> None:
    with opened(target) as plain:
        expected = tokens(plain, PROMPTS, greedy(40))
    with opened(target, num_kvcache_blocks=1 + 12, **speculative(method, heads)) as llm:
        for _ in range(2):
            assert tokens(llm, PROMPTS, greedy(40)) == expected
            llm.sleep(2)
            llm.wake_up()
        assert llm.engine.scheduler.num_preemptions > 0
        (hit,) = llm.generate(PROMPTS[1], greedy(1), use_tqdm=False)
        (hit,) = llm.generate(PROMPTS[1], greedy(9), use_tqdm=False)
        assert hit["num_cached_tokens"] == 32 and hit["token_ids"] == expected[1][:9]


def test_prompts_with_images_have_drafts(tmp_path: Path) -> None:
    hf = saved("qwen3", tmp_path / "model")
    text = hf.config.text_config
    flags = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 0, 1]}}
    head = EagleCase("midlayer", flags).on(text.hidden_size, text.vocab_size)
    prompts = [Given(hf, [0, (8, 4), 0], 1), Given(hf, [0], 2), Given(hf, [(4, 4), 0, 0], 3)]
    tokens_of: dict[str, Any] = {}
    for method in ("", "ngram", "eagle3"):
        found = {"eagle3": head.save(tmp_path / "head")} if method == "eagle3" else {}
        options = speculative(method, found) if method else {}
        llm = engine(tmp_path / "model", enforce_eager=True, **options)
        completions = answers(llm, prompts)
        tokens_of[method] = [(one.token_ids, len(one.logprobs)) for one in completions]
        if method:
            assert llm.engine.scheduler.counts.num_drafts > 3
        llm.close()
    assert tokens_of["ngram"] == tokens_of[""] == tokens_of["eagle3"]
