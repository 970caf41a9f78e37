"""Options that switch a part off keep the answers, and the part does not run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams, platforms
from nanovllm.platforms.base import UNFUSED_OPS
from nanovllm.runner import persistent
from tests.engines import Generate, random_prompts, tokens

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = random_prompts([1, 19, 5], seed=110)
SIZES: dict[str, Any] = {"enforce_eager": False, "graph_batch_sizes": (1, 4), "max_num_seqs": 4}


@pytest.fixture(scope="module")
def expected(hf_generate: Generate) -> list[list[int]]:
    return [hf_generate(prompt, GREEDY.max_tokens) for prompt in PROMPTS]


def test_without_fusion_only_attention_cache_write_and_sampler_are_ours(
    make_llm: Callable[..., LLM], lowered_ops: set[str], expected: list[list[int]], tmp_path: Path
) -> None:
    # an empty store: programs of earlier runs would not reach the lowering
    assert tokens(make_llm(**SIZES, compile_cache=tmp_path), PROMPTS, GREEDY) == expected
    assert "qk_norm_rope_store" in lowered_ops
    lowered_ops.clear()
    assert (
        tokens(make_llm(**SIZES, compile_cache=tmp_path, fuse=False), PROMPTS, GREEDY) == expected
    )
    # a model without experts has no others
    assert lowered_ops == {"paged_attention", "store_kv", "sample"} <= UNFUSED_OPS


def test_without_fusion_compiled(make_llm: Callable[..., LLM], expected: list[list[int]]) -> None:
    sizes = {**SIZES, "graph_batch_sizes": (4,), "max_num_batched_tokens": 32}
    assert tokens(make_llm(**sizes, fuse=False), PROMPTS, GREEDY) == expected


def test_without_capture_nothing_is_captured(
    make_llm: Callable[..., LLM],
    captured: list[object],
    lowered_ops: set[str],
    expected: list[list[int]],
    tmp_path: Path,
) -> None:
    assert (
        tokens(make_llm(**SIZES, compile_cache=tmp_path, capture=False), PROMPTS, GREEDY)
        == expected
    )
    assert captured == [] and lowered_ops
    llm = make_llm(**SIZES, compile_cache=tmp_path, capture=True)
    assert tokens(llm, PROMPTS, GREEDY) == expected
    assert len(captured) == len(llm.engine.runner.layout.decode_rows) + len(
        llm.engine.runner.layout.prefill_tokens
    )


def test_a_device_without_the_persistent_step_runs_its_own_and_says_why(
    make_llm: Callable[..., LLM], expected: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "nanovllm.runner.persistent")
    llm = make_llm(**SIZES, tuning={"persistent_step": True})
    assert tokens(llm, PROMPTS, GREEDY) == expected
    for num_rows in SIZES["graph_batch_sizes"]:
        why = "several kernels: device 'cpu' is not an NVIDIA GPU"
        assert f"a decode step of {num_rows} row(s) is {why}" in caplog.text


def test_eager_steps_are_several_kernels_where_one_is_the_default(
    make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(persistent.lowered, "is_nvidia", lambda device: True)
    llm = make_llm(enforce_eager=True)
    assert llm.engine.runner.steps.persistent is None


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_steps_in_flight_are_as_many_as_asked_for(
    make_llm: Callable[..., LLM], run_ahead: int, expected: list[list[int]]
) -> None:
    llm = make_llm(run_ahead=run_ahead)
    most = 0
    engine = llm.engine
    ids = [engine.add_request(prompt, GREEDY) for prompt in PROMPTS]
    found: dict[int, list[int]] = {}
    while engine.has_unfinished:
        for output in engine.step():
            if output.completion is not None:
                found[output.request_id] = output.completion.token_ids
        most = max(most, len(engine._in_flight))
    assert [found[request_id] for request_id in ids] == expected
    assert most == run_ahead


def test_the_device_says_how_far_ahead_unless_told(
    make_llm: Callable[..., LLM], device: str
) -> None:
    assert make_llm().engine.run_ahead == platforms.select(device).traits.run_ahead
