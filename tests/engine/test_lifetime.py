"""Several engines run in a process, and a deleted one leaves no memory, object or captured step."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from nanovllm import LLM
from tests.engines import NUM_TOKENS, Generate, greedy, random_prompts, tokens


def test_two_engines_in_one_process(
    make_llm: Callable[..., LLM], llm: LLM, hf_generate: Generate
) -> None:
    second = make_llm(kvcache_block_size=32, max_num_seqs=3, graph_batch_sizes=(2,))
    prompts = random_prompts([5, 40, 99, 19], seed=95)
    expected = [hf_generate(prompt, NUM_TOKENS) for prompt in prompts]
    assert tokens(second, prompts, greedy()) == expected == tokens(llm, prompts, greedy())
    found: list[list[list[int]]] = [[[] for _ in prompts] for _ in range(2)]
    streams: list[Iterator[dict[str, Any]]] = [
        one.stream(prompts, greedy()) for one in (llm, second)
    ]
    for _ in range(len(prompts) * NUM_TOKENS):
        for answers, stream in zip(found, streams):
            piece = next(stream)
            answers[piece["index"]] += piece["token_ids"]
    assert [list(stream) for stream in streams] == [[], []]
    assert found == [expected, expected]
    del second
    assert tokens(llm, prompts, greedy()) == expected


@pytest.mark.parametrize("how", ["del", "close"])
@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graph"])
def test_nothing_is_left(make_llm: Callable[..., LLM], enforce_eager: bool, how: str) -> None:
    """Weights, cache and state are freed without the garbage collector, and no thread is left. The
    cache has the size that the engine chooses, for which it measures steps that are not kept."""
    options = {
        "enforce_eager": enforce_eager, "graph_batch_sizes": (1, 5, 16), "num_kvcache_blocks": None,
        "max_model_len": 256,
    }  # fmt: skip
    (prompt,) = random_prompts([40], seed=96)
    params = [greedy(), greedy(logprobs=2, prompt_logprobs=1, top_k=5, presence_penalty=1.0)]
    # the first engine starts helpers that the process keeps
    make_llm(**options).generate([prompt] * 2, params, use_tqdm=False)
    gc.collect()
    threads = set(threading.enumerate())
    gc.disable()
    try:
        llm = make_llm(**options)
        llm.generate([prompt] * 2, params, use_tqdm=False)
        next(llm.stream([prompt], greedy()))
        runner = llm.engine.runner
        kept = [
            *(tensor for cache in runner.steps.caches for tensor in cache if tensor is not None),
            *(tensor for layer in runner.params.layers for tensor in layer if tensor is not None),
            runner.params.embed_VD,
            runner.cos_sin_MH,
            *(leaf for leaf in tree_leaves(tuple(runner.state)) if leaf is not None),
            *(
                tensor
                for tensor in vars(runner.sampler).values()
                if isinstance(tensor, torch.Tensor)
            ),
        ]
        refs = [weakref.ref(tensor) for tensor in kept]
        engine = weakref.ref(llm.engine)
        del kept, runner
        if how == "close":
            llm.close()
            assert [ref for ref in refs if ref() is not None] == []
        del llm
        assert [ref for ref in refs if ref() is not None] == []
        assert engine() is None
    finally:
        gc.enable()
    assert set(threading.enumerate()) <= threads


def used_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.memory_allocated()
    # malloc keeps freed memory, that of earlier tests as well, and would place new tensors there
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def touch_cache(llm: LLM) -> None:
    for cache in llm.engine.runner.steps.caches:
        cache.k_CBKH.fill_(1)
        cache.v_CBKH.fill_(1)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
@pytest.mark.parametrize("how", ["del", "close"])
def test_memory_comes_back(make_llm: Callable[..., LLM], device: str, how: str) -> None:
    (prompt,) = random_prompts([40], seed=97)
    make_llm().close()
    before = used_bytes(device)
    for _ in range(2):
        # 64 MiB for each tensor: malloc may keep smaller ones
        llm = make_llm(num_kvcache_blocks=16_384)
        cache_bytes = 16_384 * llm.engine.runner.block_bytes
        touch_cache(llm)
        tokens(llm, [prompt], greedy())
        assert used_bytes(device) - before > 0.9 * cache_bytes
        if how == "close":
            llm.close()
        else:
            del llm
        assert used_bytes(device) - before < 0.25 * cache_bytes


def test_a_closed_model_says_so(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm()
    llm.close()
    llm.close()
    for use in (
        lambda: llm.generate([[5]], use_tqdm=False),
        lambda: next(llm.stream([[5]])),
        llm.engine.step,
    ):
        with pytest.raises(RuntimeError, match="closed"):
            use()


def test_eager_mode_captures_nothing_and_graph_mode_captures_every_bucket(
    make_llm: Callable[..., LLM], captured: list[object]
) -> None:
    (prompt,) = random_prompts([5], seed=95)
    eager = make_llm(enforce_eager=True)
    eager.generate([prompt], greedy(4), use_tqdm=False)
    assert captured == []
    graph = make_llm(enforce_eager=False, graph_batch_sizes=[1, 4], max_num_seqs=4)
    layout = graph.engine.runner.layout
    assert len(captured) == len(layout.decode_rows) + len(layout.prefill_tokens)
    assert tokens(graph, [prompt], greedy(4)) == tokens(eager, [prompt], greedy(4))
