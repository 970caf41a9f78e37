"""README and docs/*.md: snippets run as they are printed, with the output that is printed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from nanovllm import env, programs
from tests.api.command_server import command_server

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
URL = "http://127.0.0.1:8000"
FENCE = re.compile(r"```(\w+)( not-run)?\n(.*?)```", re.S)
COMMAND = re.compile(r"^    \$ (.+)\n((?:    (?!\$ ).+\n)*)", re.M)
LINK = re.compile(r"\[[^]]*\]\(([^)#\s]*)(?:#([^)\s]+))?\)")
# Options that make a start quick; the answers are those of the defaults.
QUICK = ("--max-model-len", "512", "--max-num-seqs", "2", "--enforce-eager")


class Snippet(NamedTuple):
    """Python and what it prints; None: the document does not say."""

    code: str
    output: str | None


def snippets(document: Path) -> Iterator[Snippet]:
    found = [one.groups() for one in FENCE.finditer(document.read_text(encoding="utf-8"))]
    for (language, not_run, code), after in zip(found, [*found[1:], ("", None, "")]):
        if language == "python" and not not_run:
            yield Snippet(code, after[2] if after[0] == "text" else None)


WITH_PYTHON = [path for path in DOCUMENTS if any(snippets(path))]


@contextmanager
def server_of(text: str) -> Iterator[str]:
    """The text with the address of a running server, if it names one."""
    with ExitStack() as stack:
        if URL in text:
            url, _ = stack.enter_context(command_server("tiny-qwen3", *QUICK))
            text = text.replace(URL, url)
        yield text


@pytest.mark.parametrize("document", WITH_PYTHON, ids=lambda path: path.name)
def test_python_runs_as_it_is_printed(document: Path) -> None:
    found = list(snippets(document))
    mark = "--- end of a snippet ---"
    with server_of("".join(f"{code}\nprint(); print({mark!r})\n" for code, _ in found)) as program:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=env.for_children(), text=True,
            capture_output=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = done.stdout.split(mark)[:-1]
    assert len(printed) == len(found)
    for (code, expected), output in zip(found, printed):
        assert output.strip() or "print(" not in code
        assert expected is None or output.strip() == expected.strip()


@pytest.mark.parametrize("name", ["README.md", "docs/tutorial.md"])
def test_commands_print_what_is_printed(name: str, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    start = shlex.join(programs.command("nanovllm"))
    (tools / "nanovllm").write_text(f'#!/bin/sh\nexec {start} "$@"\n')
    (tools / "nanovllm").chmod(0o755)
    variables = env.for_children() | {"PATH": f"{tools}:{os.environ['PATH']}"}
    found = COMMAND.findall((ROOT / name).read_text(encoding="utf-8"))
    commands = [one for one in found if " serve " not in one[0]]
    assert commands
    for command, expected in commands:
        done = subprocess.run(
            ["sh", "-c", command], cwd=tmp_path, env=variables, text=True, capture_output=True
        )
        assert done.returncode == 0, (command, done.stderr)
        lines = [line.removeprefix("    ") for line in expected.splitlines()]
        assert done.stdout.splitlines() == lines, command


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target, part in LINK.findall(document.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path = (document.parent / target) if target else document
        assert path.exists(), target
        if part:
            heads = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
            kept = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert part in kept, f"{target}#{part}"


def test_the_index_lists_every_page() -> None:
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\(([\w.]+\.md)[)#]", text)) | {"README.md"}
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= listed
