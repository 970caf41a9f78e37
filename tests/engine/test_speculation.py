"""Engines whose options name a proposer answer as engines without one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.schedule.plan import DRAFT, StepPlan, StepResult
from nanovllm.structured_params import StructuredOutputsParams
from tests.engine.speculating import (
    ALWAYS,
    DRAWN,
    FILTERED,
    FREE,
    MIN_P,
    MIXED,
    PROMPTS,
    grammars_are_fast,
    looking_up,
    options,
    plain,
    watch,
)
from tests.engines import greedy, random_prompts, tokens
from tests.kernels.test_ngram import drafted

__all__ = ["grammars_are_fast", "looking_up", "plain"]  # fixtures
SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["name", "role"],
    "properties": {"name": {"enum": ["ab", "abc", "b"]}, "role": {"enum": ["reader", "writer"]}},
}  # fmt: skip


@pytest.mark.parametrize(
    "params", [greedy(25), DRAWN, FILTERED, MIN_P], ids=["greedy", "drawn", "top-p", "min-p"]
)
def test_answers_are_those_of_plain_decoding(
    looking_up: LLM, params: SamplingParams, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens(plain, PROMPTS, params)
    plans = watch(looking_up, monkeypatch)
    assert tokens(looking_up, PROMPTS, params) == expected
    verifying = [num_unknown for plan, num_unknown in plans if DRAFT in plan.token_T]
    assert verifying.count(1) > len(verifying) / 2, "steps began before earlier results were known"


def test_repeated_text_takes_few_steps(
    looking_up: LLM, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prompt,) = random_prompts([19], seed=6)
    (answer,) = tokens(plain, [prompt], greedy(40))
    repeats = (prompt + answer) * 2
    (expected,) = tokens(plain, [repeats], greedy(24))
    plans = watch(looking_up, monkeypatch)
    assert tokens(looking_up, [repeats], greedy(24)) == [expected]
    text = repeats + expected
    num_right = sum(
        drafted(text[: place + 1], 3, 1, 3)[0] == text[place + 1]
        for place in range(len(repeats), len(text) - 1)
    )
    num_steps = sum(not plan.is_prefill for plan, _ in plans)
    assert num_right > 4
    # a step may accept the drafts of every second place; one is launched beyond the end
    assert num_steps <= 23 - num_right // 2 + 1


def test_requests_of_all_kinds_share_a_batch(
    looking_up: LLM, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities and tokens that `min_tokens` forbids leave the drafts to the others."""
    expected = plain.generate(PROMPTS, MIXED, use_tqdm=False)
    plans = watch(looking_up, monkeypatch)
    found = looking_up.generate(PROMPTS, MIXED, use_tqdm=False)
    assert [one["token_ids"] for one in found] == [one["token_ids"] for one in expected]
    verifying = [plan.sampling for plan, _ in plans if DRAFT in plan.token_T]
    assert any(sampling.needs_host and sampling.has_penalties for sampling in verifying)


def test_verified_tokens_have_the_log_probabilities_of_plain_ones(
    looking_up: LLM, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = [
        greedy(20, logprobs=3), greedy(20, logprobs=0, temperature=0.9, seed=3), greedy(20),
        greedy(7, logprobs=1), greedy(20, logprobs=2, presence_penalty=1.1),
        greedy(20, logprobs=1, stop_token_ids=[*range(0, 512, 9)]),
    ]  # fmt: skip
    prompts = [PROMPTS[4]] * 6
    expected = plain.generate(prompts, params, use_tqdm=False)
    plans = watch(looking_up, monkeypatch)
    found = looking_up.generate(prompts, params, use_tqdm=False)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["token_ids"] == theirs["token_ids"]
        given, wanted = (one.get("logprobs", ()) for one in (ours, theirs))
        for one, other in zip(given, wanted, strict=True):
            assert list(one) == list(other)
            assert list(one.values()) == pytest.approx(list(other.values()), abs=1e-4)
            assert [value.rank for value in one.values()] == [v.rank for v in other.values()]
    with_both = [plan for plan, _ in plans if DRAFT in plan.token_T and plan.sampling.needs_host]
    fed = {num for plan in with_both for num in plan.num_tokens}
    assert fed >= {1, 4}


def test_rows_below_their_min_tokens_are_alone_in_that(
    looking_up: LLM, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    (answer,) = tokens(plain, PROMPTS[4:5], greedy(12))
    ends = {"stop_token_ids": sorted(set(answer))}
    params = [greedy(12, min_tokens=num, **ends) for num in (0, 1, 4, 9)] + [greedy(30)] * 2
    prompts = [PROMPTS[4]] * 6
    expected = tokens(plain, prompts, params)
    plans = watch(looking_up, monkeypatch)
    assert tokens(looking_up, prompts, params) == expected
    mixed = [plan for plan, _ in plans if DRAFT in plan.token_T and plan.sampling.forbidden]
    assert mixed and all(
        plan.num_tokens[row] == 1 for plan in mixed for row, _ in plan.sampling.forbidden
    )


def test_rows_that_take_no_drafts_are_alone_in_that(
    looking_up: LLM, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [PROMPTS[4]] * 6
    one_by_one = [
        greedy(20, disable_spec_decode=True), greedy(20, presence_penalty=1.5),
        greedy(20, bad_words=["ab"], logit_bias={7: 3.0, 9: -2.0}),
        replace(FREE, disable_spec_decode=True),
    ]  # fmt: skip
    params = [greedy(30), *one_by_one, FILTERED]
    expected = tokens(plain, prompts, params)
    tokens(looking_up, prompts[:1], [FREE])  # its grammar is compiled then
    plans, counts = watch(looking_up, monkeypatch), looking_up.engine.scheduler.counts
    before = counts.num_undrafted
    assert tokens(looking_up, prompts, params) == expected
    first = min(plan.request_ids[0] for plan, _ in plans)
    fed: dict[int, set[int]] = {}
    mixed = 0
    for plan, _ in plans:
        if not plan.is_prefill and DRAFT in plan.token_T:
            mixed += plan.sampling.has_masks and plan.sampling.has_penalties
            for request_id, num in zip(plan.request_ids, plan.num_tokens):
                fed.setdefault(request_id - first, set()).add(num)
    assert mixed > 3
    assert all(fed[i] == {1} for i in (1, 2, 3, 4)) and 4 in fed[0] & fed[5]
    assert counts.num_undrafted > before


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_tokens_that_a_grammar_forces_are_verified_together(
    looking_up: LLM, plain: LLM, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with a grammar, of which some end within a step, and a row with drafts of the device."""
    forms = [
        StructuredOutputsParams(json=SCHEMA), StructuredOutputsParams(json=SCHEMA),
        StructuredOutputsParams(choice=["abcdefgh", "abcdxy"]),
        StructuredOutputsParams(regex="(ab|cd){3,9}e"),
    ]  # fmt: skip
    params = [
        SamplingParams(temperature=temperature, seed=n, max_tokens=n or 60, structured_outputs=form)
        for n, form in zip((0, 23, 7, 40), forms)
    ]
    params.append(greedy(30))
    prompts = [*PROMPTS[:4], PROMPTS[4]]
    expected = tokens(plain, prompts, params)
    tokens(looking_up, prompts, params)  # the grammars are compiled then
    counts = looking_up.engine.scheduler.counts
    before = counts.num_forced_tokens
    plans = watch(looking_up, monkeypatch)
    assert tokens(looking_up, prompts, params) == expected
    text = looking_up.tokenizer.decode(expected[0])
    assert set(json.loads(text)) == {"name", "role"}
    assert counts.num_forced_tokens - before > sum(map(len, expected[:4])) / 2
    first = min(plan.request_ids[0] for plan, _ in plans)
    assert sum(first in plan.request_ids for plan, _ in plans) < len(expected[0]) * 0.6
    assert any(DRAFT in plan.token_T and max(plan.masks_of, default=1) > 1 for plan, _ in plans)


def test_answers_end_at_every_place_within_a_step(
    checkpoint: Path, make_llm: Callable[..., LLM], plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second model is the first one, so every step makes four tokens."""
    llm = make_llm(max_num_seqs=7, device="cpu", **options(checkpoint, "draft_model"), **ALWAYS)
    engines = (llm.engine, plain.engine)
    (long,) = plain.generate(PROMPTS[:1], greedy(12), use_tqdm=False)
    reasons = set()
    for place in range(1, 9):
        for engine in engines:
            monkeypatch.setattr(engine, "_eos_ids", frozenset({long["token_ids"][place]}))
        late = [
            plain.tokenizer.decode(long["token_ids"][one : one + 1]) for one in (place - 1, place)
        ]
        params = [
            greedy(12, ignore_eos=False), greedy(12, ignore_eos=False, min_tokens=place + 2),
            greedy(12, stop_token_ids=[long["token_ids"][place]]), greedy(place + 1),
            greedy(12, stop=[long["text"][place]], min_tokens=3),
            greedy(12, ignore_eos=False, min_tokens=place), greedy(12, stop=late, min_tokens=place),
        ]  # fmt: skip
        found, expected = (
            one.generate(PROMPTS[:1] * 7, params, use_tqdm=False) for one in (llm, plain)
        )
        keys = ("token_ids", "text", "finish_reason")
        ends = [[[one[key] for key in keys] for one in of] for of in (found, expected)]
        assert ends[0] == ends[1], place
        assert len(ends[0][0][0]) <= place + 1
        reasons.update(one[2] for one in ends[0])
    assert reasons == {"stop", "length"}
    assert llm.engine.scheduler.counts.accepted_at[2] > 10
    llm.close()


def test_answers_end_at_their_limits_and_stops(looking_up: LLM, plain: LLM) -> None:
    long = tokens(plain, PROMPTS, greedy(20))
    params = [greedy(20, stop_token_ids=[answer[9]]) for answer in long]
    expected = [answer[: answer.index(answer[9]) + 1] for answer in long]
    assert tokens(looking_up, PROMPTS, params) == expected
    for num in (1, 2, 4, 7):
        assert tokens(looking_up, PROMPTS, greedy(num)) == [answer[:num] for answer in long]
    texts = [out["text"] for out in plain.generate(PROMPTS, greedy(20), use_tqdm=False)]
    stops = [greedy(20, stop=[text[len(text) // 2 :][:2]]) for text in texts]
    both = [
        [one["text"] for one in llm.generate(PROMPTS, stops, use_tqdm=False)]
        for llm in (looking_up, plain)
    ]
    assert both[0] == both[1] != texts


def test_the_last_tokens_of_the_longest_sequence_are_right(looking_up: LLM, plain: LLM) -> None:
    prompt = random_prompts([5], seed=8)[0] * 49
    expected = tokens(plain, [prompt], greedy(100))
    assert len(expected[0]) == 11
    assert tokens(looking_up, [prompt], greedy(100)) == expected


def assert_looks_up(llm: LLM, prompts: Sequence[list[int]], num: int) -> set[int]:
    """Answer prompts while comparing the history of rows and the drafts with the known tokens.
    Returns the numbers of tokens that were found in the prefix cache."""
    engine = llm.engine
    state = engine.runner.state
    assert state.history_SM is not None and state.draft_SK is not None
    for prompt in prompts:
        engine.add_request(prompt, greedy(num), incremental=False)
    num_compared, cached = 0, set()
    while engine.has_unfinished:
        for output in engine.step():
            if output.completion is not None:
                cached.add(output.completion.num_cached_tokens)
        for request in engine.scheduler.running:
            if request.is_decoding and request.num_in_flight == 0 and request.output_ids:
                known = request.all_token_ids
                if len(known) < engine.max_model_len:
                    history = state.history_SM[request.row, : len(known)].tolist()
                    assert history == known
                    assert state.draft_SK[request.row].tolist() == drafted(known, 3, 1, 3)
                    num_compared += 1
    assert num_compared > len(prompts) * num / 5
    return cached


def test_the_history_is_whole_after_preemption_prefix_hits_and_long_prompts(
    checkpoint: Path, make_llm: Callable[..., LLM], plain: LLM
) -> None:
    spec = options(checkpoint, "ngram")
    llm = make_llm(
        max_num_seqs=6, device="cpu", num_kvcache_blocks=1 + 16, max_num_batched_tokens=32,
        tuning={"run_ahead": 0, "adapt_draft_length": False}, **spec,
    )  # fmt: skip
    assert_looks_up(llm, PROMPTS, 60)
    assert llm.engine.scheduler.num_preemptions > 0
    assert max(assert_looks_up(llm, [PROMPTS[3], PROMPTS[3] + [9, 8, 7]], 9)) >= 96
    assert tokens(llm, PROMPTS, greedy(60)) == tokens(plain, PROMPTS, greedy(60))
    llm.close()


def test_only_lookup_has_a_history(checkpoint: Path, looking_up: LLM, plain: LLM) -> None:
    assert plain.engine.runner.state.history_SM is None
    history_SM = looking_up.engine.runner.state.history_SM
    assert history_SM is not None and history_SM.shape == (7, 256)


def test_metrics_count_what_was_drafted_and_accepted(
    looking_up: LLM, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read() -> dict[str, float]:
        return {
            one.name.removeprefix("nanovllm:spec_decode_num_") + "".join(one.labels.values()):
            one.value for one in looking_up.get_metrics() if "spec_decode" in one.name
        }  # fmt: skip

    before, results = read(), []
    collect = looking_up.engine._answers.collect

    def noting(plan: StepPlan, result: StepResult) -> None:
        if not plan.is_prefill:
            results.append((plan.num_tokens, [len(one) for one in result.tokens]))
        collect(plan, result)

    monkeypatch.setattr(looking_up.engine._answers, "collect", noting)
    tokens(looking_up, PROMPTS[4:5], greedy(40))
    found = {name: value - before.get(name, 0) for name, value in read().items()}
    rows = [
        (fed - 1, made - 1)
        for num_fed, num_made in results for fed, made in zip(num_fed, num_made) if fed > 1
    ]  # fmt: skip
    assert rows and found["drafts"] == len(rows)
    assert found["draft_tokens"] == sum(fed for fed, _ in rows)
    assert found["accepted_tokens"] == sum(made for _, made in rows)
    for place in range(3):
        expected = sum(made > place for _, made in rows)
        assert found[f"accepted_tokens_per_pos{place}"] == expected
    assert found["steps3"] > 0
    assert not any("spec_decode" in one.name for one in plain.get_metrics())


@pytest.mark.parametrize("looking_up", ["graph"], indirect=True)
def test_steps_with_filters_are_captured_once(looking_up: LLM, captured: list[object]) -> None:
    for _ in range(2):
        tokens(looking_up, PROMPTS, FILTERED)
    num = len(captured)
    tokens(looking_up, PROMPTS, FILTERED)
    assert len(captured) == num
