"""Texts of a file are those of the prompts of this run, or the run ends with an error."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

# scripts are run as files, and import each other as such
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import train_draft
from draft import text_file
from draft.collect import Text

ORIGIN = text_file.origin_of(["one", "two"], 3, 1)
TEXTS = [Text([1, 2, 3], 2), Text([4], 1)]


def test_texts_are_read_again(tmp_path: Path) -> None:
    text_file.write(tmp_path / "texts", ORIGIN, TEXTS)
    assert text_file.read(tmp_path / "texts", ORIGIN) == TEXTS


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (text_file.origin_of(["one", "two"], 0, 1), "own_prompts 3 (here 0)"),
        (text_file.origin_of(["one", "two"], 3, 2), "answers 1 (here 2)"),
        (text_file.origin_of(["two", "one"], 3, 1), f"prompts {ORIGIN.prompts} (here "),
    ],
)
def test_texts_of_other_prompts_are_refused(
    tmp_path: Path, other: text_file.Origin, told: str
) -> None:
    text_file.write(tmp_path / "texts", ORIGIN, TEXTS)
    with pytest.raises(ValueError, match=re.escape(f"has texts of other {told}")):
        text_file.read(tmp_path / "texts", other)


def test_a_file_of_some_texts_is_refused(tmp_path: Path) -> None:
    text_file.write(tmp_path / "texts", ORIGIN, TEXTS)
    lines = (tmp_path / "texts").read_text().splitlines()
    (tmp_path / "texts").write_text(lines[0] + "\n" + lines[1])
    with pytest.raises(ValueError, match="has 1 of 2 texts: name another file"):
        text_file.read(tmp_path / "texts", ORIGIN)
    (tmp_path / "texts").write_text("\n".join(lines[1:]))  # without the line on all
    with pytest.raises(ValueError, match="has texts of other prompts None"):
        text_file.read(tmp_path / "texts", ORIGIN)


def answered(file: Path, *options: str) -> Any:
    args = train_draft.parse_args(
        ["--model", "tiny-qwen3", "--out", "head", "--texts", str(file), "--num-tokens", "2",
         "--max-model-len", "128", "--device", "cpu", *options]
    )  # fmt: skip
    return train_draft.answered(args)


def test_as_many_texts_of_other_prompts_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "texts"
    trained, others = answered(file, "--num-prompts", "3")
    assert answered(file, "--num-prompts", "3") == (trained, others) and len(trained) == 3
    assert {kind: len(some) for kind, some in others.items()} == {"prose": 6, "code": 6, "chat": 6}
    with pytest.raises(ValueError, match="has texts of other prompts"):
        answered(file, "--num-prompts", "2", "--own-prompts", "1")
    head, *_ = file.read_text().splitlines()
    assert json.loads(head)["texts"] == 21


def test_texts_are_divided_where_the_model_repeats_its_prompts(tmp_path: Path) -> None:
    """Of 30 prompts tiny-qwen3 makes up a few different ones."""
    given = ("--num-prompts", "3", "--own-prompts", "30", "--answers", "2")
    trained, others = answered(tmp_path / "texts", *given)
    asked = [tuple(one.token_T[: one.num_prompt]) for one in trained]
    num = len(asked) // 2
    assert 4 < num < 33 and asked[:num] == asked[num:] and len(set(asked[:num])) == num
    assert sum(map(len, others.values())) == 18
    assert answered(tmp_path / "texts", *given) == (trained, others)
