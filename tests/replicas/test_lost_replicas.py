"""Replicas that are killed, stopped or interrupted, and what is left when they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, cast

import pytest

from nanovllm import LLM, EngineConfig
from nanovllm.batch.rows import Line
from nanovllm.batch.worker import EngineWorker, WorkerSettings, load_engine
from nanovllm.replicas.machine import ProcessStarter
from nanovllm.replicas.process_replica import ProcessReplica
from tests.engines import greedy, random_prompts, tokens
from tests.replicas.local_replicas import (
    PROMPTS,
    SIZES,
    alone,
    children,
    count,
    counts,
    folder,
    is_alive,
    make,
    note,
    pids,
    two,
    wait_until_gone,
)

__all__ = ["alone", "folder", "two"]  # fixtures


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_replica_ends_what_it_has_begun_and_the_rest_is_tried_again(
    kind: signal.Signals, folder: Path, alone: LLM
) -> None:
    # on a busy machine a replica may have ended what it has begun before it is stopped
    assert any(has_lost_requests(kind, folder, alone) for _ in range(5))


def has_lost_requests(kind: signal.Signals, folder: Path, alone: LLM) -> bool:
    """Each replica has begun four requests. Then one stops, so that later ones get no token from
    it. Whether it has lost some of both kinds."""
    llm = make(folder, 2)
    try:
        gone, engine = pids(llm), cast(Any, llm.engine)
        prompts = random_prompts([30] * 12, seed=6)
        expected = tokens(alone, prompts, greedy(400))
        ids = [engine.add_request(one, greedy(400)) for one in prompts[:8]]
        found: dict[int, list[int]] = {one: [] for one in ids}
        ends: dict[int, Any] = {}
        while not all(found.values()):
            note(engine, found, ends)
        os.kill(gone[0], signal.SIGSTOP)
        later = [engine.add_request(one, greedy(400)) for one in prompts[8:]]
        found |= {one: [] for one in later}
        lost = {one for one, has in engine._pending.items() if has.replica is engine.replicas[0]}
        os.kill(gone[0], kind)
        while len(ends) < 12:
            note(engine, found, ends)
        failed = {one for one in ids if ends[one].error is not None}
        assert failed <= lost
        for one, wanted in zip([*ids, *later], expected, strict=True):
            if one in failed:
                assert ends[one].finish_reason == "error" and "replica 0" in ends[one].error
                assert ends[one].token_ids == found[one] == wanted[: len(found[one])]
            else:
                assert ends[one].error is None and ends[one].token_ids == found[one] == wanted
        deadline = time.monotonic() + 60
        while not engine.replicas[0].is_ready:  # the other one answers meanwhile
            assert tokens(llm, prompts, greedy(5)) == [one[:5] for one in expected]
            assert time.monotonic() < deadline
        assert tokens(llm, prompts, greedy(5)) == [one[:5] for one in expected]
        assert pids(llm)[0] != gone[0] and min(counts(llm, "prompt_tokens")) > 0
    finally:
        llm.close()
    wait_until_gone(gone)
    return bool(failed and lost & set(later))


def test_rows_of_killed_replicas_are_answered_again(folder: Path, alone: LLM) -> None:
    prompts = random_prompts([30] * 12, seed=7)
    expected = tokens(alone, prompts, greedy(100))
    config = EngineConfig(str(folder), data_parallel_size=2, **SIZES)
    shared = load_engine(config)
    try:
        params = {"max_tokens": 100, "temperature": 0.0, "ignore_eos": True}
        worker = EngineWorker(shared, WorkerSettings(params))
        for row, prompt in enumerate(prompts):
            text = json.dumps({"prompt": prompt}).encode()
            worker.submit(Line(row, text, len(text)))
        engine: Any = shared.engine
        for replica in engine.replicas:
            os.kill(replica.pid, signal.SIGKILL)
        found: dict[int, list[int]] = {}
        while len(found) < len(prompts):
            found |= {one.row: json.loads(one.line)["token_ids"] for one in worker.wait()}
        assert [found[row] for row in range(len(prompts))] == expected
    finally:
        shared.engine.close()


def test_two_at_once_and_nothing_is_left(
    folder: Path,
    two: LLM,
    alone: LLM,
    bare_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    expected = tokens(alone, PROMPTS, greedy(5))
    other = make(folder, 2, compile_cache=str(bare_store))
    gone, threads = pids(other), threading.active_count()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("nanovllm-")]
    assert tokens(other, PROMPTS, greedy(5)) == expected
    assert tokens(two, PROMPTS, greedy(5)) == expected
    other.close()
    assert not any(map(is_alive, gone))
    assert threading.active_count() == threads - 2
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("nanovllm-")]
    with pytest.raises(RuntimeError, match="this engine is closed"):
        other.generate(PROMPTS, greedy(5), use_tqdm=False)
    assert tokens(two, PROMPTS, greedy(5)) == expected


def test_replicas_of_several_ranks(folder: Path, alone: LLM) -> None:
    llm = make(folder, 2, tensor_parallel_size=2)
    try:
        assert tokens(llm, PROMPTS, greedy(6)) == tokens(alone, PROMPTS, greedy(6))
        assert min(counts(llm, "prompt_tokens")) > 0
        ranks = [pid for parent in pids(llm) for pid in children(parent)]
        assert len(ranks) >= 2
        (lost,) = children(pids(llm)[0])
        os.kill(lost, signal.SIGKILL)
        ends = [piece for piece in llm.stream(PROMPTS, greedy(6)) if piece.finish_reason]
        errors = [piece.error or "" for piece in ends if piece.finish_reason == "error"]
        assert len(errors) < len(ends) == len(PROMPTS)
        assert all("replica 0" in error for error in errors)
    finally:
        llm.close()
    wait_until_gone(ranks)


def test_interrupt_ends_the_answers_and_leaves_the_replicas(two: LLM, alone: LLM) -> None:
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(1000):
            two.generate(PROMPTS * 4, greedy(400), use_tqdm=False)
    assert tokens(two, PROMPTS, greedy(5)) == tokens(alone, PROMPTS, greedy(5))
    assert count(two, "num_requests_running") == 0


def test_a_script_that_ends_leaves_no_process(folder: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from nanovllm import LLM; from nanovllm.sampling import SamplingParams\n"
        f"llm = LLM({str(folder)!r}, data_parallel_size=2, **{SIZES!r})\n"
        "print(*(replica.pid for replica in llm.engine.replicas))\n"
        "llm.generate([[5, 6]], SamplingParams(max_tokens=2), use_tqdm=False)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    gone = [int(pid) for pid in done.stdout.split()]
    assert len(gone) == 2 and not any(map(is_alive, gone))
    assert not list(tmp_path.glob("nanovllm-*"))
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("when", ["first", "second", "waiting"])
def test_interrupt_while_replicas_start_leaves_nothing(
    when: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As soon as one has started, which nothing refers to yet, or while both load."""
    threads = set(threading.enumerate())
    start = ProcessStarter.start
    started: list[int] = []
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))

    def interrupted(self: ProcessStarter, *args: Any, **options: Any) -> ProcessReplica:
        replica = start(self, *args, **options)
        started.append(replica.pid)
        if when == ("first", "second")[len(started) - 1]:
            os.kill(os.getpid(), signal.SIGINT)
        elif len(started) == 2:
            for pid in started:
                os.kill(pid, signal.SIGSTOP)  # they load until the interrupt, however late it is
            timer.start()
        return replica

    monkeypatch.setattr(ProcessStarter, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(folder, 2)
    if when == "waiting":
        timer.join()
    assert len(started) == (1 if when == "first" else 2) and not any(map(is_alive, started))
    assert not [one for one in threading.enumerate() if one not in threads and one.name == "ranks"]


def test_a_replica_that_cannot_start_is_an_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(Exception, match=r"replica [01]: .*model\.safetensors"):
        make(tmp_path, 2, skip_tokenizer_init=True)
