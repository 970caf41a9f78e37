"""Layers with windows free the blocks behind them while a request runs. Nothing else changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM
from nanovllm.models.layer_state import PagedKV, page_groups
from nanovllm.schedule.cache_groups import CacheGroups
from tests.engines import greedy, random_prompts, tokens
from tests.models.families import FAMILIES, VOCAB_SIZE
from tests.models.harness import transformers_model

NAMES = (
    "gemma3",
    "phi3",
    "gpt-oss",
)  # three groups with windows of 17 and none; one group with a window of 17; both kinds


def make(name: str, folder: Path, **options: Any) -> LLM:
    (family,) = (one for one in FAMILIES if one.name == name)
    sizes: dict[str, Any] = {
        "max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 64,
        "kvcache_block_size": 16, "num_kvcache_blocks": 60, "enforce_eager": True, **options,
    }  # fmt: skip
    folder = folder if (folder / "config.json").exists() else family.save(folder)
    return LLM(str(folder), device="cpu", dtype="float32", skip_tokenizer_init=True, **sizes)


def prompts_of(*lengths: int) -> list[list[int]]:
    return [[i % VOCAB_SIZE for i in one] for one in random_prompts(list(lengths))]


def expected(folder: Path, prompt: Sequence[int], num: int) -> list[int]:
    """Greedy tokens of transformers."""
    model, ids = transformers_model(folder, "cpu"), list(prompt)
    for _ in range(num):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("name", NAMES)
def test_freed_blocks_are_not_read(
    name: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts in several chunks, and answers over several blocks. A freed block is NaN at once."""
    sizes = {} if mode == "eager" else {"enforce_eager": False, "graph_batch_sizes": [4]}
    llm = make(name, tmp_path, enable_prefix_caching=False, tuning={"run_ahead": 0}, **sizes)
    prompts = prompts_of(150, 99, 1)
    pool = llm.engine.scheduler.cache.pool
    release, freed = pool.release, list[int]()

    def poison(blocks: Sequence[int]) -> None:
        release(blocks)
        freed.extend(blocks)
        for cache in llm.engine.runner.steps.caches:
            cache.k_CBKH[list(blocks)] = cache.v_CBKH[list(blocks)] = torch.nan

    monkeypatch.setattr(pool, "release", poison)
    found = tokens(llm, prompts, greedy(40))
    assert len(freed) > 20
    assert found == [expected(tmp_path, prompt, 40) for prompt in prompts]
    assert pool.num_free == pool.num_blocks - 1


@pytest.mark.parametrize("name", NAMES)
def test_prefixes_are_shared_and_preempted_requests_go_on(name: str, tmp_path: Path) -> None:
    llm = make(name, tmp_path)
    (prompt,) = prompts_of(150)
    wanted = expected(tmp_path, prompt, 30)
    assert tokens(llm, [prompt], greedy(30)) == [wanted]
    assert tokens(llm, [prompt], greedy(30)) == [wanted]
    assert llm.engine.metrics.num_cached_tokens == 144
    assert tokens(llm, [prompt[:100]], greedy(5)) == [expected(tmp_path, prompt[:100], 5)]
    # a prefix whose end has left the windows is found as well, while its blocks are not reused
    assert llm.engine.metrics.num_cached_tokens == 144 + 96
    groups = llm.engine.scheduler.cache.groups
    small = make(name, tmp_path, num_kvcache_blocks=1 + groups.needed(256))
    prompts = prompts_of(30, 31, 50, 10)
    assert tokens(small, prompts, greedy(150)) == tokens(llm, prompts, greedy(150))
    if name == "gemma3":
        assert small.engine.scheduler.num_preemptions
    assert (
        small.engine.scheduler.cache.pool.num_free
        == small.engine.scheduler.cache.pool.num_blocks - 1
    )


@pytest.mark.parametrize(
    ("name", "without", "within", "window", "gained"),
    [
        # layers without and with a window in the released configs
        ("Gemma-3-27B", 10, 52, 1024, 4.5),
        ("Gemma-3-1B", 4, 22, 512, 5.1),
        ("Qwen2-7B with its windows on", 21, 7, 4096, 1.3),
        ("Mistral-7B v0.1", 0, 32, 4096, 6.4),
    ],
)
def test_a_cache_holds_more_long_sequences(
    name: str, without: int, within: int, window: int, gained: float
) -> None:
    """How many times as many sequences of 32,768 tokens a cache holds as without windows."""
    max_len, layer = 32_768, PagedKV(8, 128, 128)
    kept = [layer] * without + [replace(layer, window=window)] * within
    groups = page_groups(kept, max_len)
    sizes = CacheGroups(groups.windows, 16, 16_384)
    after = groups.num_tensors * sizes.needed(max_len)
    assert len(kept) * sizes.num_blocks(max_len) / after == pytest.approx(gained, abs=0.05)
