"""Rows of a batch job's input: what is read, what is refused, and that memory is bounded."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import pytest

from nanovllm.batch import rows
from nanovllm.batch.rows import Line, Refused, parse, read_lines, scan

WORDS = [b'{"prompt": "a"}', b"", b"  \t", b'{"prompt": "b"}', b"x" * 19, b"x" * 99]


def line(text: str | bytes) -> Line:
    data = text.encode() if isinstance(text, str) else text
    return Line(7, data, len(data))


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last_has_end", [True, False])
def test_lines_are_those_that_are_not_blank(end: bytes, last_has_end: bool) -> None:
    data = end.join(WORDS) + end * last_has_end
    found = [(one.row, one.text.strip()) for one in read_lines(io.BytesIO(data)) if one.text]
    assert found == [(row, text) for row, text in enumerate(WORDS) if text.strip()]


def test_a_byte_order_mark_is_left_out() -> None:
    (found,) = read_lines(io.BytesIO('\ufeff{"prompt": "a"}\n'.encode()))
    assert parse(found).prompt == "a"


@pytest.mark.parametrize("length", [18, 19, 20, 37, 99])
def test_a_line_over_the_limit_is_not_kept(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 19)
    monkeypatch.setattr(rows, "BLOCK_BYTES", 7)
    text = b"x" * (length - 1) + b"\n"
    long, after = read_lines(io.BytesIO(text + b"{}\n"))
    assert (long.row, long.num_bytes, after) == (0, length, Line(1, b"{}\n", 3))
    assert long.text == (text if length <= 20 else None)
    if length > 20:
        with pytest.raises(Refused, match=f"the line has {length} bytes: at most 19"):
            parse(long)


@pytest.mark.parametrize("last_row", [-1, 0, 3, 4, 5])
def test_a_scan_finds_the_place_after_a_row(last_row: int, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(WORDS))
    found = scan(path, last_row)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    everything = list(read_lines(io.BytesIO(path.read_bytes())))
    assert (found.num_rows, found.num_bytes) == (len(everything), path.stat().st_size)
    with open(path, "rb") as file:
        file.seek(found.next_offset)
        left = list(read_lines(file, last_row + 1))
    assert left == [one for one in everything if one.row > last_row]
    assert found.num_before == len(everything) - len(left)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{bad", "not valid JSON: Expecting property name"),
        (b'{"prompt": "\xff"}', "not valid JSON: 'utf-8' codec can't decode byte 0xff"),
        ('{"prompt": "a", "params": {"temperature": NaN}}', r"params\.temperature is not a finite"),
        ('{"prompt": "a", "id": 1e999}', "^id is not a finite number"),
        (
            '{"prompt": "a", "id": {"x": [1.5, [-1e999]]}}',
            r"^id\.x\[1\]\[0\] is not a finite number",
        ),
        ('{"prompt": [1, Infinity]}', r"^prompt\[1\] is not a finite number"),
        ("[" * 100_000, "nested too deeply"),
        ("[1, 2]", r"the line is \[1, 2\]: it must be a JSON object"),
        ('{"prompt": "a", "prompts": 1}', "the row has the key 'prompts': use prompt, messages"),
        ("{}", "the row has no prompt: use prompt or messages"),
        ('{"prompt": "a", "messages": []}', "the row has prompt and messages"),
        ('{"prompt": {"a": 1}}', 'prompt is {"a": 1}: it must be text or a list'),
        ('{"messages": []}', r"messages is \[\]: it must be a list of messages"),
        ('{"messages": [[{"role": "user"}]]}', "it must be a list of messages"),
        ('{"prompt": "a", "params": 3}', "params is 3: it must be an object"),
        ('{"custom_id": "x", "method": "POST", "body": {}}', "the row is in OpenAI's batch format"),
    ],
)
def test_what_is_no_row_is_refused(text: str | bytes, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        parse(line(text))


def test_a_refused_row_keeps_its_id() -> None:
    for row in ({"id": "x"}, {"id": "x", "other": 1}, {"id": "x", "prompt": 3}, {"custom_id": "x"}):
        with pytest.raises(Refused) as caught:
            parse(line(json.dumps(row)))
        assert caught.value.id == "x"


def test_a_row_with_an_infinite_number_keeps_its_id_unless_it_is_in_it() -> None:
    for text, row_id in (
        ('{"id": [1e308], "prompt": "a", "params": {"top_p": 1e999}}', [1e308]),
        ('{"id": [1e999], "prompt": "a"}', None),
    ):
        with pytest.raises(Refused, match="is not a finite number") as caught:
            parse(line(text))
        assert caught.value.id == row_id


def test_finite_numbers_are_read_as_they_are() -> None:
    found = parse(line('{"id": [1e308, 5e-324, -0.0, 3], "prompt": "a", "params": {"top_p": 0.5}}'))
    assert found.id == [1e308, 5e-324, -0.0, 3] and found.params == {"top_p": 0.5}
