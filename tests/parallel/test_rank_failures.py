"""Ranks that die, stop or raise end the engine with an error that names them. Nothing is left.

Some tests shorten a time that ranks have, where it is a failure that it ends in.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanovllm import env
from nanovllm.parallel import monitor, rank_handle
from nanovllm.parallel import ranks as ranks_of
from nanovllm.parallel.errors import RankFailed
from nanovllm.parallel.ranks import WorkerGroup, deferred_interrupts
from tests.parallel.started import MODULE, WAIT_S, joined, started, wait_until_gone


@contextmanager
def in_time() -> Iterator[None]:
    """Not for as long as the ranks wait."""
    before = time.monotonic()
    yield
    assert time.monotonic() - before < WAIT_S


def failed(ranks: WorkerGroup) -> threading.Event:
    """An event that is set when the ranks fail."""
    event = threading.Event()
    ranks.call_on_failure(lambda _: event.set())
    return event


def test_a_killed_rank_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of its channel is enough: the periodic check of ranks is switched off here."""
    monkeypatch.setattr(monitor, "TICK_SECONDS", 1000.0)
    with started(4, tmp_path) as ranks:
        ranks.call("echo")
        event = failed(ranks)
        os.kill(ranks.pids[1], signal.SIGKILL)
        assert event.wait(WAIT_S)
        for call in (ranks.check, lambda: ranks.send("note"), lambda: ranks.call("echo")):
            with pytest.raises(RankFailed, match="rank 2 was killed by SIGKILL"):
                call()
        wait_until_gone(ranks.pids)


def test_a_rank_that_closes_its_channel_and_stays_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_handle, "END_SECONDS", 0.5)
    with started(2, tmp_path) as ranks:
        with in_time(), pytest.raises(RankFailed, match="rank 1 stopped responding"):
            ranks.call("stay", b"100")
        wait_until_gone(ranks.pids)


def test_the_end_of_a_rank_is_noticed_while_another_is_about_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rank_handle, "END_SECONDS", 1000.0)
    with started(3, tmp_path) as ranks:
        ranks.call("echo")
        event, (first, second) = failed(ranks), ranks._watch.processes
        first.channel.send("stay", b"100")
        wait_until(lambda: first.is_closed)
        second.channel.send("say", b"a line\n")
        wait_until(lambda: "rank 2: a line" in capfd.readouterr().err)
        os.kill(second.pid, signal.SIGKILL)
        assert event.wait(WAIT_S)
        with pytest.raises(RankFailed, match="rank 2 was killed by SIGKILL"):
            ranks.check()


@pytest.mark.parametrize("wait", ["send", "call"])
def test_a_thread_that_waits_for_ranks_is_woken_when_they_are_closed(
    wait: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks_of, "FAILURE_SECONDS", 1000.0)
    monkeypatch.setattr(monitor, "CLOSE_SECONDS", 0.5)
    errors: list[Exception] = []

    def waits() -> None:
        try:
            # `send` waits for the reason when a channel has closed
            ranks.call("sleep", b"100") if wait == "call" else ranks._raise_failure()
        except RankFailed as error:
            errors.append(error)

    with started(2, tmp_path) as ranks:
        ranks.call("echo")
        thread = threading.Thread(target=waits, daemon=True)
        thread.start()
        wait_until(lambda: bool(ranks._watch.changed._waiters))  # type: ignore[attr-defined]
        ranks.close()
        thread.join(WAIT_S)
        assert not thread.is_alive() and "the ranks are closed" in str(errors)


def test_rank_0_does_not_wait_in_a_collective_for_a_killed_rank(tmp_path: Path) -> None:
    with started(3, tmp_path) as ranks:
        group = joined(ranks)
        threading.Timer(0.5, os.kill, (ranks.pids[0], signal.SIGKILL)).start()
        with in_time(), pytest.raises(RankFailed, match="rank 1 was killed by SIGKILL"):
            ranks.call_all("wait_for_ranks", b"1", group.barrier)


def test_a_stopped_rank_is_noticed(tmp_path: Path) -> None:
    with started(2, tmp_path) as ranks:
        group = joined(ranks)
        os.kill(ranks.pids[0], signal.SIGSTOP)
        with in_time(), pytest.raises(RankFailed, match="rank 1 stopped responding"):
            ranks.call_all("wait_for_ranks", b"0", group.barrier)


def test_sending_to_a_rank_that_is_stuck_outside_python_does_not_last_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with started(2, tmp_path) as ranks:
        ranks.call("echo")
        monkeypatch.setattr(rank_handle, "SILENT_SECONDS", 2.0)
        ranks.send("block", b"100")
        with in_time(), pytest.raises(RankFailed, match="rank 1 stopped responding"):
            for _ in range(100):
                ranks.send("note", bytes(1_000_000))


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_computation_that_keeps_pythons_lock_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its processor time, without which a rank that sends no heartbeat hangs."""
    monkeypatch.setattr(rank_handle, "SILENT_SECONDS", 1000.0)
    monkeypatch.setattr(monitor, "CLOSE_SECONDS", 0.5)
    with started(2, tmp_path) as ranks:
        ranks.call("echo")
        (process,) = ranks._watch.processes
        ranks.send("compute", b"60")
        before, _ = process._work_done()
        wait_until(lambda: process._work_done()[0] > before + 0.5)
        ranks.check()


def test_a_rank_that_waits_sends_heartbeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_handle, "SILENT_SECONDS", 1000.0)
    monkeypatch.setattr(monitor, "CLOSE_SECONDS", 0.5)
    num_beats, note = 0, rank_handle.RankProcess.note_beats

    def counted(process: rank_handle.RankProcess) -> bool:
        nonlocal num_beats
        num_beats += 1
        return note(process)

    monkeypatch.setattr(rank_handle.RankProcess, "note_beats", counted)
    with started(2, tmp_path) as ranks:
        ranks.call("echo")
        ranks.send("sleep", b"100")
        # the first may be from before it waited
        wait_until(lambda: num_beats >= 3)
        ranks.check()


@pytest.mark.parametrize("kind, error", [("ValueError", ValueError), ("RuntimeError", RankFailed)])
def test_an_error_of_one_rank_alone_ends_all(
    kind: str, error: type[Exception], tmp_path: Path
) -> None:
    with started(3, tmp_path) as ranks:
        ranks.call("echo")  # all have started
        payload = json.dumps([[2], kind, "another checkpoint"]).encode()
        with in_time(), pytest.raises(error, match=r"rank 2: .*another checkpoint"):
            ranks.call("refuse", payload)
        with pytest.raises(error, match="another checkpoint"):
            ranks.check()
        wait_until_gone(ranks.pids)


def test_an_error_of_a_rank_for_which_the_others_wait_ends_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "GRACE_SECONDS", 0.5)
    with started(3, tmp_path) as ranks:
        group = joined(ranks)
        payload = json.dumps([[2], "ValueError", "another checkpoint"]).encode()
        with in_time(), pytest.raises(ValueError, match="rank 2: another checkpoint"):
            ranks.call_all("refuse_or_wait", payload, group.barrier)


def test_an_error_of_rank_0_alone_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def own() -> None:
        raise ValueError("out of memory")

    monkeypatch.setattr(monitor, "GRACE_SECONDS", 0.5)
    with started(3, tmp_path) as ranks:
        joined(ranks)
        with in_time(), pytest.raises(ValueError, match="rank 0: out of memory"):
            ranks.call_all("wait_for_ranks", b"0", own)
        wait_until_gone(ranks.pids)


def test_an_error_after_tell_is_raised_by_a_later_call(tmp_path: Path) -> None:
    with started(3, tmp_path) as ranks:
        ranks.call("echo")  # all have started
        event = failed(ranks)
        ranks.send("refuse", json.dumps([[1, 2], "RuntimeError", "no memory"]).encode())
        assert event.wait(WAIT_S)
        with pytest.raises(RankFailed, match=r"rank [12]: RuntimeError: no memory"):
            ranks.send("note")


def test_a_rank_that_dies_during_start_is_named_with_its_last_lines(tmp_path: Path) -> None:
    with started(3, tmp_path, dies=2) as ranks:
        expected = r"rank 2 ended with exit code 3; its last lines:\n  the checkpoint is torn"
        with in_time(), pytest.raises(RankFailed, match=expected):
            joined(ranks)


def test_a_module_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    ranks = WorkerGroup.start({}, 2, "tests.parallel.nothing", tmp_path)
    with in_time(), pytest.raises(RankFailed, match=r"rank 1 ended with exit code 1; (.|\n)*named"):
        ranks.call("echo")
    ranks.close()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_does_not_exist_is_an_error_and_starts_nothing(tmp_path: Path) -> None:
    num_threads = threading.active_count()
    with pytest.raises(OSError, match="nowhere"):
        WorkerGroup.start({}, 2, MODULE, tmp_path / "nowhere")
    assert threading.active_count() == num_threads


def test_a_rank_that_does_not_end_is_killed_on_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "CLOSE_SECONDS", 0.5)
    with started(2, tmp_path) as ranks:
        ranks.call("echo")
        ranks.send("sleep", b"100")
        with in_time():
            ranks.close()


def test_interrupts_wait_until_all_ranks_have_been_told() -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        steps.append("all told")
    assert steps == ["all told"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# A program that starts ranks, prints their ids and then does the statement that follows.
PROGRAM = """
import sys, time
from pathlib import Path
from nanovllm.parallel import monitor, rank_handle
from nanovllm.parallel import ranks as ranks_of
from nanovllm.parallel.ranks import WorkerGroup
ranks = WorkerGroup.start({{}}, 3, "tests.parallel.child", Path(sys.argv[1]))
{ask}
print(*ranks.pids, flush=True)
{then}
"""
ASK = "ranks.call('echo')"


def run_program(folder: Path, ask: str, then: str) -> tuple[subprocess.Popen[str], list[int]]:
    """Start PROGRAM in a session of its own; returns it and the ids of its ranks.

    `communicate` closes its stdin."""
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(ask=ask, then=then), str(folder)],
        env=env.for_children(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert program.stdout is not None
    return program, [int(pid) for pid in program.stdout.readline().split()]


def finish(program: subprocess.Popen[str], pids: list[int]) -> str:
    """Wait for the end of the program and of its ranks; returns its stderr."""
    assert len(pids) == 2
    _, error = program.communicate(timeout=WAIT_S)
    wait_until_gone(pids)
    return error


@pytest.mark.parametrize("ask", ["", ASK], ids=["during start", "when it waits"])
def test_ctrl_c_leaves_nothing(ask: str, tmp_path: Path) -> None:
    then = "monitor.CLOSE_SECONDS = 0.5; ranks.call('sleep', b'100')"
    program, pids = run_program(tmp_path, ask, then)
    os.killpg(program.pid, signal.SIGINT)
    error = finish(program, pids)
    assert "KeyboardInterrupt" in error and "rank " not in error
    assert not list(tmp_path.iterdir())


def test_an_interpreter_that_exits_ends_its_ranks(tmp_path: Path) -> None:
    program, pids = run_program(tmp_path, ASK, "sys.exit(0)")
    assert finish(program, pids) == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["echo", "sleep", "block"])
def test_ranks_end_when_rank_0_is_killed(what: str, tmp_path: Path) -> None:
    then = f"ranks.send({what!r}, b'100'); print(flush=True); time.sleep(100)"
    program, pids = run_program(tmp_path, ASK, then)
    assert program.stdout is not None and program.stdout.readline() == "\n"
    program.kill()
    finish(program, pids)


def test_stopped_ranks_end_when_rank_0_is_killed(tmp_path: Path) -> None:
    program, pids = run_program(tmp_path, ASK, "time.sleep(100)")
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    program.kill()
    finish(program, pids)


def test_a_rank_0_that_was_stopped_does_not_take_its_ranks_for_hung(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it, and its ranks with it, were stopped for an hour between all looks at them."""
    monkeypatch.setattr(rank_handle, "SILENT_SECONDS", 50.0)
    hours: list[float] = [0.0]

    def an_hour_later() -> float:
        hours.append(hours[-1] + 3600.0)
        return hours[-1]

    clock = SimpleNamespace(monotonic=an_hour_later, sleep=time.sleep)
    with started(2, tmp_path) as ranks:
        ranks.call("echo")
        with monkeypatch.context() as patch:
            patch.setattr(monitor, "time", clock)
            wait_until(lambda: len(hours) > 9)
        ranks.check()
        assert ranks.call("echo", b"x") == [b"x"]


def test_a_thread_that_started_ranks_may_end(tmp_path: Path) -> None:
    made: list[WorkerGroup] = []
    start: Callable[[], None] = lambda: made.append(WorkerGroup.start({}, 2, MODULE, tmp_path))  # noqa: E731
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert made[0].call("echo", b"x") == [b"x"]
    made[0].close()
