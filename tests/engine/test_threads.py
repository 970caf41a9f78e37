"""Several threads share one `LLM`. Their prompts run in the same batches, with the same answers."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.engine import locked_engine
from tests.engines import assert_all_free, greedy, random_prompts, tokens

GREEDY = SamplingParams(temperature=0, max_tokens=10)
QUESTIONS = [f"What is {i} + {3 * i}?" for i in range(32)]


@pytest.fixture(scope="module")
def tiny() -> Iterator[LLM]:
    """The embedded model: it has a chat template."""
    llm = LLM("tiny-qwen3", dtype="float32", enforce_eager=True, max_num_seqs=32, max_model_len=128)
    yield llm
    llm.close()


def conversation(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def ask(llm: LLM, number: int, params: SamplingParams) -> tuple[str, list[int]]:
    """The answer to a question: by chat, generate or stream, in turns."""
    question = QUESTIONS[number]
    if number % 3 == 0:
        output = llm.chat(conversation(question), params, use_tqdm=False)[0]
        return output["text"], output["token_ids"]
    (prompt,) = llm.chat_prompts(conversation(question))
    if number % 3 == 1:
        output = llm.generate([prompt], params, use_tqdm=False)[0]
        return output["text"], output["token_ids"]
    pieces = list(llm.stream([prompt], params))
    text = "".join(piece["text"] for piece in pieces)
    return text, [token_id for piece in pieces for token_id in piece["token_ids"]]


@pytest.mark.parametrize("num_threads", [2, 8, 32])
def test_mixed_calls_of_many_threads_equal_solo_runs(tiny: LLM, num_threads: int) -> None:
    params = [
        GREEDY if i % 2 else SamplingParams(temperature=1.5, seed=i, max_tokens=6 + i % 5)
        for i in range(32)
    ]
    alone = [ask(tiny, i, params[i]) for i in range(32)]
    with ThreadPoolExecutor(num_threads) as threads:
        together = list(threads.map(lambda i: ask(tiny, i, params[i]), range(32)))
    assert together == alone
    assert_all_free(tiny)


def test_coroutines_in_threads_equal_solo_runs(tiny: LLM) -> None:
    alone = [ask(tiny, i, GREEDY) for i in range(9)]

    async def together() -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(ask, tiny, i, GREEDY) for i in range(9)))

    assert asyncio.run(together()) == alone
    assert_all_free(tiny)


def test_threads_share_batches(eager_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    launch = eager_llm.engine.runner.launch

    def counted(plan: Any) -> Any:
        rows.append(len(plan.rows))
        return launch(plan)

    monkeypatch.setattr(eager_llm.engine.runner, "launch", counted)
    prompts = random_prompts([9] * 8, seed=80)
    ready = threading.Barrier(8)

    def one(prompt: list[int]) -> None:
        ready.wait()
        eager_llm.generate([prompt], greedy(60), use_tqdm=False)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(one, prompts))
    assert max(rows) == 8 and len(rows) < 8 * 60 / 3


def test_prompts_of_eight_threads_run_in_the_same_steps(graph_llm: LLM) -> None:
    prompts = random_prompts([9] * 8, seed=81)

    def run(prompt: list[int]) -> None:
        graph_llm.generate([prompt], greedy(150), use_tqdm=False)

    def num_steps(num_threads: int) -> int:
        before = graph_llm.engine.metrics.num_steps
        with ThreadPoolExecutor(num_threads) as threads:
            list(threads.map(run, prompts))
        return int(graph_llm.engine.metrics.num_steps - before)

    assert num_steps(1) >= 3 * num_steps(8)


def test_an_error_ends_the_calls_of_its_thread_alone(
    make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step fails once: one thread gets the error, and all others their answers."""
    llm = make_llm()
    prompts = random_prompts([9] * 8, seed=82)
    expected = [llm.generate([prompt], greedy(20), use_tqdm=False) for prompt in prompts]
    launch, fails = llm.engine.runner.launch, [True]

    def failing(plan: Any) -> Any:
        if len(plan.rows) >= 4 and not plan.is_prefill and fails:
            fails.clear()
            raise RuntimeError("a step failed")
        return launch(plan)

    monkeypatch.setattr(llm.engine.runner, "launch", failing)
    ready = threading.Barrier(8)

    def one(prompt: list[int]) -> Any:
        ready.wait()
        try:
            return llm.generate([prompt], greedy(20), use_tqdm=False)[0]["token_ids"]
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(one, prompts))
    assert found.count("a step failed") == 1
    right = [output[0]["token_ids"] for output in expected]
    assert sum(one == two for one, two in zip(found, right)) == 7
    assert_all_free(llm)


def test_closing_waits_for_the_step_of_another_thread(make_llm: Callable[..., LLM]) -> None:
    """The other thread's call then ends with an error, and memory is freed once."""
    llm = make_llm()
    (prompt,) = random_prompts([9], seed=85)
    with ThreadPoolExecutor(1) as threads:
        begun = threads.submit(llm.generate, [prompt], greedy(240), use_tqdm=False)
        while not llm.engine.metrics.num_steps:
            time.sleep(0.001)
        llm.close()
        with pytest.raises(RuntimeError, match="this engine is closed"):
            begun.result()


def test_a_refused_prompt_of_one_thread_disturbs_no_other(eager_llm: LLM) -> None:
    prompts = random_prompts([9] * 12, seed=83)
    expected = [eager_llm.generate([one], greedy(9), use_tqdm=False)[0] for one in prompts]

    def one(number: int) -> Any:
        prompt = [10**9] if number % 3 == 2 else prompts[number]
        try:
            return eager_llm.generate([prompt], greedy(9), use_tqdm=False)[0]["token_ids"]
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(one, range(12)))
    for number, answer in enumerate(found):
        if number % 3 == 2:
            assert "outside the vocabulary" in answer
        else:
            assert answer == expected[number]["token_ids"]
    assert_all_free(eager_llm)


def test_a_stream_closed_in_the_middle_of_a_step_is_dropped(
    eager_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python may close a generator anywhere, also while its thread runs a step."""
    first, second = random_prompts([5, 6], seed=84)
    streams = [eager_llm.stream([first], greedy(50))]
    next(streams[0])
    launch = eager_llm.engine.runner.launch

    def closing(plan: Any) -> Any:
        streams.clear()
        gc.collect()
        return launch(plan)

    monkeypatch.setattr(eager_llm.engine.runner, "launch", closing)
    (output,) = eager_llm.generate([second], greedy(5), use_tqdm=False)
    monkeypatch.undo()
    assert [output["token_ids"]] == [
        one["token_ids"] for one in eager_llm.generate([second], greedy(5), use_tqdm=False)
    ]
    assert_all_free(eager_llm)


def test_ctrl_c_at_any_call_leaves_the_engine_to_other_threads(
    make_llm: Callable[..., LLM],
) -> None:
    """Python raises KeyboardInterrupt at the beginning of a function: here of each one in turn that
    hands the engine from thread to thread."""
    llm = make_llm(num_kvcache_blocks=40)
    prompts = random_prompts([5], seed=86)
    expected = tokens(llm, prompts, greedy(3))
    files = (locked_engine.__file__, threading.__file__)
    # There an error of a trace function ends a resumed generator without its `finally` blocks. A
    # signal does not: it is raised inside them.
    before_311 = sys.version_info < (3, 11)
    num_interrupts = 0

    def interrupted(nth: int) -> bool:
        """Generate, with an interrupt at the nth call. False if there are fewer."""
        num_calls = 0

        def at_call(frame: Any, event: str, arg: object) -> None:
            nonlocal num_calls
            if frame.f_code.co_filename not in files or (before_311 and frame.f_lasti >= 0):
                return
            num_calls += 1
            if num_calls == nth:
                sys.settrace(None)
                raise KeyboardInterrupt

        sys.settrace(at_call)
        try:
            tokens(llm, prompts, greedy(3))
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False

    with ThreadPoolExecutor(1) as threads:
        while interrupted(num_interrupts + 1):
            num_interrupts += 1
            assert llm.shared._user is None, f"call {num_interrupts} keeps the engine"
            found = threads.submit(tokens, llm, prompts, greedy(3)).result(timeout=60)
            assert found == expected
    assert num_interrupts > 10
    assert_all_free(llm)


def test_a_call_inside_a_step_is_refused_and_the_step_goes_on(
    eager_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = random_prompts([5], seed=87)
    expected = tokens(eager_llm, prompts, greedy(5))
    launch, users = eager_llm.engine.runner.launch, []

    def calling(plan: Any) -> Any:
        with pytest.raises(RuntimeError, match="uses the engine already"):
            eager_llm.reset_prefix_cache()
        users.append(eager_llm.shared._user)
        return launch(plan)

    monkeypatch.setattr(eager_llm.engine.runner, "launch", calling)
    assert tokens(eager_llm, prompts, greedy(5)) == expected
    assert set(users) == {threading.get_ident()}


def test_a_thread_that_steps_by_hand_leaves_outputs_to_others(make_llm: Callable[..., LLM]) -> None:
    """The stepping thread calls `step` without a pause, and stops when the other has its answer."""
    llm = make_llm()
    prompts = random_prompts([5], seed=88)
    expected = tokens(llm, prompts, greedy(9))
    with ThreadPoolExecutor(1) as threads:
        engine, number = llm.llm_engine, 0
        engine.add_request("0", prompts[0], greedy(200))
        answer = threads.submit(tokens, llm, prompts, greedy(9))
        while not answer.done() and number < 5:
            if not engine.has_unfinished_requests():
                number += 1
                engine.add_request(str(number), prompts[0], greedy(200))
            engine.step()
        assert answer.done()
        engine.abort_request(str(number))
    assert answer.result() == expected
    assert_all_free(llm)
