"""Chunks of lost replicas: all rows are answered, and only rows that cost replicas are given up."""

from __future__ import annotations

import json

import pytest

from nanovllm.batch import chunks as chunks_module
from nanovllm.batch.chunks import ALONE_LOSSES, Chunk, Chunks
from nanovllm.batch.rows import Line


def lines(num: int) -> list[Line]:
    texts = [json.dumps({"prompt": "a", "id": f"id {row}"}).encode() for row in range(num)]
    return [Line(row, text, len(text)) for row, text in enumerate(texts)]


def answered(num: int, poison: set[int], in_flight: int) -> tuple[list[int], list[bytes]]:
    """What one replica with several chunks in flight answers if some rows kill it; and the errors.

    Of the chunks in flight, the first is answered before a later one kills the replica.
    """
    chunks, left = Chunks(num, 1), lines(num)[::-1]
    rows, errors, taken = list[int](), list[bytes](), list[Chunk]()
    while True:
        while left and chunks.has_room():
            chunks.add(left.pop())
        if chunks.has_room():
            chunks.flush()
        while len(taken) < in_flight and not any(chunk.is_suspect for chunk in taken):
            chunk = chunks.next_for(is_idle=not taken)
            if chunk is None:
                break
            taken.append(chunk)
        if not taken:
            return rows, errors
        if poison & {line.row for chunk in taken for line in chunk.lines}:
            for chunk in taken:
                errors += [result.line for result in chunks.lost(chunk)]
            taken = []
        else:
            rows += [line.row for line in taken.pop(0).lines]


@pytest.mark.parametrize("num", [1, 19, 99, 989])
@pytest.mark.parametrize("poison", [set[int](), {0}, {17}, {18, 19, 64, 98}])
@pytest.mark.parametrize("in_flight", [1, 3])
def test_rows_that_kill_replicas_are_errors_and_all_others_are_answered(
    num: int, poison: set[int], in_flight: int
) -> None:
    rows, errors = answered(num, poison, in_flight)
    bad = {row for row in poison if row < num}
    assert sorted(rows) == sorted(set(range(num)) - bad)
    found = [json.loads(error) for error in errors]
    assert sorted(error["row"] for error in found) == sorted(bad)
    for error in found:
        assert error["id"] == f"id {error['row']}"
        assert f"{ALONE_LOSSES} replicas were lost" in error["error"]


def test_a_row_survives_replicas_that_are_lost_beside_it() -> None:
    chunks = Chunks(1, 1)
    (chunk,) = [Chunk(lines(1))]
    for _ in range(ALONE_LOSSES):
        assert chunks.lost(chunk) == []
        found = chunks.next_for(is_idle=True)
        assert found is chunk
    assert len(chunks.lost(chunk)) == 1


def test_a_suspect_waits_for_an_idle_replica_and_nothing_overtakes_it() -> None:
    chunks = Chunks(99, 2)
    suspect, other = Chunk(lines(1)), lines(1)[0]
    chunks.lost(suspect)
    chunks.add(other)
    chunks.flush()
    assert chunks.next_for(is_idle=False) is None
    assert chunks.next_for(is_idle=True) is suspect
    after = chunks.next_for(is_idle=False)
    assert after is not None and after.lines == [other]


def test_few_rows_are_shared_out_and_long_rows_end_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = Chunks(19, 2)
    for line in lines(4):
        chunks.add(line)
    sizes = [len(chunk.lines) for chunk in iter(lambda: chunks.next_for(is_idle=True), None)]
    assert sizes == [2, 2]
    monkeypatch.setattr(chunks_module, "CHUNK_BYTES", 3 * lines(1)[0].num_bytes)
    chunks = Chunks(10_000, 1)
    for line in lines(4):
        chunks.add(line)
    first = chunks.next_for(is_idle=True)
    assert first is not None and len(first.lines) == 3
