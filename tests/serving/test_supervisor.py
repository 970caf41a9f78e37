"""A server's processes: signals, processes that die, and what is left afterwards: nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from nanovllm.parallel.folder import remove_left
from tests.engines import random_prompts
from tests.replicas.local_replicas import children, wait_until_gone
from tests.serving.fake_engine import HELD

ROOT = Path(__file__).parents[2]
ENGINE: dict[str, Any] = {"model": "tiny-qwen3", "skip_tokenizer_init": True}
SHORT: dict[str, Any] = {"prompt": [5, 6], "max_tokens": 3, "temperature": 0}
LONG: dict[str, Any] = {**SHORT, "max_tokens": 100}  # it does not end while it is held
WAIT_S = 60.0  # for what takes up to some seconds on an idle machine


class Server:
    """A server in a process with two API processes; `pids` are those of its children."""

    def __init__(self, temporary: Path, **given: Any) -> None:
        self.temporary, self.held = temporary, temporary.with_name("held")
        given = {"engine": ENGINE, "num_api_processes": 2, **given}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.serving.run_server", json.dumps(given)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={
                **os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary),
                HELD: str(self.held),
            },
        )  # fmt: skip
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def call(self, asked: dict[str, Any]) -> Generator[str, None, None]:
        """The lines of an answer; the first one is the id of the API process."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(json.dumps(asked).encode() + b"\n")
            with connection.makefile() as lines:
                yield from lines

    @property
    def pids(self) -> dict[str, list[int]]:
        """Children by the ends of their programs' names."""
        found: dict[str, list[int]] = {"serving.api_process": [], "engine": []}
        for pid in sorted(children(self.process.pid)):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
            name = "serving.api_process" if "serving.api_process" in command else "engine"
            found[name].append(pid)
        return found

    def running(self) -> Generator[str, None, None]:
        """The lines of a LONG answer that has begun and does not end by itself."""
        self.held.touch()
        lines = self.call(LONG)
        self.of_api_process = int(next(lines))
        next(lines)
        return lines

    def wait_until_it_drains(self) -> None:
        """Until requests are refused."""
        while "Draining" not in "".join(self.call(SHORT)):
            pass

    def end(self) -> tuple[int, str]:
        """The exit code and the errors; every process has ended, and no file is left."""
        pids = list(chain.from_iterable(self.known.values()))
        _, errors = self.process.communicate(timeout=WAIT_S)
        wait_until_gone(pids)
        return self.process.returncode, errors

    def start(self) -> Server:
        """Wait until both API processes have answered."""
        found: set[str] = set()
        while len(found) < 2:
            found.add(next(iter(self.call(SHORT))))
        self.known = self.pids
        return self


Make = Callable[..., Server]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Server] = []
    temporary = tmp_path / "files"
    temporary.mkdir()

    def start(**given: Any) -> Server:
        made.append(Server(temporary, **given))
        return made[-1]

    yield start
    for server in made:
        server.process.kill()
        server.process.communicate()


def test_an_engine_answers_through_two_api_processes(make: Make) -> None:
    sizes = {"device": "cpu", "enforce_eager": True, "max_num_seqs": 4, "max_model_len": 128}
    server = make(engine={**ENGINE, **sizes}, is_fake=False).start()
    (prompt,) = random_prompts([19])
    asked = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answers = {}
    while len(answers) < 2:
        pid, *lines = server.call(asked)
        answers[pid] = list(chain.from_iterable(json.loads(line)[0] for line in lines))
    first, second = answers.values()
    assert first == second and len(first) == 8
    server.process.send_signal(signal.SIGTERM)
    assert server.end()[0] == 0
    assert list(server.temporary.glob("nanovllm-*")) == []


def test_sigterm_lets_requests_finish_and_refuses_new_ones(make: Make) -> None:
    server = make(drain_timeout=100).start()
    lines = server.running()
    server.process.send_signal(signal.SIGTERM)
    server.wait_until_it_drains()
    server.held.unlink()
    assert json.loads(list(lines)[-1])[1] == "length"
    assert server.end()[0] == 0
    assert list(server.temporary.iterdir()) == []


def test_what_has_not_finished_in_time_is_cut_off(make: Make) -> None:
    server = make(drain_timeout=0.3, times={"GRACE_SECONDS": WAIT_S}).start()
    lines = server.running()
    server.process.send_signal(signal.SIGTERM)
    assert json.loads(list(lines)[-1])[1] == "abort"
    assert server.end()[0] == 0


def test_the_second_interrupt_ends_everything_at_once(make: Make) -> None:
    server = make(drain_timeout=1000).start()
    lines = server.running()
    server.process.send_signal(signal.SIGINT)
    server.wait_until_it_drains()
    assert server.process.poll() is None
    server.process.send_signal(signal.SIGINT)
    assert server.end()[0] == 130
    lines.close()
    assert list(server.temporary.iterdir()) == []


def test_a_compiler_that_is_killed_leaves_no_temporary_file(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor's compiler, too: only ours gets a folder of its own."""
    begun, compiler = tmp_path / "begun", tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\ntouch "$TMPDIR/cc.s" {begun}\nexec sleep 600\n')
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "store"))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    # the engine is not ready, so the supervisor waits for all of the time before it kills
    engine = {**ENGINE, "device": "cpu"}
    server = Server(temporary, engine=engine, is_fake=False, drain_timeout=0.3)
    try:
        while not begun.exists():
            assert server.process.poll() is None
            time.sleep(0.05)
        server.known = server.pids
        server.process.send_signal(signal.SIGTERM)
        assert server.end()[0] == 0
        assert list(temporary.iterdir()) == []
    finally:
        server.process.kill()


@pytest.mark.parametrize("program", ["engine", "serving.api_process"])
def test_a_killed_process_ends_the_server(program: str, make: Make) -> None:
    times = {"FAREWELL_SECONDS": WAIT_S} if program == "engine" else {}
    server = make(times=times).start()
    lines = server.running()
    killed = server.known[program][0] if program == "engine" else server.of_api_process
    os.kill(killed, signal.SIGKILL)
    try:
        rest = list(lines)
    except ConnectionError:
        rest = []
    if program == "engine":
        assert rest[-1] == "EngineDead: the engine process has ended\n"
    code, errors = server.end()
    assert code == 1
    name = "the engine process" if program == "engine" else r"API process"
    assert f"shutting down: {name}" in errors and "was killed by SIGKILL" in errors
    assert list(server.temporary.iterdir()) == []


def test_nothing_runs_after_the_supervisor_is_killed(make: Make) -> None:
    server = make().start()
    lines = server.running()
    server.process.kill()
    server.end()
    lines.close()
    remove_left(server.temporary)  # as the next start does
    assert list(server.temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        ({"options": {"fails": 1}}, 2, "error: an option is wrong"),
        ({"options": {"returns": 0}}, 1, "API process 0 has ended unexpectedly"),
        ({"engine": {**ENGINE, "seed": 13}}, 2, "error: seed is 13"),
    ],
)
def test_a_process_that_cannot_start_ends_the_server(
    given: dict[str, Any], code: int, message: str, make: Make
) -> None:
    server = make(**given)
    server.known = {}
    found, errors = server.end()
    assert found == code and message in errors
    assert code != 2 or errors == f"{message}\n", "a user's mistake is one line"
    assert list(server.temporary.iterdir()) == []
