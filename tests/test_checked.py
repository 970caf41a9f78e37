"""`make check` runs a file of every folder of tests, or says why not."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tests.conftest import LONGEST

TESTS = Path(__file__).parent
ROOT = TESTS.parent
# the real torch_npu, which other tests cannot have in their process, takes half a minute to start
LEFT_OUT = {"tests/npu"}


def files() -> set[str]:
    return {str(path.relative_to(ROOT)) for path in TESTS.rglob("test_*.py")}


def checked() -> list[str]:
    return (TESTS / "check.txt").read_text().split()


def folders(paths: Iterable[str]) -> set[str]:
    return {str(Path(path).parent) for path in paths}


def test_a_check_runs_a_file_of_every_folder() -> None:
    assert folders(files()) - folders(checked()) == LEFT_OUT


def test_the_files_of_a_check_are_there_once_and_in_order() -> None:
    assert set(checked()) <= files()
    assert checked() == sorted(set(checked()))


def test_make_check_runs_these_files() -> None:
    assert "$$(cat tests/check.txt)" in (ROOT / "Makefile").read_text()


def test_the_longest_files_are_there() -> None:
    assert set(LONGEST) <= files() and len(set(LONGEST)) == len(LONGEST)
