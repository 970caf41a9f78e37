"""SIGTERM ends commands as cleanly as Ctrl-C does: no process and no file is left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from nanovllm import env, programs
from nanovllm.cli import http
from nanovllm.kernels.code_files import BUILDING
from tests.cli.test_bench_serve import serving
from tests.parallel.started import wait_until_gone

LIMIT_S = 120.0  # for what takes seconds on an idle machine


@contextmanager
def command(folder: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """The process of a command whose temporary files go to `folder`."""
    environment = {**env.for_children(), "TMPDIR": str(folder)}
    process = subprocess.Popen(
        programs.command("nanovllm", *words), env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def children(pid: int) -> list[int]:
    """The processes that a process has started. (A compiler's own parts end by themselves.)"""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


def wait_until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ended(process: subprocess.Popen[str]) -> None:
    """Send SIGTERM. Asserts the status of the process, and that it leaves no other."""
    started = children(process.pid)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 143, error
    assert "Traceback" not in error
    wait_until_gone(started, LIMIT_S)


def test_a_running_answer_ends(tmp_path: Path) -> None:
    words = "--device cpu --enforce-eager --max-model-len 8192 --max-tokens 8000 --ignore-eos"
    with command(tmp_path, "run", "tiny-qwen3", "Who are you?", *words.split()) as process:
        assert process.stdout is not None and process.stdout.read(1)
        ended(process)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("answers", [False, True], ids=["it waits for a line", "it answers"])
def test_a_conversation_ends(tmp_path: Path, answers: bool) -> None:
    """Ctrl-C only ends the line or the answer."""
    with serving(itl=0.05) as mock:
        words = ["chat", "--url", mock.url, "--max-tokens", "400" if answers else "1"]
        with command(tmp_path, *words) as process:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("a\n")
            process.stdin.flush()
            assert process.stdout.read(4) == "word"
            ended(process)
        wait_until(lambda: not mock.num_open)


def test_a_benchmark_of_an_engine_removes_its_model(tiny_qwen3: Path, tmp_path: Path) -> None:
    config = str(tiny_qwen3 / "config.json")
    words = ["--random-weights", config, "--device", "cpu", "--enforce-eager"]
    with command(tmp_path, "bench", "throughput", *words) as process:
        wait_until(lambda: list(tmp_path.glob("*/config.json")))
        ended(process)
    assert not list(tmp_path.iterdir())


def test_a_benchmark_of_a_server_ends_its_clients(tmp_path: Path) -> None:
    with serving(itl=0.05) as mock:
        words = ["--base-url", mock.url, "--num-prompts", "3", "--random-output-len", "400"]
        with command(tmp_path, "bench", "serve", *words) as process:
            wait_until(lambda: mock.num_open == 3)
            assert children(process.pid)
            ended(process)
        wait_until(lambda: not mock.num_open)


def test_precompile_removes_what_compilers_have_begun(tmp_path: Path) -> None:
    store, temporary = tmp_path / "store", tmp_path / "temporary"
    temporary.mkdir()
    words = ["precompile", "tiny-qwen3", "--device", "cpu", "--bs", "1", "--out", str(store)]
    with command(temporary, *words) as process:
        wait_until(lambda: list(store.rglob(f"{BUILDING}*")) and children(process.pid))
        ended(process)
    assert not list(temporary.iterdir()) and not list(store.rglob(f"{BUILDING}*"))


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with programs.sigterm_as_exit():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_command_in_another_thread_leaves_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found: list[Any] = []

    def work() -> None:
        with programs.sigterm_as_exit():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


def test_a_signal_just_after_the_loop_was_closed_ends_the_command() -> None:
    def run_on_loop(main: Coroutine[Any, Any, None]) -> None:
        asyncio.run(main)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray leaves a handler of its own
    try:
        with programs.sigterm_as_exit():
            with pytest.raises(SystemExit) as ending:
                http.run_stoppable(asyncio.sleep(0), run_on_loop)
            assert signal.getsignal(signal.SIGTERM) is programs.exit_at_sigterm
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ending.value.code == programs.TERMINATED
