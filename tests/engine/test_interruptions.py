"""After Ctrl-C or a device error at any moment, the engine is usable and other requests go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM
from nanovllm.schedule.plan import StepPlan
from tests.engine.interrupts import has_call
from tests.engines import NUM_TOKENS, Generate, assert_all_free, greedy, random_prompts, tokens

ROOT = Path(__file__).parents[2]


@pytest.fixture
def interrupt_at(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str], None]:
    """Interrupt the nth launch from now, before or after its work."""

    def arrange(nth: int, where: str) -> None:
        original, count = llm.engine.runner.launch, 0

        def launch(plan: StepPlan) -> Any:
            nonlocal count
            count += 1
            if count != nth:
                return original(plan)
            if where == "after":
                original(plan)
            raise KeyboardInterrupt

        monkeypatch.setattr(llm.engine.runner, "launch", launch)

    return arrange


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("nth", [1, 2, 4, 9])
def test_ctrl_c_leaves_a_usable_engine(
    llm: LLM, hf_generate: Generate, interrupt_at: Callable[[int, str], None], nth: int, where: str
) -> None:
    """All blocks are free, and blocks that the interrupted step did not fill are not cached."""
    prompts = random_prompts([19, 99, 200, 64], seed=900 + nth)
    interrupt_at(nth, where)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompts, greedy(), use_tqdm=False)
    assert_all_free(llm)
    assert tokens(llm, prompts, greedy()) == [hf_generate(prompt, NUM_TOKENS) for prompt in prompts]


@pytest.mark.parametrize("nth", [1, 3, 6])
def test_requests_of_others_survive_an_interruption(
    llm: LLM, hf_generate: Generate, interrupt_at: Callable[[int, str], None], nth: int
) -> None:
    engine = llm.engine
    theirs, mine = random_prompts([40, 33], seed=91), random_prompts([50, 19], seed=92)
    params = greedy(20, repetition_penalty=1.0001)  # keeps its own state on the device
    ids = [engine.add_request(prompt, params) for prompt in theirs]
    interrupt_at(nth, "after")
    with pytest.raises(KeyboardInterrupt):
        llm.generate(mine, greedy(), use_tqdm=False)
    found: dict[int, list[int]] = {request_id: [] for request_id in ids}
    while engine.has_unfinished:
        for output in engine.step():
            found[output.request_id] += output.token_ids
    assert list(found.values()) == [hf_generate(prompt, 20) for prompt in theirs]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
def test_ctrl_c_at_any_moment(llm: LLM, hf_generate: Generate) -> None:
    """A real SIGINT, at a different moment each time."""
    prompts = random_prompts([5, 99, 200, 33, 64, 1] * 5, seed=93)
    expected = [hf_generate(prompt, NUM_TOKENS) for prompt in prompts[:6]]
    previous = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    num_interrupted = 0
    try:
        for attempt in range(12):
            signal.setitimer(signal.ITIMER_REAL, 0.003 + 0.0071 * attempt)
            try:
                llm.generate(prompts, greedy(40), use_tqdm=False)
                signal.setitimer(
                    signal.ITIMER_REAL, 0
                )  # inside the try: the signal may arrive here
            except KeyboardInterrupt:
                num_interrupted += 1
            assert_all_free(llm)
            assert tokens(llm, prompts[:6], greedy()) == expected
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert num_interrupted > 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("nth_step", [1, 2], ids=["prefill", "decode"])
def test_ctrl_c_at_any_call_in_a_step_leaves_gradients_on(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, nth_step: int
) -> None:
    """Python handles signals where functions begin: here at each one in turn, torch's too."""
    (prompt,) = random_prompts([19], seed=95)
    expected = tokens(llm, [prompt], greedy(3))
    launch, num_steps, nth, is_last = llm.engine.runner.launch, 0, 0, False

    def traced(plan: StepPlan) -> Any:
        nonlocal num_steps, is_last
        num_steps += 1
        if num_steps != nth_step:
            return launch(plan)
        launched: list[Any] = []
        is_last = not has_call(lambda: launched.append(launch(plan)), nth)
        if not launched:
            raise KeyboardInterrupt
        return launched[0]

    monkeypatch.setattr(llm.engine.runner, "launch", traced)
    while not is_last:
        num_steps, nth = 0, nth + 1
        try:
            assert tokens(llm, [prompt], greedy(3)) == expected
        except KeyboardInterrupt:
            assert_all_free(llm)
        assert torch.is_grad_enabled(), f"an interrupt at call {nth} leaves gradients off"
    assert nth > 20


def test_an_error_on_the_device_leaves_a_usable_engine(
    eager_llm: LLM, hf_generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(plan: object) -> None:
        raise RuntimeError("out of memory")

    (prompt,) = random_prompts([33], seed=94)
    with monkeypatch.context() as patch:
        patch.setattr(eager_llm.engine.runner, "launch", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            eager_llm.generate([prompt], greedy(), use_tqdm=False)
    assert tokens(eager_llm, [prompt], greedy()) == [hf_generate(prompt, NUM_TOKENS)]


def test_interrupts_arrive_also_where_tests_run_in_the_background() -> None:
    script = "import tests.conftest, os, signal; os.kill(os.getpid(), signal.SIGINT)"
    ignored = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    ignored += "os.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])"
    done = subprocess.run(
        [sys.executable, "-c", ignored, script], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGINT and "KeyboardInterrupt" in done.stderr
