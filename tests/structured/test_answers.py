"""Constrained answers in a whole engine: where they end, and what else may go on beside them.

All of it holds on the CPU and on a GPU, there eager and with captured steps.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.schedule.plan import StepPlan
from nanovllm.structured import matcher
from tests.engines import drain

OPTIONS: dict[str, Any] = {
    "dtype": "float32", "max_num_seqs": 12, "max_model_len": 128,
    "max_num_batched_tokens": 64, "kvcache_block_size": 16, "num_kvcache_blocks": 97,
}  # fmt: skip
PROMPT = "What is 2 + 3?"
CODE = r"[0-9]{3}-[a-f]{2}"
LONG = f"({CODE};){{7}}"
OPEN = "(ab)+"  # may end, or go on
GRAPH: dict[str, Any] = {"enforce_eager": False, "graph_batch_sizes": (4, 12)}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param({"device": "cpu", "enforce_eager": True}, id="cpu"),
        pytest.param({"device": "cuda", "enforce_eager": True}, id="cuda", marks=pytest.mark.gpu),
        pytest.param({"device": "cuda", **GRAPH}, id="cuda-graph", marks=pytest.mark.gpu),
    ],
)
def place(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options: the device, and whether steps are captured."""
    return dict(request.param)


@pytest.fixture(scope="module")
def llm(place: dict[str, Any]) -> Iterator[LLM]:
    llm = LLM("tiny-qwen3", **OPTIONS, **place)
    yield llm
    llm.close()


@pytest.fixture
def make(place: dict[str, Any]) -> Iterator[Callable[..., LLM]]:
    made: list[LLM] = []

    def make(**options: Any) -> LLM:
        made.append(LLM("tiny-qwen3", **{**OPTIONS, **place, **options}))
        return made[-1]

    yield make
    for llm in made:
        llm.engine.close()


def params(seed: int = 0, regex: str = CODE, **changes: Any) -> SamplingParams:
    fields = {"max_tokens": 24, "seed": seed, "structured_outputs": {"regex": regex}, **changes}
    return SamplingParams(**fields)


def plain(seed: int = 0, **changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 24, "seed": seed, "ignore_eos": True, **changes})


def mixed(regex: str = CODE, num: int = 24) -> list[SamplingParams]:
    """Constrained and other requests of all kinds of samplers."""
    asked = [
        params(1, regex), plain(2), params(3, regex, top_k=4, top_p=0.9), plain(4, top_k=3),
        params(5, regex, repetition_penalty=1.3), params(6, regex, logit_bias={16: 3.0}),
        plain(7, min_p=0.1), params(8, OPEN, min_tokens=6), params(9, regex, temperature=0.0),
        plain(10, logprobs=2),
    ]  # fmt: skip
    for one in asked:
        one.max_tokens = num
    return asked


def answers(llm: LLM, asked: list[SamplingParams]) -> list[tuple[list[int], str]]:
    found = llm.generate([PROMPT] * len(asked), asked, use_tqdm=False)
    return [(output["token_ids"], output["finish_reason"]) for output in found]


def plans_of(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[StepPlan]:
    """The plans that the engine launches from now on."""
    plans: list[StepPlan] = []
    launch = llm.engine.runner.launch
    monkeypatch.setattr(
        llm.engine.runner, "launch", lambda plan: (plans.append(plan), launch(plan))[1]
    )
    return plans


def test_an_answer_ends_where_its_grammar_ends(llm: LLM) -> None:
    (output,) = llm.generate(PROMPT, params(), use_tqdm=False)
    assert re.fullmatch(CODE, output["text"]) and output["finish_reason"] == "stop"
    assert not llm.engine.eos_ids.intersection(output["token_ids"])


def test_the_end_of_the_sequence_is_allowed_only_after_a_whole_match(llm: LLM) -> None:
    eos = max(llm.engine.eos_ids)
    wish = {eos: 100.0}  # as much as can be asked for
    for seed, (regex, least) in enumerate([("abc?", "ab"), ("x{3,9}", "xxx"), ("[0-9]?yz*", "y")]):
        (output,) = llm.generate(PROMPT, params(seed, regex, logit_bias=wish), use_tqdm=False)
        assert output["text"].lstrip("0123456789") == least
        assert output["token_ids"][-1] == eos and output["finish_reason"] == "stop"


def test_ignore_eos_goes_on_while_anything_else_may_follow(llm: LLM) -> None:
    wish = dict.fromkeys(llm.engine.eos_ids, 100.0)
    (output,) = llm.generate(
        PROMPT, params(regex=OPEN, logit_bias=wish, ignore_eos=True, max_tokens=9), use_tqdm=False
    )
    assert output["finish_reason"] == "length" and re.fullmatch("(ab)*a?", output["text"])
    (output,) = llm.generate(PROMPT, params(ignore_eos=True), use_tqdm=False)
    assert output["finish_reason"] == "stop" and re.fullmatch(CODE, output["text"])


def test_min_tokens_prolong_an_answer_only_as_far_as_its_grammar_goes(llm: LLM) -> None:
    wish = dict.fromkeys(llm.engine.eos_ids, 100.0)
    (output,) = llm.generate(
        PROMPT, params(regex=OPEN, logit_bias=wish, min_tokens=10), use_tqdm=False
    )
    assert len(output["token_ids"]) >= 10 and re.fullmatch(OPEN, output["text"])
    (output,) = llm.generate(PROMPT, params(min_tokens=20), use_tqdm=False)
    assert re.fullmatch(CODE, output["text"]) and output["finish_reason"] == "stop"


def test_a_stop_string_ends_an_answer_earlier(llm: LLM) -> None:
    (output,) = llm.generate(PROMPT, params(stop="-"), use_tqdm=False)
    assert re.fullmatch("[0-9]{3}", output["text"]) and output.outputs[0].stop_reason == "-"


def test_choices_may_hold_any_text(llm: LLM) -> None:
    for choice in (['"', "\\"], ["日本\n"], ["a/b", "a/"], [" x  "], ["|", "//", "(?i)"]):
        asked = [
            params(seed, structured_outputs={"choice": choice}, skip_special_tokens=False)
            for seed in range(4)
        ]
        for output in llm.generate([PROMPT] * 4, asked, use_tqdm=False):
            assert output["text"].replace("<|im_end|>", "") in choice, output


def test_grammars_may_be_lark_or_gbnf_and_name_special_tokens(llm: LLM) -> None:
    grammars = {
        'root ::= "<" pair ">"\npair ::= [0-9] pair | "x"': "<[0-9]*x>",
        'start: "a" DIGIT+ "b"\nDIGIT: /[0-9]/': "a[0-9]+b",
        'start: "say " <|im_start|> %json {"type": "boolean"}': r"say <\|im_start\|>(true|false)",
    }
    for grammar, expected in grammars.items():
        asked = params(structured_outputs={"grammar": grammar}, skip_special_tokens=False)
        (output,) = llm.generate(PROMPT, asked, use_tqdm=False)
        assert re.fullmatch(expected, output["text"]) or output["finish_reason"] == "length", output


def test_each_of_n_answers_follows_the_grammar(llm: LLM) -> None:
    (output,) = llm.generate(PROMPT, params(n=5), use_tqdm=False)
    texts = [answer.text for answer in output.outputs]
    assert len(set(texts)) > 1 and all(re.fullmatch(CODE, text) for text in texts)


def test_log_probabilities_are_those_of_the_model_without_the_mask(llm: LLM) -> None:
    asked = [params(logprobs=5, max_tokens=1), plain(logprobs=5, max_tokens=1)]
    constrained, free = llm.generate([PROMPT] * 2, asked, use_tqdm=False)
    ours, theirs = constrained["logprobs"][0], free["logprobs"][0]
    same = ours.keys() & theirs.keys()
    assert len(same) >= 5 and not ours.keys() <= {llm.tokenizer.encode(d)[0] for d in "0123456789"}
    assert all(ours[token].logprob == theirs[token].logprob for token in same)


def test_bias_and_allowed_tokens_that_leave_nothing_end_the_request_with_an_error(llm: LLM) -> None:
    forbidden = {llm.tokenizer.encode(digit)[0]: -100.0 for digit in "0123456789"}
    (biased,) = llm.generate(PROMPT, params(logit_bias=forbidden), use_tqdm=False)
    assert re.fullmatch(CODE, biased["text"]), "a bias makes no token impossible"
    x = llm.tokenizer.encode("x")[0]
    stuck, free = llm.generate(
        [PROMPT] * 2, [params(allowed_token_ids=[x]), params(3)], use_tqdm=False
    )
    assert stuck["finish_reason"] == "error" and stuck["error"].startswith(
        "structured_outputs: no token can follow"
    )
    assert re.fullmatch(CODE, free["text"])


def test_other_rows_get_the_same_tokens_beside_constrained_ones(llm: LLM) -> None:
    free = [plain(seed) for seed in range(4)] + [plain(5, top_k=7), plain(6, presence_penalty=0.5)]
    alone = answers(llm, free)
    constrained = [params(seed) for seed in range(3)]
    assert answers(llm, [*free, *constrained])[: len(free)] == alone
    assert answers(llm, free) == alone, "no mask is left in a row that was constrained"


@pytest.mark.parametrize(
    "options",
    [
        {"run_ahead": 1},
        pytest.param({"run_ahead": 0}, marks=pytest.mark.gpu),  # on a CPU it is 0
        GRAPH,
        {"num_kvcache_blocks": 9, "run_ahead": 1},
        {"num_kvcache_blocks": 9, "enable_prefix_caching": False},
    ],
    ids=["ahead", "behind", "graph", "preempted", "uncached"],
)
def test_answers_depend_on_neither_graphs_nor_order(
    llm: LLM, make: Callable[..., LLM], options: dict[str, Any]
) -> None:
    expected = answers(llm, mixed(LONG, 60))
    other = make(**options)
    assert answers(other, mixed(LONG, 60)) == expected
    if options.get("num_kvcache_blocks"):
        assert other.engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize("device_name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpus)])
def test_two_ranks_give_the_answers_of_one(device_name: str) -> None:
    found = []
    for num_ranks in (1, 2):
        llm = LLM(
            "tiny-qwen3", device=device_name, tensor_parallel_size=num_ranks, enforce_eager=True,
            **OPTIONS,
        )  # fmt: skip
        found.append(answers(llm, mixed(LONG, 60)))
        llm.close()
    assert found[0] == found[1]


@pytest.mark.gpu
def test_a_step_with_masks_is_captured_once(captured: list[object]) -> None:
    llm = LLM("tiny-qwen3", device="cuda", **OPTIONS, **GRAPH)
    num_warm, asked = len(captured), [params(1, LONG), plain(2), params(3, LONG)]
    first = answers(llm, asked)
    num_captured = len(captured)
    assert num_captured > num_warm
    assert answers(llm, asked) == first and len(captured) == num_captured
    llm.close()


def test_only_constrained_rows_wait_for_their_tokens(
    make: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a step launched ahead, free rows are in every step and constrained ones in every
    second one."""
    llm = make(run_ahead=1)
    answers(llm, [params(regex="[a-z]{16}")])  # the grammar is compiled now
    plans = plans_of(llm, monkeypatch)
    answers(llm, [plain(max_tokens=20), params(regex="[a-z]{16}", max_tokens=8)])
    decode = [(len(plan.rows), plan.sampling.masked) for plan in plans if not plan.is_prefill]
    both = [rows for rows, masked in decode if masked]
    assert both.count(2) == 7 and len(decode) <= 22
    assert all(one != other for one, other in pairwise(decode[:13]))


def test_masks_that_take_long_keep_no_other_row_waiting(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers(llm, mixed())
    monkeypatch.setattr(matcher, "SLOW_S", 0.0)  # every mask is computed in a thread
    assert answers(llm, mixed()) == expected
    may_go_on, timed = threading.Event(), matcher.Masks._timed

    def slow(self: Any, one: Any) -> Any:
        assert may_go_on.wait(60)
        return timed(self, one)

    monkeypatch.setattr(matcher.Masks, "_timed", slow)
    engine = llm.engine
    constrained = engine.add_request(PROMPT, params(regex=f"x{CODE}"))
    while engine._grammars:
        engine.step()
    free = engine.add_request(PROMPT, plain())
    done = {}
    while free not in done:
        done.update({one.request_id: one.completion for one in engine.step() if one.completion})
    assert constrained not in done
    may_go_on.set()
    assert re.fullmatch(f"x{CODE}", drain(llm)[constrained].text)


def test_a_mask_that_is_ready_between_planning_and_waiting_ends_no_engine(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matcher, "SLOW_S", 0.0)  # every mask is computed in a thread
    asked = params(regex=f"y{CODE}")
    expected = answers(llm, [asked])
    timed, schedule = matcher.Masks._timed, llm.engine.scheduler.schedule
    may_go_on, num_late = threading.Event(), 0

    def after_planning(self: Any, one: Any) -> Any:
        assert may_go_on.wait(60)
        return timed(self, one)

    def planned(*, may_preempt: bool) -> StepPlan | None:
        nonlocal num_late
        plan = schedule(may_preempt=may_preempt)
        for request in llm.engine.scheduler.running if plan is None else ():
            assert isinstance(request.constraint, matcher.Matcher)
            if request.constraint._work is not None:
                may_go_on.set()
                request.constraint._work.result()
                may_go_on.clear()
                num_late += 1
        return plan

    monkeypatch.setattr(matcher.Masks, "_timed", after_planning)
    monkeypatch.setattr(llm.engine.scheduler, "schedule", planned)
    assert answers(llm, [asked]) == expected and num_late


def test_the_wait_for_masks_finds_what_has_finished_and_keeps_no_masks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    masks, one = matcher.Masks(64, 64, [0]), Mock(spec=matcher.Matcher)
    monkeypatch.setattr(masks, "_timed", lambda one: np.zeros(2, np.int32))
    for _ in range(3):
        masks.begin(one)
    masks.close()
    assert masks.wait(0.0), "masks have finished since the last wait"
    assert not masks.wait(0.0), "and none since"
    assert not masks._begun


def test_constrained_rows_verify_forced_tokens_and_those_beside_them_proposals(
    make: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make(draft_lengths=(2,), run_ahead=0)  # proposals follow known tokens
    asked = [params(1), plain(2, max_tokens=60), params(3, LONG, max_tokens=40)]
    expected = answers(llm, [replace(one, disable_spec_decode=True) for one in asked])
    llm.engine.propose = lambda request: request.prompt_ids[:2]
    plans = plans_of(llm, monkeypatch)
    assert answers(llm, asked) == expected
    assert llm.tokenizer is not None
    proposed = llm.tokenizer.encode(PROMPT)[:2]
    steps = [plan for plan in plans if not plan.is_prefill]
    masked = [plan for plan in steps if plan.sampling.masked]
    free = [[num for row, num in enumerate(plan.num_tokens) if row not in plan.sampling.masked]
            for plan in masked]  # fmt: skip
    assert any(max(nums, default=1) > 1 for nums in free), "proposals of rows beside them"
    fed = [
        plan.proposed(row) for plan in masked for row in plan.sampling.masked if len(plan.token_T)
    ]
    assert proposed in fed, "where a grammar forces nothing else"
    counts = llm.engine.scheduler.counts
    assert 0 < counts.num_forced_tokens < sum(map(len, fed))


def test_an_error_in_a_step_leaves_answers_as_they_are(
    make: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make(run_ahead=1)
    expected = answers(llm, mixed())
    launch, num = llm.engine.runner.launch, iter(range(100))

    def failing(plan: StepPlan) -> Any:
        if next(num) in (2, 5, 6):
            raise KeyboardInterrupt
        return launch(plan)

    engine = llm.engine
    ids = [engine.add_request(PROMPT, one, incremental=False) for one in mixed()]
    monkeypatch.setattr(engine.runner, "launch", failing)
    done, num_failures = {}, 0
    while engine.has_unfinished:
        try:
            done.update({one.request_id: one.completion for one in engine.step() if one.completion})
        except KeyboardInterrupt:
            num_failures += 1
    assert num_failures == 3
    assert [(done[one].token_ids, done[one].finish_reason) for one in ids] == expected


def test_a_request_whose_grammar_is_being_compiled_can_be_aborted(llm: LLM) -> None:
    engine = llm.engine
    ids = [engine.add_request(PROMPT, params(regex=f"{i}{CODE}")) for i in range(6)]
    for request_id in ids[::2]:
        engine.abort(request_id)
    done = drain(llm)
    assert [done[one].finish_reason for one in ids] == ["abort", "stop"] * 3
    assert not engine._grammars and not engine.scheduler.has_work


def test_answers_stream(llm: LLM) -> None:
    pieces = [one.text for one in llm.stream(PROMPT, params())]
    assert len(pieces) > 3 and re.fullmatch(CODE, "".join(pieces))
