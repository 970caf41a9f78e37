"""What long commands show: bars on terminals only, log lines above them, --quiet, first lines."""

from __future__ import annotations

import io
import logging
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tqdm import tqdm

from nanovllm import env, log, progress
from nanovllm.cli import precompile, watch
from nanovllm.cli.main import run
from nanovllm.cli.watch import Watch
from nanovllm.startup.compile_farm.farm import WorkerFailed
from tests.cli.mock_server import serving

QUIET = ("run", "serve", "batch", "bench throughput", "bench latency", "bench serve", "precompile")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the caller of the tests has chosen."""
    for name in ("TQDM_DISABLE", "NANOVLLM_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)


def shown_by(stderr: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("sys.stderr", stderr)
    for _ in progress.bar(range(3), desc="things"):
        pass
    return str(stderr.getvalue())


def test_bars_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "things: 100%" in shown_by(Terminal(), monkeypatch)
    assert shown_by(io.StringIO(), monkeypatch) == ""
    monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())  # a notebook
    assert "things: 100%" in shown_by(io.StringIO(), monkeypatch)


@pytest.mark.parametrize(("value", "is_shown"), [("1", False), ("true", False), ("0", True)])
def test_the_variable_of_tqdm_turns_bars_off(
    value: str, is_shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", value)
    assert bool(shown_by(Terminal(), monkeypatch)) == is_shown


def test_lines_of_the_log_stand_above_the_bar() -> None:
    stream = Terminal()
    handler = log.AboveBars(stream)
    record = logging.LogRecord("x", logging.INFO, "", 0, "a line", (), None)
    with tqdm(total=3, file=stream, mininterval=0):
        handler.emit(record)
    before, after = stream.getvalue().split("a line\n")
    assert before.endswith("\r"), "the bar is cleared before the line"
    assert "0/3" in after, "and drawn again after it"


# watching -----------------------------------------------------------------------------------------


def watched(stderr: Any, monkeypatch: pytest.MonkeyPatch, wanted: str, **options: Any) -> str:
    """What is shown while 7 of 9 tokens are there, until it has `wanted`."""
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr(watch, "LINE_SECONDS", 0.001)
    monkeypatch.setattr(watch, "BAR_SECONDS", 0.001)
    asked = threading.Event()

    def count() -> int:
        if wanted in stderr.getvalue():
            asked.set()
        return 7

    with Watch("generating", "tokens", 9, count=count, **options):
        asked.wait(10 if wanted else 0.05)
    return str(stderr.getvalue())


def test_a_watch_writes_lines_where_no_terminal_is(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "generating: 7 of 9 tokens (78%) in 0 s\n"
    assert line in watched(io.StringIO(), monkeypatch, line)


def test_a_watch_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = watched(Terminal(), monkeypatch, "7/9")
    assert "generating:" in text and "78%" in text and " of 9" not in text


def test_a_watch_is_silent_if_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watched(io.StringIO(), monkeypatch, "", shown=False) == ""
    env.be_quiet()
    assert watched(Terminal(), monkeypatch, "") == ""


# --quiet ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", QUIET)
def test_quiet_leaves_warnings_only(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[str, bool]] = []

    def main(args: object) -> int:
        found.append((env.read().log_level, env.hides_bars()))
        return 0

    module = "nanovllm.cli." + command.replace(" ", ".")
    monkeypatch.setattr(f"{module}.main", main)
    words = ["in", "-o", "out"] if command == "batch" else []
    assert run(command, words) == run(command, [*words, "--quiet"]) == 0
    assert found == [("INFO", False), ("WARNING", True)]


def test_quiet_keeps_a_log_of_errors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOVLLM_LOG_LEVEL", "error")
    env.be_quiet()
    assert env.read().log_level == "ERROR"


# first lines --------------------------------------------------------------------------------------


def test_precompile_begins_with_what_it_compiles(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    choice = SimpleNamespace(
        spec=SimpleNamespace(layout=SimpleNamespace(buckets=[1, 2, 3])),
        model=SimpleNamespace(config=SimpleNamespace(architecture="Some", num_layers=6)),
        platform=SimpleNamespace(device="cpu"),
    )

    def fill(config: Any, count: Any, step: Any, begin: Any) -> list[Any]:
        begin(choice)
        step(SimpleNamespace(bucket=("decode", 4)), 3)
        raise WorkerFailed("a process has ended")

    monkeypatch.setattr("nanovllm.startup.precompile.fill", fill)
    words = ["some/model", "--out", str(tmp_path)]
    assert run("precompile", words) == 1
    out, err = capsys.readouterr()
    expected = f"compiling some/model (Some, 6 layers) for cpu into {tmp_path}: 3 buckets\n"
    assert out == expected and err == "nanovllm precompile: a process has ended\n"
    assert run("precompile", [*words, "--quiet"]) == 1
    assert capsys.readouterr().out == ""
    assert precompile.USAGE


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--random-input-len 8 --random-output-len 3", "2 prompts, 8 tokens in and 3 out each"),
        ("--random-input-len 8 --random-output-len 3 --random-range-ratio 0.5",
         "2 prompts, about 8 tokens in and 3 out each"),
        ("--dataset-name nanovllm --min-len 2 --max-len 4", "2 prompts, 2 to 4 tokens in and out"),
    ],
)  # fmt: skip
def test_bench_serve_begins_with_the_workload(
    words: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving() as mock:
        common = ["--base-url", mock.url, "--num-prompts", "2", "--num-clients", "1"]
        assert run("bench serve", [*common, *words.split()]) == 0
        first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"mock at {mock.url}: {expected}")
    assert not re.search(r"\d/2", first)
