"""Ctrl-C between the end of a grammar's compilation and the queueing of its request: the request is
neither lost nor runs without its constraint, at whichever line the interrupt comes."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from concurrent.futures import wait
from dataclasses import replace
from functools import partial
from itertools import count

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.schedule.outputs import FinishedOutput, TextStream
from nanovllm.schedule.scheduler import Scheduler
from nanovllm.structured.grammar_sandbox import GrammarSandbox
from tests.engine.interrupts import is_interrupted

PROMPT = "What is 2 + 3?"
CONSTRAINED = SamplingParams(max_tokens=8, seed=1, structured_outputs={"regex": "[0-9]{3}"})
FREE = SamplingParams(max_tokens=2, seed=2, ignore_eos=True)
# the compiler refuses it, in its thread
REFUSED = SamplingParams(
    max_tokens=4, seed=3, structured_outputs={"regex": "(" * 5000 + ")" * 5000}
)
MAX_STEPS = 60


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = LLM(
        "tiny-qwen3", device="cpu", dtype="float32", enforce_eager=True, max_num_seqs=4,
        max_model_len=64, max_num_batched_tokens=64, kvcache_block_size=16, num_kvcache_blocks=17,
    )  # fmt: skip
    yield llm
    llm.close()


def wait_for_grammars(llm: LLM) -> None:
    wait(llm.engine._grammars._cache.values(), 60)


def ends(llm: LLM, num: int) -> dict[int, FinishedOutput]:
    """The ends of `num` requests. Each has one, and then the engine has nothing to do."""
    found: list[tuple[int, FinishedOutput]] = []
    for _ in range(MAX_STEPS):
        outputs = llm.engine.step()
        found += [(one.request_id, one.completion) for one in outputs if one.completion]
        if len(found) >= num and not llm.engine.has_unfinished:
            break
    assert len(found) == num and not llm.engine.has_unfinished
    assert not llm.engine.scheduler.has_work and not llm.engine._grammars
    return dict(found)


@pytest.mark.parametrize("asked", [CONSTRAINED, REFUSED], ids=["compiled", "refused"])
def test_an_interrupt_before_a_request_is_queued_changes_no_answer(
    llm: LLM, asked: SamplingParams
) -> None:
    engine, expected, num_interrupts = llm.engine, None, 0
    for nth in count():  # 0: without an interrupt
        ids = [engine.add_request(PROMPT, one, incremental=False) for one in (asked, FREE)]
        wait_for_grammars(llm)
        was_interrupted = is_interrupted(engine.advance, nth, end=Scheduler.schedule)
        done = ends(llm, 2)
        found = [(done[one].token_ids, done[one].finish_reason, done[one].error) for one in ids]
        expected = expected or found
        assert found == expected, f"line {nth}"
        if nth and not was_interrupted:
            break
        num_interrupts += was_interrupted
    assert num_interrupts > 20
    assert expected is not None
    (token_ids, reason, _), _ = expected
    assert (reason, len(token_ids)) == (("stop", 3) if asked is CONSTRAINED else ("error", 0))


def test_a_sandbox_that_does_not_start_ends_its_own_request(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Later the same grammar is compiled again."""

    def run(*args: object) -> str:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable", "/path/of/python")

    params = replace(CONSTRAINED, structured_outputs={"regex": "[0-4]{3}"})
    with monkeypatch.context() as patched:
        patched.setattr(GrammarSandbox, "run", run)
        ids = [llm.engine.add_request(PROMPT, one, incremental=False) for one in (params, FREE)]
        wait_for_grammars(llm)
        failed, free = map(ends(llm, 2).get, ids)
    assert failed is not None and failed.finish_reason == "error" and failed.error_field is None
    assert failed.error == "compiling the grammar has failed: Resource temporarily unavailable"
    assert free is not None and free.finish_reason == "length"
    assert any(one.exc_info for one in caplog.records)
    llm.engine.add_request(PROMPT, params, incremental=False)
    wait_for_grammars(llm)
    (again,) = ends(llm, 1).values()
    assert again.finish_reason == "stop" and len(again.token_ids) == 3


@pytest.mark.parametrize("asked", [CONSTRAINED, FREE], ids=["constrained", "free"])
def test_an_interrupted_add_request_adds_nothing(llm: LLM, asked: SamplingParams) -> None:
    """And a request that runs meanwhile has its answer."""
    engine, expected = llm.engine, None
    for nth in count():
        running = engine.add_request(PROMPT, FREE, incremental=False)
        outputs = engine.step()
        assert not outputs
        add = partial(engine.add_request, PROMPT, asked, incremental=False)
        was_interrupted = is_interrupted(add, nth, begin=TextStream.__init__)
        wait_for_grammars(llm)
        found = ends(llm, 1 if was_interrupted else 2)
        expected = expected or found[running].token_ids
        assert found[running].token_ids == expected
        if nth and not was_interrupted:
            break
    assert nth > 20


def test_an_interrupted_abort_ends_a_request_once_or_not_at_all(llm: LLM) -> None:
    engine = llm.engine
    for nth in count(1):
        ids = [engine.add_request(PROMPT, FREE, incremental=False) for _ in range(2)]
        engine.step()
        was_interrupted = is_interrupted(partial(engine.abort, ids[0]), nth)
        found = ends(llm, 2)
        assert found[ids[0]].finish_reason in ("abort", "length")
        assert found[ids[1]].finish_reason == "length"
        if not was_interrupted:
            break
    assert nth > 10 and found[ids[0]].finish_reason == "abort"
