"""The output of a batch job: order, bounded memory, and what belongs to another job."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovllm.batch import job as job_module
from nanovllm.batch import output as output_module
from nanovllm.batch.output import Found, InOrder, Output
from nanovllm.batch.results import Result, answer, failure
from nanovllm.batch.rows import Line
from nanovllm.schedule.logprobs import Logprob
from nanovllm.schedule.outputs import FinishedOutput

JOB = {"model": "m", "params": {"a": 1}}


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Output]:
    made = Output(tmp_path / "out.jsonl")
    yield made
    made.close()


def result(row: int) -> Result:
    return failure(row, None, f"number {row}")


class Shuffling:
    """A worker that finishes lines in a random order."""

    def __init__(self, room: int) -> None:
        self.room, self.lines, self.most = room, list[Line](), 0
        self.random = random.Random(0)

    def has_room(self) -> bool:
        return len(self.lines) < self.room

    def submit(self, line: Line) -> None:
        self.lines.append(line)

    def wait(self) -> list[Result]:
        self.random.shuffle(self.lines)
        num = self.random.randrange(len(self.lines) + 1)
        done, self.lines = self.lines[:num], self.lines[num:]
        return [result(line.row) for line in done]

    def close(self) -> None:
        pass


@pytest.mark.parametrize("num", [0, 1, 19, 99, 989])
@pytest.mark.parametrize("room", [1, 5, 1000])
def test_results_are_in_the_order_of_the_lines(
    num: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_module, "MAX_WAITING_BYTES", 37)
    lines = [Line(3 * i, b"x", 1) for i in range(num)]
    found = [one.row for some in job_module._answers(iter(lines), Shuffling(room)) for one in some]
    assert found == [line.row for line in lines]


@pytest.mark.parametrize(("max_rows", "max_bytes"), [(19, 10**9), (10**9, 19)])
def test_a_row_that_takes_long_does_not_let_the_input_pile_up(
    max_rows: int, max_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_module, "MAX_WAITING", max_rows)
    monkeypatch.setattr(output_module, "MAX_WAITING_BYTES", max_bytes)
    read: list[int] = []

    def endless() -> Iterator[Line]:
        for row in itertools.count():
            read.append(row)
            yield Line(row, b"x", 1)

    class FirstIsSlow(Shuffling):
        waits = 0

        def wait(self) -> list[Result]:
            self.waits += 1
            if self.waits == 50:
                raise TimeoutError
            done, self.lines = self.lines, []
            return [result(line.row) for line in done if line.row]

    with pytest.raises(TimeoutError):
        list(job_module._answers(endless(), FirstIsSlow(5)))
    assert len(read) == 19 if max_rows == 19 else 5 <= len(read) < 19


def test_results_that_wait_for_an_earlier_one_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_module, "MAX_WAITING_BYTES", 100)
    order = InOrder()
    for row in (0, 1):
        order.expect(Line(row, b"x", 1))
    order.put([Result(1, b"y" * 98, 1, False)])
    assert not order.has_room()
    assert len(order.put([Result(0, b"y" * 500, 1, False)])) == 2
    assert order.is_empty and order.has_room() and order._num_bytes == 0


def test_a_row_has_one_result() -> None:
    order = InOrder()
    for row in (0, 1):
        order.expect(Line(row, b"x", 1))
    order.put([result(1)])
    with pytest.raises(AssertionError, match="row 1 was answered twice"):
        order.put([result(1)])


@pytest.mark.parametrize("tail", [b"", b'{"row": 9', b'{"row": 9, "text": "a"}', b"\0" * 19])
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_the_last_whole_line_is_found(
    output: Output, tail: bytes, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_module, "BLOCK_BYTES", block)
    output.append([tail] if tail else [])
    assert output.find() == Found(0, -1, 0)
    output.cut(0)
    lines = [result(row).line for row in (0, 2, 5)]
    output.append([*lines, tail])
    found = output.find()
    assert found == Found(3, 5, sum(map(len, lines)))
    output.cut(found.num_bytes)
    assert output.path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize("text", [b"hello\n", b"[1]\n", b'{"row": "1"}\n', b'{"row": -1}\n'])
def test_another_file_is_not_taken_for_an_output(output: Output, text: bytes) -> None:
    output.append([text])
    with pytest.raises(ValueError, match="is not the output of a batch job"):
        output.find()


def test_an_output_belongs_to_one_job(output: Output) -> None:
    with pytest.raises(ValueError, match=r"out.jsonl.job does not; use --overwrite"):
        output.check(JOB)
    output.start(JOB)
    output.check({"params": {"a": 1}, "model": "m"})
    with pytest.raises(ValueError, match='with a different model: "m", not "n"; --overwrite'):
        output.check({**JOB, "model": "n"})
    with pytest.raises(ValueError, match="with a different more: null, not 3"):
        output.check({**JOB, "more": 3})
    with pytest.raises(ValueError, match="with a different model"):
        output.check({"params": {"a": 1}})
    output.sidecar.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        output.check(JOB)


def test_one_job_at_a_time_writes(output: Output) -> None:
    with pytest.raises(ValueError, match=f"another job is writing to {output.path}"):
        Output(output.path)


def test_infinite_logprobs_and_broken_ids_are_written_as_json() -> None:
    found = {5: Logprob(float("-inf"), 2, 5, None)}
    done = FinishedOutput("é", [5], "stop", None, [1, 2], 0, [found], [None, found])
    line = answer(3, "\ud800", done).line
    assert b"Infinity" not in line and b'"logprob": null' in line and b"\\ud800" in line
    assert "é".encode() in answer(3, "x", done).line
