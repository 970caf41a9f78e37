"""Grammars that are slow to compile keep no others waiting."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from nanovllm.sampling import SamplingParams
from nanovllm.structured.grammar_sandbox import TooSlow
from nanovllm.structured.grammars import (
    NUM_SLOW,
    NUM_WORKERS,
    GrammarLimits,
    GrammarRefusal,
    Grammars,
    Work,
)
from nanovllm.structured.library import Source

PARAMS = SamplingParams(structured_outputs={"regex": "a"})
WAIT_S = 60.0


class Compiler:
    """Compiles nothing. Sources that begin with "slow" take longer than any short time."""

    masks = None

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.texts: list[str] = []  # of slow sources that got all their time

    def compile(self, found: Source, timeout_s: float) -> Any:
        if found.text.startswith("slow"):
            if timeout_s < 9:
                raise TooSlow("it takes longer")
            self.texts.append(found.text)
            assert self.may_end.wait(WAIT_S)
        raise ValueError(f"{found.text} is done")

    def kill(self) -> None:
        self.may_end.set()

    def close(self) -> None: ...


@pytest.fixture
def compiler() -> Compiler:
    return Compiler()


@pytest.fixture
def grammars(compiler: Compiler) -> Iterator[Grammars]:
    made = Grammars(compiler, GrammarLimits(9.0, 4))  # type: ignore[arg-type]
    yield made
    made.close()


def ready(grammars: Grammars, num: int) -> dict[int, str]:
    """The reasons of the next requests."""
    found: dict[int, str] = {}
    end = time.monotonic() + WAIT_S
    while len(found) < num and time.monotonic() < end:
        for request_id, one in grammars.take(0.1):
            assert isinstance(one, GrammarRefusal)
            found[request_id] = one.reason
    return found


def test_slow_grammars_keep_no_quick_one_waiting(grammars: Grammars, compiler: Compiler) -> None:
    num = 5 * NUM_WORKERS
    for request_id in range(num):
        grammars.add(request_id, Source("regex", f"slow {request_id}"), PARAMS)
    for request_id in range(num, num + 3):
        grammars.add(request_id, Source("regex", f"quick {request_id}"), PARAMS)
    assert ready(grammars, 3) == {one: f"quick {one} is done" for one in range(num, num + 3)}
    assert len(compiler.texts) <= NUM_SLOW
    compiler.may_end.set()
    assert ready(grammars, num) == {one: f"slow {one} is done" for one in range(num)}


def test_slow_grammars_of_requests_that_have_ended_are_given_up(
    grammars: Grammars, compiler: Compiler
) -> None:
    num = 3 * NUM_SLOW
    for request_id in range(num):
        grammars.add(request_id, Source("regex", f"slow {request_id}"), PARAMS)
    while len(compiler.texts) < NUM_SLOW or any(
        work.slow is None for work in grammars._cache.values()
    ):
        time.sleep(0.01)
    # each of the others is given up, but one that is asked for again
    ended = [one for one in range(num) if f"slow {one}" not in compiler.texts]
    for request_id in ended:
        grammars.drop(request_id)
    again = ended[-1]
    grammars.add(99, Source("regex", f"slow {again}"), PARAMS)
    compiler.may_end.set()
    assert ready(grammars, NUM_SLOW + 1)[99] == f"slow {again} is done"
    assert set(compiler.texts) == {f"slow {one}" for one in range(num)} - {
        f"slow {one}" for one in ended[:-1]
    }


def test_a_step_looks_once_at_each_waiting_request_and_each_kept_grammar(
    compiler: Compiler,
) -> None:
    num_kept, num_waiting, num_calls = 80, 200, 0
    grammars = Grammars(compiler, GrammarLimits(9.0, num_kept))  # type: ignore[arg-type]
    for i in range(num_kept):
        work = Work()
        work.set_result(None)  # type: ignore[arg-type]
        grammars._cache[Source("regex", f"kept {i}")] = work  # type: ignore[index]
    for request_id in range(num_waiting):
        grammars.add(request_id, Source("regex", "slow"), PARAMS)

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal num_calls
        num_calls += event == "call"

    sys.setprofile(count)
    try:
        assert not list(grammars.take())
    finally:
        sys.setprofile(None)
    grammars.close()
    # a few for each of them; each pair of them would be 16000
    assert num_calls < 10 * (num_kept + num_waiting)
