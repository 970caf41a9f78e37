"""Command-line tools answer a user's mistake with one line, and all of them end the same way."""

from __future__ import annotations

import ast
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from nanovllm.tools import command_line

ROOT = Path(__file__).parents[2]
NOT_TOOLS = {
    "scripts/draw_structure.py", "scripts/draw_numbers.py",  # take no arguments
    "nanovllm/launch.py", "nanovllm/template_process.py",  # the programs of children
}  # fmt: skip


def raising(error: Exception) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("dtype is 'x':\n  use another"), "dtype is 'x': use another"),
        (TypeError("no option"), "no option"),
        (FileNotFoundError(2, "No such file", "a.json"), "[Errno 2] No such file: 'a.json'"),
        (ValueError(), "ValueError"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/tool.py"])
    assert command_line.run(raising(error)) == 2
    assert capsys.readouterr() == ("", f"tool.py: error: {line}\n")


def test_debug_logs_show_where_it_was_raised(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("nanovllm").propagate = True
    with caplog.at_level(logging.DEBUG, logger="nanovllm"):
        command_line.run(raising(ValueError("bad")))
    assert "in main" in caplog.text and "raise error" in caplog.text


def test_the_status_of_main_is_returned_and_faults_pass_through() -> None:
    assert command_line.run(lambda: 1) == 1
    assert command_line.run(lambda: None) == 0
    with pytest.raises(RuntimeError, match="a fault"):
        command_line.run(raising(RuntimeError("a fault")))


def tools() -> list[Path]:
    package = ROOT / "nanovllm"
    scripts = (ROOT, ROOT / "scripts", ROOT / "scripts" / "bench")
    places = (*scripts, package, package / "tools", package / "batch")
    files = [path for place in places for path in sorted(place.glob("*.py"))]
    return [
        path
        for path in files
        if '== "__main__"' in path.read_text() and str(path.relative_to(ROOT)) not in NOT_TOOLS
    ]


@pytest.mark.parametrize("path", tools(), ids=lambda path: path.stem)
def test_every_tool_ends_through_it(path: Path) -> None:
    (block,) = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.If))
    assert "sys.exit(command_line.run(" in ast.unparse(block)
