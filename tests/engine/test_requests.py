"""add_request, step, abort and several streams: each request gets its own tokens."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable

import pytest

from nanovllm import LLM
from nanovllm.schedule.outputs import FinishedOutput, OutputDelta
from tests.engines import (
    NUM_TOKENS,
    Generate,
    assert_all_free,
    drain,
    greedy,
    random_prompts,
    tokens,
)


def test_increments_add_up_to_the_completion(eager_llm: LLM, hf_generate: Generate) -> None:
    engine = eager_llm.engine
    (prompt, other) = random_prompts([19, 7], seed=80)
    steady, quiet = (
        engine.add_request(prompt, greedy()),
        engine.add_request(other, greedy(), incremental=False),
    )
    outputs: list[OutputDelta] = []
    while engine.has_unfinished:
        outputs += engine.step()
    mine = [output for output in outputs if output.request_id == steady]
    assert [len(output.token_ids) for output in mine] == [1] * NUM_TOKENS
    assert [output.finished for output in mine] == [False] * (NUM_TOKENS - 1) + [True]
    completion = mine[-1].completion
    assert completion is not None and completion.token_ids == hf_generate(prompt, NUM_TOKENS)
    assert completion.text == "".join(output.text for output in mine)
    (last,) = [output for output in outputs if output.request_id == quiet]
    assert last.completion is not None and last.completion.token_ids == hf_generate(
        other, NUM_TOKENS
    )


def test_step_without_work_returns_nothing(eager_llm: LLM) -> None:
    assert eager_llm.engine.step() == [] and not eager_llm.engine.has_unfinished


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 5, 9])
def test_abort_in_mid_flight(llm: LLM, hf_generate: Generate, num_steps: int) -> None:
    """An aborted request ends with the tokens it has; other requests do not change."""
    engine = llm.engine
    prompts = random_prompts([19, 200, 200, 33], seed=81)
    ids = [engine.add_request(prompt, greedy()) for prompt in prompts]
    done: dict[int, FinishedOutput] = {}
    for _ in range(num_steps):
        done.update(
            {output.request_id: output.completion for output in engine.step() if output.completion}
        )
    for request_id in (ids[1], ids[0], ids[1], 10**9):
        engine.abort(request_id)
    last = [output for output in engine.step() if output.completion]
    aborted = {
        output.request_id: output.completion
        for output in last
        if output.completion.finish_reason == "abort"
    }
    assert set(aborted) == {ids[0], ids[1]}
    for idx in (0, 1):
        found = aborted[ids[idx]].token_ids
        assert (
            len(found) <= num_steps and found == hf_generate(prompts[idx], NUM_TOKENS)[: len(found)]
        )
    done.update(drain(llm))
    for idx in (2, 3):
        assert done[ids[idx]].token_ids == hf_generate(prompts[idx], NUM_TOKENS)
    # aborted requests left correct blocks in the prefix cache
    assert tokens(llm, prompts, greedy()) == [hf_generate(prompt, NUM_TOKENS) for prompt in prompts]


def test_abort_everything(llm: LLM) -> None:
    engine = llm.engine
    ids = [engine.add_request(prompt, greedy(50)) for prompt in random_prompts([5] * 45, seed=82)]
    for _ in range(4):
        engine.step()
    for request_id in ids:
        engine.abort(request_id)
    assert {reason.finish_reason for reason in drain(llm).values()} == {"abort"}


def test_generate_leaves_the_outputs_of_others_to_them(llm: LLM, hf_generate: Generate) -> None:
    """A request added before `generate` goes on meanwhile, and its outputs wait for `step`."""
    engine = llm.engine
    short, long, prompt = random_prompts([5, 9, 33], seed=83)
    ids = [engine.add_request(short, greedy(3)), engine.add_request(long, greedy(40))]
    assert tokens(llm, [prompt], greedy()) == [hf_generate(prompt, NUM_TOKENS)]
    found: dict[int, list[int]] = {request_id: [] for request_id in ids}
    while engine.has_unfinished:
        for output in engine.step():
            found[output.request_id] += output.token_ids
    assert found == {ids[0]: hf_generate(short, 3), ids[1]: hf_generate(long, 40)}


def test_two_streams_and_a_generate_between_them(llm: LLM, hf_generate: Generate) -> None:
    prompts = random_prompts([5, 9, 33, 40, 19], seed=84)
    first, second = llm.stream(prompts[:2], greedy(20)), llm.stream(prompts[2:4], greedy(9))
    found: list[list[int]] = [[], [], [], []]
    between = False
    for offset, stream in [(0, first), (2, second)] * 200:
        for piece in [next(stream, None)]:
            if piece is not None:
                found[offset + piece["index"]] += piece["token_ids"]
        if len(found[0]) == 4 and not between:
            between = True
            assert tokens(llm, prompts[4:], greedy()) == [hf_generate(prompts[4], NUM_TOKENS)]
    assert (
        found == [hf_generate(prompt, num) for prompt, num in zip(prompts, (20, 20, 9, 9))]
        and between
    )


def test_a_stream_closed_early_frees_everything(llm: LLM) -> None:
    prompts = random_prompts([5, 200, 200, 7], seed=85)
    for num in (0, 1, 6):
        stream = llm.stream(prompts, greedy(30))
        for _ in range(num):
            next(stream)
        stream.close()
        assert_all_free(llm)
    for _ in llm.stream(prompts, greedy(30)):
        break
    gc.collect()
    assert_all_free(llm)


def test_decode_goes_on_while_a_long_prompt_comes_in(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(max_num_batched_tokens=16)
    engine = llm.engine
    short, long = random_prompts([5, 160], seed=86)
    first = engine.add_request(short, greedy(60))
    while not engine.step():
        pass
    engine.add_request(long, greedy(2))
    arrivals = [
        step for step in range(20) for output in engine.step() if output.request_id == first
    ]
    assert max(b - a for a, b in itertools.pairwise(arrivals)) <= 2
    drain(llm)
