"""Decode steps of several tokens a row keep exactly the tokens that single steps choose."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import Tensor

from nanovllm import LLM, SamplingParams
from nanovllm.runner.steps import Steps
from nanovllm.schedule.plan import LogitEdits, StepPlan
from nanovllm.schedule.request import Request
from tests.engines import assert_all_free, drain, greedy, random_prompts

DRAFTS = (1, 3)
PROMPTS = random_prompts([19, 1, 40, 99, 7], seed=3)
Proposer = Callable[[Request], list[int]]


@pytest.fixture(scope="module", params=["eager", "unpadded", "graph"])
def drafting(request: pytest.FixtureRequest, make_llm: Callable[..., LLM]) -> Iterator[LLM]:
    modes: dict[str, dict[str, Any]] = {
        "eager": {},
        "unpadded": {"pad_batches": False},
        "graph": {"enforce_eager": False, "graph_batch_sizes": (1, 5)},
    }
    llm = make_llm(draft_lengths=DRAFTS, max_num_seqs=5, run_ahead=1, **modes[request.param])
    yield llm
    llm.close()


@pytest.fixture
def plans(drafting: LLM, monkeypatch: pytest.MonkeyPatch) -> list[StepPlan]:
    """The plans that the runner received since the test began."""
    seen: list[StepPlan] = []
    launch = drafting.engine.runner.launch
    monkeypatch.setattr(
        drafting.engine.runner, "launch", lambda plan: (seen.append(plan), launch(plan))[1]
    )
    return seen


def tokens(llm: LLM, params: Any, propose: Proposer | None = None) -> list[list[int]]:
    llm.engine.propose = propose
    try:
        return [out["token_ids"] for out in llm.generate(PROMPTS, params, use_tqdm=False)]
    finally:
        llm.engine.propose = None


def knowing(answers: list[list[int]], num_right: Callable[[], int]) -> Proposer:
    """Proposes the next `num_right()` tokens of the answer, then wrong tokens."""
    of = {tuple(prompt): answer for prompt, answer in zip(PROMPTS, answers)}

    def propose(request: Request) -> list[int]:
        start, num = len(request.output_ids), num_right()
        right = of[tuple(request.prompt_ids)][start : start + num]
        return right + [(token + 1) % 512 for token in of[tuple(request.prompt_ids)][start + num :]]

    return propose


@pytest.mark.parametrize("right", ["all", "none", "some"])
@pytest.mark.parametrize(
    "params",
    [greedy(25), SamplingParams(temperature=0.9, seed=4, max_tokens=25, ignore_eos=True),
     SamplingParams(temperature=0.9, top_k=9, top_p=0.9, seed=4, max_tokens=25, ignore_eos=True)],
    ids=["greedy", "drawn", "filtered"],
)  # fmt: skip
def test_verified_tokens_are_those_of_single_steps(
    drafting: LLM, plans: list[StepPlan], params: SamplingParams, right: str
) -> None:
    single = tokens(drafting, params)
    num_single, rng = len(plans), random.Random(0)
    num_right = {"all": lambda: 9, "none": lambda: 0, "some": lambda: rng.randrange(4)}[right]
    assert tokens(drafting, params, knowing(single, num_right)) == single
    steps = plans[num_single:]
    assert max(plan.tokens_per_row for plan in steps if not plan.is_prefill) == 1 + max(DRAFTS)
    if right == "all":  # four tokens a step, and one from the prompt
        assert len(steps) <= num_single - 24 + 6
    assert_all_free(drafting)


def test_rows_with_and_without_proposals_share_a_step(drafting: LLM, plans: list[StepPlan]) -> None:
    single = tokens(drafting, greedy(12))
    proposer, rng = knowing(single, lambda: 2), random.Random(1)
    plans.clear()
    found = tokens(drafting, greedy(12), lambda one: proposer(one)[: rng.choice([0, 0, 1, 3])])
    assert found == single
    assert any(len(set(plan.num_tokens)) > 1 for plan in plans if not plan.is_prefill)


def test_a_stop_among_verified_tokens_ends_the_answer_there(drafting: LLM) -> None:
    single = tokens(drafting, greedy(20))
    params = [greedy(20, stop_token_ids=[answer[9]]) for answer in single]
    expected = [answer[: answer.index(answer[9]) + 1] for answer in single]
    assert tokens(drafting, params, knowing(single, lambda: 9)) == expected
    assert_all_free(drafting)


def test_requests_whose_choices_depend_on_each_other_have_no_proposals(
    drafting: LLM, plans: list[StepPlan]
) -> None:
    params = [
        greedy(9),
        greedy(9, presence_penalty=1.5),
        greedy(9, logprobs=2),
        greedy(9),
        greedy(9),
    ]
    single = tokens(drafting, params)
    plans.clear()
    assert tokens(drafting, params, knowing(single, lambda: 9)) == single
    first = min(plan.request_ids[0] for plan in plans)
    most = [0] * len(params)
    for plan in plans:
        if not plan.is_prefill:
            for request_id, num in zip(plan.request_ids, plan.num_tokens):
                most[request_id - first] = max(most[request_id - first], num)
    assert most[1] == 1 and min(most[:1] + most[2:]) > 1


def test_rows_with_edits_have_no_proposals(drafting: LLM, plans: list[StepPlan]) -> None:
    """A bad word may begin with a proposed token."""
    single = tokens(drafting, greedy(9))
    plans.clear()
    engine = drafting.engine
    engine.propose = knowing(single, lambda: 9)
    ids = [engine.add_request(prompt, greedy(9), incremental=False) for prompt in PROMPTS]
    engine.scheduler.waiting[0].edits = LogitEdits({}, None, [single[0][3:5]])
    try:
        done = drain(drafting)
    finally:
        engine.propose = None
    decoding = [plan for plan in plans if not plan.is_prefill]
    fed = [dict(zip(plan.request_ids, plan.num_tokens)) for plan in decoding]
    assert all(of_step.get(ids[0], 1) == 1 for of_step in fed)
    assert any(of_step.get(ids[1], 1) > 1 for of_step in fed if ids[0] in of_step)
    assert done[ids[0]].token_ids[:4] == single[0][:4]
    assert done[ids[0]].token_ids[4] != single[0][4]
    assert [done[one].token_ids for one in ids[1:]] == single[1:]


def test_proposals_need_graphs_that_verify_them(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(max_num_seqs=2)
    with pytest.raises(ValueError, match="draft_lengths"):
        llm.engine.propose = lambda request: [1]
    llm.close()
    with pytest.raises(ValueError, match=r"draft_lengths is \(0,\)"):
        make_llm(draft_lengths=(0,))


@pytest.mark.parametrize("drafting", ["graph"], indirect=True)
def test_each_rows_and_tokens_bucket_is_captured_once(drafting: LLM) -> None:
    runner = drafting.engine.runner
    assert set(runner.buckets.verify_steps) == {
        (rows, 1 + num) for rows in (1, 5) for num in DRAFTS
    }
    assert runner.compiler.sealed and runner.compiler.strict, "a compile from here on is an error"


def test_tokens_are_rows_of_the_kernels_of_plain_steps_on_a_cpu(
    make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many they are: the attention of prompts has other sums, which change codes of 8 bits
    and with them answers."""
    seen: list[tuple[str, int]] = []
    layers = Steps._layers

    def noting(self: Steps, phase: str, h_TD: Tensor, *rest: Any) -> Tensor:
        seen.append((phase, len(h_TD)))
        return layers(self, phase, h_TD, *rest)

    llm = make_llm(draft_lengths=DRAFTS, max_num_seqs=16, device="cpu")
    prompts = random_prompts([5] * 16, seed=9)
    engine = llm.engine
    plain = [one["token_ids"] for one in llm.generate(prompts, greedy(8), use_tqdm=False)]
    monkeypatch.setattr(Steps, "_layers", noting)
    answers = dict(zip(map(tuple, prompts), plain))
    engine.propose = lambda one: answers[tuple(one.prompt_ids)][len(one.output_ids) :]
    found = [one["token_ids"] for one in llm.generate(prompts, greedy(8), use_tqdm=False)]
    assert found == plain
    assert ("decode", 64) in seen and not any(phase == "verify" for phase, _ in seen)
    llm.close()
