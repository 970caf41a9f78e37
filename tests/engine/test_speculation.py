"""Engines whose options name a proposer answer as engines without one."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.runner.spec import DraftSpec
from nanovllm.schedule.plan import DRAFT, StepPlan, StepResult
from nanovllm.structured import matcher
from nanovllm.structured_params import StructuredOutputsParams
from tests.engines import assert_all_free, assert_one_distribution, greedy, random_prompts, tokens
from tests.kernels.test_ngram import drafted

PROMPTS = [
    *random_prompts([19, 1, 40, 99], seed=3),
    random_prompts([7], seed=4)[0] * 5,  # repeats
    random_prompts([3], seed=5)[0] * 30,
]
DRAWN = SamplingParams(temperature=0.9, seed=4, max_tokens=25, ignore_eos=True)
FILTERED = SamplingParams(
    temperature=0.9, top_k=9, top_p=0.9, seed=4, max_tokens=25, ignore_eos=True
)
MIN_P = SamplingParams(temperature=1.5, min_p=0.02, seed=4, max_tokens=25, ignore_eos=True)
MIXED = [
    greedy(25), greedy(9, presence_penalty=1.5), greedy(14, logprobs=2), DRAWN,
    greedy(20, min_tokens=5),
    SamplingParams(temperature=0, max_tokens=30, structured_outputs=StructuredOutputsParams(
        regex="(ab|cd){3,9}"
    )),
]  # fmt: skip
FREE = SamplingParams(
    temperature=0, max_tokens=30, structured_outputs=StructuredOutputsParams(regex="[abcd]{9,20}")
)
SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["name", "role"],
    "properties": {"name": {"enum": ["ab", "abc", "b"]}, "role": {"enum": ["reader", "writer"]}},
}  # fmt: skip
NGRAM: dict[str, Any] = {
    "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3
}  # fmt: skip
MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "unpadded": {"tuning": {"pad_batches": False}},
    "graph": {"enforce_eager": False, "graph_batch_sizes": (2, 6), "max_num_batched_tokens": 64},
}

ALWAYS: dict[str, Any] = {"tuning": {"adapt_draft_length": False}}


def options(checkpoint: Path, method: str, **values: Any) -> dict[str, Any]:
    """The options of an engine with this method."""
    if method == "ngram":
        return {"speculative_config": {**NGRAM, **values}}
    given = {"method": method, "model": str(checkpoint), "num_speculative_tokens": 3, **values}
    return {"speculative_config": given}


@pytest.fixture(autouse=True)
def grammars_are_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is: slow ones have no drafts."""
    monkeypatch.setattr(matcher, "SLOW_S", 1e9)


@pytest.fixture(scope="module")
def plain(make_llm: Callable[..., LLM]) -> Iterator[LLM]:
    llm = make_llm(max_num_seqs=6, device="cpu")
    yield llm
    llm.close()


@pytest.fixture(scope="module", params=MODES)
def looking_up(
    request: pytest.FixtureRequest, checkpoint: Path, make_llm: Callable[..., LLM]
) -> Iterator[LLM]:
    mode = MODES[request.param]
    tuning = {"run_ahead": 1, "adapt_draft_length": False, **mode.get("tuning", {})}
    spec = options(checkpoint, "ngram")
    llm = make_llm(max_num_seqs=6, device="cpu", **{**mode, **spec, "tuning": tuning})
    yield llm
    assert_all_free(llm)
    llm.close()


def watch(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[tuple[StepPlan, int]]:
    """The plans that the runner gets, each with the number of steps whose results are unknown."""
    engine, seen = llm.engine, []
    launch = engine.runner.launch

    def noting(plan: StepPlan) -> Any:
        seen.append((plan, len(engine._in_flight)))
        return launch(plan)

    monkeypatch.setattr(engine.runner, "launch", noting)
    return seen


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
    llm = make_llm(max_num_seqs=6, device="cpu", **options(checkpoint, "draft_model"), **ALWAYS)
    engines = (llm.engine, plain.engine)
    (long,) = plain.generate(PROMPTS[:1], greedy(12), use_tqdm=False)
    reasons = set()
    for place in range(1, 9):
        for engine in engines:
            monkeypatch.setattr(engine, "_eos_ids", frozenset({long["token_ids"][place]}))
        params = [
            greedy(12, ignore_eos=False), greedy(12, ignore_eos=False, min_tokens=place + 2),
            greedy(12, stop_token_ids=[long["token_ids"][place]]), greedy(place + 1),
            greedy(12, stop=[long["text"][place]], min_tokens=3),
            greedy(12, ignore_eos=False, min_tokens=place),
        ]  # fmt: skip
        found, expected = (
            one.generate(PROMPTS[:1] * 6, params, use_tqdm=False) for one in (llm, plain)
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


@pytest.mark.parametrize("looking_up", ["graph"], indirect=True)
def test_steps_with_filters_are_captured_once(looking_up: LLM, captured: list[object]) -> None:
    for _ in range(2):
        tokens(looking_up, PROMPTS, FILTERED)
    num = len(captured)
    tokens(looking_up, PROMPTS, FILTERED)
    assert len(captured) == num


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
