"""Engines that draft answer as engines without drafts: numbers of drafts that adapt, a given
acceptance, ranks, replicas, drafts from earlier answers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.runner.spec import DraftSpec
from nanovllm.schedule.plan import DRAFT
from tests.engine.speculating import (
    ALWAYS,
    DRAWN,
    MIXED,
    MODES,
    NGRAM,
    PROMPTS,
    grammars_are_fast,
    options,
    plain,
    watch,
)
from tests.engines import assert_all_free, assert_one_distribution, greedy, random_prompts, tokens

__all__ = ["grammars_are_fast", "plain"]  # fixtures


# the number of draft tokens adapts -------------------------------------------------------------


@pytest.fixture(scope="module", params=[("ngram", "eager"), ("draft_model", "eager"),
                                        ("draft_model", "graph")], ids="-".join)  # fmt: skip
def adapting(
    request: pytest.FixtureRequest, checkpoint: Path, make_llm: Callable[..., LLM]
) -> Iterator[LLM]:
    method, mode = request.param
    given = {**MODES[mode], **options(checkpoint, method), "tuning": {"run_ahead": 1}}
    llm = make_llm(max_num_seqs=6, device="cpu", **given)
    yield llm
    assert_all_free(llm)
    llm.close()


def choose(llm: LLM, monkeypatch: pytest.MonkeyPatch, lengths: Callable[[], int]) -> None:
    """Let steps have these numbers of draft tokens, whatever they take."""
    planner = llm.engine.scheduler.planner
    assert planner is not None
    monkeypatch.setattr(planner.lengths, "choose", lambda *_: lengths())
    monkeypatch.setattr(planner.lengths, "ends", lambda *_: False)


@pytest.mark.parametrize("params", [greedy(25), DRAWN, MIXED], ids=["greedy", "drawn", "mixed"])
def test_answers_do_not_depend_on_the_numbers_of_drafts(
    adapting: LLM, params: Any, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, plans = random.Random(0), watch(adapting, monkeypatch)
    choose(adapting, monkeypatch, lambda: rng.choice([0, 0, 1, 3, 3]))
    assert tokens(adapting, PROMPTS, params) == tokens(plain, PROMPTS, params)
    assert {plan.tokens_per_row for plan, _ in plans if not plan.is_prefill} >= {1, 4}
    assert any(num_unknown for plan, num_unknown in plans if DRAFT in plan.token_T)


def test_steps_that_are_timed_decide(adapting: LLM, plain: LLM) -> None:
    """What the times of a busy machine lead to is not known, but the answers are."""
    planner = adapting.engine.scheduler.planner
    assert planner is not None
    times = planner.lengths._times
    assert times.lengths == (0, 1, 3) and len(times.ms_RK) == len(times.rows)
    assert all(ms > 0 for of_rows in times.ms_RK for ms in of_rows)
    assert tokens(adapting, PROMPTS, greedy(60)) == tokens(plain, PROMPTS, greedy(60))


@pytest.mark.parametrize("adapting", [("draft_model", "eager"), ("draft_model", "graph")],
                         indirect=True, ids="-".join)  # fmt: skip
def test_plain_steps_run_without_the_second_model_which_reads_their_tokens_later(
    adapting: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal models agree on every token only if the second one has read the same tokens."""
    engine, plans = adapting.engine, watch(adapting, monkeypatch)
    waiting = [0] * 12 + [3] * 4 + [0] * 3
    choose(adapting, monkeypatch, lambda: waiting.pop(0) if waiting else 3)
    steps = engine.runner.steps.drafting.steps
    counts = engine.scheduler.counts
    before = counts.num_draft_tokens - counts.num_accepted_tokens
    tokens(adapting, PROMPTS[:1], greedy(50))
    decoding = [plan for plan, _ in plans if not plan.is_prefill]
    assert [plan.drafts.rests for plan in decoding[:19]] == [True] * 12 + [False] * 4 + [True] * 3
    read = [[len(one.token_ids) for one in plan.drafts.readings] for plan in decoding]
    assert read[12] == [12] and any(read[19:]) and steps is not None
    assert not any(read[:12] + read[13:19])
    # the answer's end cuts the drafts of the last steps off
    assert counts.num_draft_tokens - counts.num_accepted_tokens == before
    assert len(decoding) < 19 + 8 + 3


def test_drawn_tokens_have_the_distribution_of_plain_decoding() -> None:
    """A chi-square test of second tokens against those of plain decoding with other seeds."""
    prompt, num = [*range(40), *[64, 74] * 4], 300
    sizes: dict[str, Any] = {
        "device": "cpu", "enforce_eager": True, "max_model_len": 64, "num_kvcache_blocks": 200
    }  # fmt: skip
    params = SamplingParams(temperature=6.0, top_k=6, max_tokens=3, ignore_eos=True)
    found = []
    for number, spec in enumerate(({}, {"speculative_config": NGRAM, **ALWAYS})):
        llm = LLM("tiny-qwen3", seed=number, **sizes, **spec)
        found.append(Counter(one[1] for one in tokens(llm, [prompt] * num, params)))
        counts = llm.engine.scheduler.counts
        llm.close()
    assert num / 20 < counts.accepted_at[0] < counts.num_drafts * 0.95
    assert_one_distribution(*found)
    assert found[0] != found[1], "the seeds differ"


def test_a_proposer_that_cannot_read_later_reads_on_in_plain_steps(
    checkpoint: Path, make_llm: Callable[..., LLM], plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DraftSpec, "rests", False)
    llm = make_llm(device="cpu", **options(checkpoint, "draft_model"))
    rng, plans = random.Random(0), watch(llm, monkeypatch)
    choose(llm, monkeypatch, lambda: rng.choice([0, 0, 0, 1, 3, 3]))
    assert tokens(llm, PROMPTS[:1], greedy(60)) == tokens(plain, PROMPTS[:1], greedy(60))
    counts = llm.engine.scheduler.counts
    assert counts.num_drafts > 9
    assert counts.num_accepted_tokens == counts.num_draft_tokens, "equal models agree"
    assert not any(plan.drafts.rests or plan.drafts.readings for plan, _ in plans)
    llm.close()


@pytest.mark.parametrize("top_k", [-1, 9])
def test_synthetic_acceptance_has_its_mean_length(
    checkpoint: Path, make_llm: Callable[..., LLM], top_k: int
) -> None:
    params = SamplingParams(temperature=0.9, top_k=top_k, max_tokens=99, ignore_eos=True)
    synthetic = {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.2}
    llm = make_llm(device="cpu", **options(checkpoint, "ngram", **synthetic), **ALWAYS)
    tokens(llm, random_prompts([9] * 40, seed=7), params)
    counts = llm.engine.scheduler.counts
    assert counts.num_drafts > 1500
    assert 1 + counts.num_accepted_tokens / counts.num_drafts == pytest.approx(2.2, abs=0.08)
    rates = [counts.accepted_at[place] / counts.num_drafts for place in range(3)]
    assert rates[1] / rates[0] == pytest.approx(rates[0], abs=0.05), "each has the same chance"
    llm.close()


def test_two_ranks_draft_the_same(checkpoint: Path, make_llm: Callable[..., LLM], plain: LLM,
                                  bare_store: Path) -> None:  # fmt: skip
    for method, num in (("draft_model", 20), ("ngram", 60)):
        spec = {**options(checkpoint, method), **ALWAYS}
        llm = make_llm(device="cpu", tensor_parallel_size=2, compile_cache=str(bare_store), **spec)
        for params in (greedy(25), DRAWN):
            before = llm.engine.metrics.num_steps
            assert tokens(llm, PROMPTS, params) == tokens(plain, PROMPTS, params)
            assert llm.engine.metrics.num_steps - before < num
        assert tokens(llm, PROMPTS, MIXED) == tokens(plain, PROMPTS, MIXED)
        assert llm.engine.scheduler.counts.num_forced_tokens > 2
        assert_all_free(llm)
        llm.close()


def test_replicas_draft(checkpoint: Path, make_llm: Callable[..., LLM], plain: LLM,
                        bare_store: Path) -> None:  # fmt: skip
    spec = {**options(checkpoint, "draft_model"), **ALWAYS}
    llm = make_llm(device="cpu", data_parallel_size=2, compile_cache=str(bare_store), **spec)
    assert tokens(llm, PROMPTS, greedy(25)) == tokens(plain, PROMPTS, greedy(25))
    steps = [one.value for one in llm.get_metrics() if one.name.endswith("num_steps")]
    assert sum(steps) < 40, "four tokens a step in each of the replicas"
    llm.close()


# earlier answers ---------------------------------------------------------------------------------


def test_an_answer_is_drafted_from_an_earlier_one(
    checkpoint: Path, make_llm: Callable[..., LLM], plain: LLM
) -> None:
    spec = {
        "method": "suffix",
        "num_speculative_tokens": 3,
        "suffix_decoding_max_cached_tokens": 50,
    }
    llm = make_llm(max_num_seqs=6, device="cpu", speculative_config=spec, **ALWAYS)
    counts, past_C = llm.engine.scheduler.counts, llm.engine.runner.state.past_C
    assert past_C is not None and past_C.tolist() == [-1] * 50
    accepted, expected = [], tokens(plain, PROMPTS[:2], greedy(30))
    for number in (0, 1, 1):
        before = counts.num_accepted_tokens
        assert tokens(llm, [PROMPTS[number]], greedy(30)) == [expected[number]]
        accepted.append(counts.num_accepted_tokens - before)
    assert accepted[2] > 15 > max(accepted[:2])
    salted = llm.generate({"prompt_token_ids": PROMPTS[2], "cache_salt": "a"}, greedy(9))
    tokens(llm, PROMPTS[3:4], greedy(2))
    assert past_C.tolist()[:31] == [*expected[1], -1], "answers with a salt are not kept"
    assert salted[0]["token_ids"]
    llm.close()
