"""Bias, allowed tokens and bad words equal a plain formula, and stay in the captured step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm import LLM, SamplingParams, platforms
from nanovllm.kernels import reference
from nanovllm.platforms.base import Replay
from nanovllm.runner import logit_edits
from nanovllm.runner.logit_edits import EditTables
from nanovllm.runner.sampling import Penalties, penalize
from nanovllm.schedule.plan import LogitEdits, RowEdits, SamplingMetadata, StepPlan
from tests.engines import VOCAB_SIZE, assert_all_free, drain, greedy, random_prompts

MINUS_INF = float("-inf")
Ask = tuple[list[int], SamplingParams, LogitEdits | None]


def edits(
    bias: dict[int, float] | None = None,
    allowed: list[int] | None = None,
    bad: Sequence[Sequence[int]] = (),
) -> LogitEdits:
    return LogitEdits(bias or {}, allowed, [list(word) for word in bad])


def add(llm: LLM, ask: Ask) -> int:
    prompt, params, wanted = ask
    if wanted is not None:
        llm.engine.runner.prepare(wanted)
    request_id = llm.engine.add_request(prompt, params, incremental=False)
    llm.engine.scheduler.waiting[-1].edits = wanted
    return request_id


def answers(llm: LLM, asks: Sequence[Ask]) -> list[list[int]]:
    ids = [add(llm, ask) for ask in asks]
    done = drain(llm)
    return [done[request_id].token_ids for request_id in ids]


# the formula --------------------------------------------------------------------------------------


def ends_with(output: list[int], ending: list[int]) -> bool:
    return not ending or output[-len(ending) :] == ending


def edited(logits_V: Tensor, wanted: LogitEdits, output: list[int]) -> Tensor:
    logits_V = logits_V.clone()
    if wanted.allowed is not None:
        forbidden = set(range(len(logits_V))) - set(wanted.allowed)
        logits_V[sorted(forbidden)] = MINUS_INF
    for word in wanted.bad:
        if ends_with(output, word[:-1]):
            logits_V[word[-1]] = MINUS_INF
    for token_id, value in wanted.bias.items():
        logits_V[token_id] += value
    return logits_V


def choose(logits_1V: Tensor, params: SamplingParams, prompt: list[int], output: list[int]) -> int:
    """The next token by the plain-torch meanings of penalties, filters and draws."""
    counts_1V = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=VOCAB_SIZE)[None]
    in_prompt_1V = torch.zeros(1, VOCAB_SIZE, dtype=torch.bool)
    in_prompt_1V[0, prompt] = True

    def column(value: float) -> Tensor:
        return torch.full((1, 1), float(value))

    strengths = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    if params.has_penalties:
        penalties = Penalties(counts_1V, in_prompt_1V, *map(column, strengths))
        logits_1V = penalize(logits_1V, penalties)
    fields = params.temperature, params.top_k, params.top_p, params.min_p
    temperature_1, *filters = (column(value)[0] for value in fields)
    kept_1V = reference.sample.apply_top_k_top_p(logits_1V, temperature_1, *filters)
    seed_1, pos_1 = torch.tensor([params.seed or 0]), torch.tensor([len(prompt) + len(output)])
    return int(reference.sample.sample(kept_1V, temperature_1, seed_1, pos_1))


@pytest.fixture(scope="module")
def formula(hf_model: Any) -> Callable[[Ask], list[int]]:
    """The answer to one request from transformers' logits and the formulas above."""

    def answer(ask: Ask) -> list[int]:
        prompt, params, wanted = ask
        output: list[int] = []
        while len(output) < params.max_tokens:
            with torch.no_grad():
                ids = torch.tensor([prompt + output], device=hf_model.device)
                logits_V = hf_model(ids).logits[0, -1].float().cpu()
            if wanted is not None:
                logits_V = edited(logits_V, wanted, output)
            output.append(choose(logits_V[None], params, prompt, output))
        return output

    return answer


@pytest.fixture(scope="module")
def asks(shared_llm: LLM) -> list[Ask]:
    """Requests with each kind of edits, and plain ones. Bad words are parts of plain answers."""
    prompts = random_prompts([5, 19, 33, 7, 16, 1, 40, 9, 12, 3, 21], seed=11)
    drawn = greedy(12, temperature=1.3, seed=4)
    plain = answers(shared_llm, [(prompt, greedy(), None) for prompt in prompts])
    some = sorted({token_id for answer in plain for token_id in answer[:6]})
    bad = [[one[1]] if idx % 2 else one[1:3] for idx, one in enumerate(plain)]
    return [
        (prompts[0], greedy(), None),
        (prompts[1], greedy(), edits(bias={plain[1][0]: -9.5, 77: 2.5, plain[1][3]: MINUS_INF})),
        (prompts[2], greedy(), edits(allowed=list(range(100, 140)))),
        (prompts[3], greedy(), edits(bad=[[plain[3][0]], [plain[3][4]]])),
        (prompts[4], greedy(), edits(bad=[plain[4][:2], plain[4][1:5], plain[4][3:9]])),
        (prompts[5], drawn, None),
        (prompts[6], replace(drawn, top_k=5), edits(allowed=some, bad=bad)),
        (prompts[7], replace(drawn, top_p=0.6), edits(bias=dict.fromkeys(some, 6.0), bad=bad)),
        (prompts[8], greedy(repetition_penalty=1.7), edits(bias={plain[8][1]: 5.0}, bad=bad)),
        (prompts[9], greedy(presence_penalty=1.5, frequency_penalty=0.7), None),
        (
            prompts[10],
            greedy(),
            edits(bias={7: 3.0, 8: MINUS_INF}, allowed=[7, 8, 9], bad=[[7, 7]]),
        ),
    ]


@pytest.fixture(scope="module")
def expected(asks: list[Ask], formula: Callable[[Ask], list[int]]) -> list[list[int]]:
    found = [formula(ask) for ask in asks]
    for (prompt, params, wanted), answer in zip(asks, found):
        if wanted is not None:
            assert formula((prompt, params, None)) != answer, "the edits change the answer"
    return found


def test_answers_with_edits_are_those_of_the_formula(
    llm: LLM, asks: list[Ask], expected: list[list[int]]
) -> None:
    assert answers(llm, asks) == expected
    assert answers(llm, asks[::-1]) == expected[::-1]
    for ask, answer in zip(asks, expected):
        assert answers(llm, [ask]) == [answer]


def test_edits_change_no_answer_in_other_rows(llm: LLM, asks: list[Ask]) -> None:
    plain = [(prompt, params, None) for prompt, params, _ in asks]
    alone = answers(llm, plain)
    mixed = [one for pair in zip(plain, asks) for one in pair]
    assert answers(llm, mixed)[::2] == alone


def test_steps_that_need_the_host_keep_the_edits(
    eager_llm: LLM, asks: list[Ask], expected: list[list[int]]
) -> None:
    """Log-probabilities are those of the model's own logits."""
    watched = [(prompt, replace(params, logprobs=2), one) for prompt, params, one in asks]
    plain = [(prompt, greedy(1, logprobs=2), None) for prompt, _, _ in asks]
    assert answers(eager_llm, watched) == expected
    first = []
    for batch in (watched, plain):
        ids = [add(eager_llm, ask) for ask in batch]
        done = drain(eager_llm)
        first.append([sorted((done[one].logprobs or [{}])[0].values())[-2:] for one in ids])
    assert first[0] == first[1]


def test_edits_survive_preemption_and_chunks(
    make_llm: Callable[..., LLM], asks: list[Ask], formula: Callable[[Ask], list[int]]
) -> None:
    """A restarted request remembers the newest tokens of its output, which bad words need."""
    longer = [(prompt, replace(params, max_tokens=40), one) for prompt, params, one in asks[1:8]]
    # two tokens in turns: every step depends on the newest token
    turns = edits(allowed=[7, 8], bad=[[7, 7], [8, 8]])
    longer += [(prompt, greedy(40), turns) for prompt, _, _ in asks[:4]]
    llm = make_llm(num_kvcache_blocks=1 + 10, max_model_len=160, max_num_batched_tokens=32)
    assert answers(llm, longer) == [formula(ask) for ask in longer]
    assert llm.engine.scheduler.num_preemptions > 0
    assert_all_free(llm)


def test_a_bad_word_never_appears_but_its_beginning_does(
    llm: LLM, formula: Callable[[Ask], list[int]]
) -> None:
    for prompt in random_prompts([5, 19], seed=13):
        (plain,) = answers(llm, [(prompt, greedy(40), None)])
        words = [plain[start : start + size] for start, size in ((0, 2), (9, 3), (20, 5), (30, 4))]
        (answer,) = answers(llm, [(prompt, greedy(40), edits(bad=words))])
        for word in words:
            assert not any(ends_with(answer[:end], word) for end in range(len(answer) + 1))
        assert answer[0] == words[0][0], "only the last token of a word is forbidden"
    ask = ([5, 6, 7], greedy(6), edits(bad=[[5, 6, 7, plain[0]]]))
    assert answers(llm, [ask]) == [formula((*ask[:2], None))], "the prompt does not count"


def test_a_row_without_edits_has_none_of_an_earlier_request(make_llm: Callable[..., LLM]) -> None:
    """One row has edits for the whole time, so that all steps apply edits."""
    llm = make_llm(max_num_seqs=2)
    prompts = random_prompts([5, 6, 7, 8], seed=17)
    plain = answers(llm, [(prompt, greedy(8), None) for prompt in prompts])
    banned = edits(bias={plain[2][0]: MINUS_INF}, allowed=list(range(9, 40)), bad=[plain[3][:2]])
    found = answers(
        llm,
        [
            (prompts[0], greedy(40), edits(bias={plain[0][0]: MINUS_INF})),
            (prompts[1], greedy(3), banned),
            (prompts[2], greedy(8), None),
            (prompts[3], greedy(8), None),
        ],
    )
    assert found[2:] == plain[2:]


@pytest.mark.parametrize(
    "params",
    [greedy(4), greedy(4, temperature=1.5, seed=3), greedy(4, temperature=0.8, top_k=9, seed=3),
     greedy(4, temperature=0.8, top_p=0.5, seed=3), greedy(4, temperature=0.8, min_p=0.1, seed=3),
     greedy(4, repetition_penalty=1.5, frequency_penalty=1.0)],
)  # fmt: skip
def test_one_or_no_token_may_be_left(llm: LLM, params: SamplingParams) -> None:
    """Without any token left, the answer has some token of the vocabulary, and others are right."""
    prompt, other = random_prompts([5, 6], seed=19)
    everything = dict.fromkeys(range(VOCAB_SIZE), MINUS_INF)
    one, none, no_bias, plain = answers(
        llm,
        [
            (prompt, params, edits(allowed=[300])),
            (prompt, params, edits(allowed=[300], bad=[[300]])),
            (prompt, params, edits(bias=everything)),
            (other, params, None),
        ],
    )
    assert one == [300] * 4
    assert all(0 <= token_id < VOCAB_SIZE for token_id in none + no_bias)
    assert [plain] == answers(llm, [(other, params, None)])


# captured -----------------------------------------------------------------------------------------


@pytest.fixture
def outside(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The ops that run outside of captured steps, and "replay" for each captured step."""
    found: list[str] = []
    platform = type(platforms.select(device))
    capture = platform.capture

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            found.append(str(function))
            return function(*args, **(kwargs or {}))

    watch = Watch()

    def capture_quietly(self: Any, step: Callable[[], None]) -> Replay:
        replay = capture(self, step)

        def quiet() -> None:
            size = len(found)
            replay()
            found[size:] = ["replay"]

        return quiet

    monkeypatch.setattr(platform, "capture", capture_quietly)
    with watch:
        yield found


def decode_ops(llm: LLM, asks: Sequence[Ask], outside: list[str]) -> list[list[str]]:
    """What each decode step runs outside of captured steps."""
    runner, steps = llm.engine.runner, []
    launch = type(runner).launch

    def watched(plan: StepPlan) -> Any:
        outside.clear()
        launched = launch(runner, plan)
        if not plan.is_prefill:
            steps.append(outside[:])
        return launched

    runner.launch = watched  # type: ignore[method-assign]
    answers(llm, asks)
    del runner.launch
    return steps


def test_a_decode_step_with_edits_or_penalties_is_one_captured_step(
    make_llm: Callable[..., LLM], outside: list[str], captured: list[object]
) -> None:
    llm = make_llm(enforce_eager=False, graph_batch_sizes=[4], max_num_seqs=4)
    prompts = random_prompts([5, 19, 7], seed=23)
    plain: list[Ask] = [(prompt, greedy(6), None) for prompt in prompts]
    wanted = edits(bias={5: 1.0}, allowed=list(range(60)), bad=[[7], [8, 9]])
    (step,) = llm.engine.runner.buckets.decode_steps.values()
    replay, steps = step.replay, decode_ops(llm, plain, outside)
    assert steps[1].count("replay") == 1, "the plain step"
    penalized = replace(greedy(6), presence_penalty=1.0, repetition_penalty=1.3)
    num_captured = len(captured)
    for ask in [(prompts[0], greedy(6), wanted), (prompts[0], penalized, None),
                (prompts[0], penalized, wanted)]:  # fmt: skip
        decode_ops(llm, [ask, *plain[1:]], outside)  # captures the step
        num_captured += 1
        assert len(captured) == num_captured, "once for each kind of sampler"
        assert decode_ops(llm, [ask, *plain[1:]], outside)[1:] == steps[1:]
        assert len(captured) == num_captured
    assert step.replay is replay and decode_ops(llm, plain, outside) == steps


def test_growing_tables_capture_the_step_again(
    make_llm: Callable[..., LLM], captured: list[object], formula: Callable[[Ask], list[int]]
) -> None:
    """A captured step reads the tables at their old place."""
    llm = make_llm(enforce_eager=False, graph_batch_sizes=[4], max_num_seqs=4)
    prompts = random_prompts([5, 19], seed=29)
    plain = [formula((prompt, greedy(20), None)) for prompt in prompts]
    words = [[plain[0][i : i + 2] for i in (3, 9)], [plain[1][i : i + 7] for i in (0, 4, 12)]]
    words[1] += [[i, i + 1] for i in range(40)]
    small, large = (
        (prompt, greedy(20), edits(bad=bad)) for prompt, bad in zip(prompts, words, strict=True)
    )
    first = add(llm, small)
    for _ in range(8):
        llm.engine.step()
    num_captured = len(captured)
    second = add(llm, large)
    done = drain(llm)
    assert [done[one].token_ids for one in (first, second)] == [formula(small), formula(large)]
    assert len(captured) == num_captured + 1
    assert answers(llm, [small, large]) == [formula(small), formula(large)]
    assert len(captured) == num_captured + 1


def test_a_captured_sampler_moves_nothing_between_host_and_device(eager_llm: LLM) -> None:
    """Such ops synchronise, or read host memory that is gone when the graph is replayed."""
    runner = eager_llm.engine.runner
    runner.prepare(edits(bias={5: 1.0}, bad=[[7], [8, 9]]), has_penalties=True)
    host_ops = {
        "aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh", "aten::_pin_memory",
        "aten::masked_select", "aten::scalar_tensor",
    }  # fmt: skip

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            assert function._schema.name not in host_ops, function
            return function(*args, **(kwargs or {}))

    row_idx_R = torch.full((2,), runner.state.pad_row, device=runner.platform.device)
    logits_RV = torch.randn(2, VOCAB_SIZE, device=runner.platform.device)
    for has_edits, has_penalties in ((False, False), (True, False), (False, True), (True, True)):
        sampling = SamplingMetadata(
            has_filters=True, has_edits=has_edits, has_penalties=has_penalties
        )
        variant = runner.sampler.variant(sampling)
        with torch.no_grad(), Refuse():
            variant.choose(row_idx_R, logits_RV)


# the tables ---------------------------------------------------------------------------------------


@pytest.fixture
def tables(device: str) -> EditTables:
    return EditTables(platforms.select(device), num_rows=4, vocab_size=50)


def test_tables_that_grow_keep_their_rows(tables: EditTables) -> None:
    wanted = edits(bias={4: 2.0}, bad=[[1, 2], [3, 4, 5], [9]])
    tables.write([RowEdits(2, wanted, [7, 3, 4])])
    logits_RV = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    logits_RV = logits_RV.to(tables._platform.device)
    row_idx_R = torch.tensor([2], device=logits_RV.device)
    before, version = tables.edit(row_idx_R, logits_RV), tables.version
    assert torch.equal(before.cpu()[0], edited(logits_RV.cpu()[0], wanted, [7, 3, 4]))
    tables.reserve([edits(bad=[[6] * 30] * 99)])
    assert tables.version == version + 1
    assert torch.equal(tables.edit(row_idx_R, logits_RV), before)
    tables.append(row_idx_R, torch.tensor([1], device=logits_RV.device))
    expected_V = edited(logits_RV.cpu()[0], wanted, [7, 3, 4, 1])
    assert torch.equal(tables.edit(row_idx_R, logits_RV).cpu()[0], expected_V)


def test_a_request_that_does_not_fit_into_memory_changes_nothing(
    eager_llm: LLM, asks: list[Ask], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [add(eager_llm, ask) for ask in asks]
    for _ in range(4):
        eager_llm.engine.step()
    version = eager_llm.engine.runner.sampler.edits.version

    def full(*args: Any, **kwargs: Any) -> Tensor:
        raise torch.OutOfMemoryError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(logit_edits.torch, "full", full)
        with pytest.raises(torch.OutOfMemoryError):
            eager_llm.engine.runner.prepare(edits(bad=[[i, i, i] for i in range(500)]))
    assert eager_llm.engine.runner.sampler.edits.version == version
    done = drain(eager_llm)
    assert [done[request_id].token_ids for request_id in ids] == expected


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (edits(bias={512: 1.0}), r"logit_bias holds token id 512: ids of this model are 0 … 511"),
        (edits(bias={5: float("inf")}), r"logit_bias of token 5 is inf: it must be −inf, or"),
        (edits(bias={5: float("nan")}), r"logit_bias of token 5 is nan"),
        (edits(allowed=[5, -1]), r"allowed_token_ids holds token id -1"),
        (edits(bad=[[5, 600]]), r"bad_words holds token id 600"),
        (edits(bad=[[]]), r"bad_words has a word of 0 tokens"),
        (edits(bad=[[5] * 65]), r"bad_words has a word of 65 tokens: .* at most 64"),
        (edits(bad=[[5, 6]] * 4097), r"bad_words has 4097 words of several tokens: at most 4096"),
    ],
    ids=str,
)
def test_edits_that_do_not_fit_are_refused(
    eager_llm: LLM, wanted: LogitEdits, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        eager_llm.engine.runner.prepare(wanted)
