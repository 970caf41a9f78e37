"""`nanovllm serve` end to end: the commands that ask a server, and its end."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovllm.cli.main import run

ROOT = Path(__file__).parents[2]
WORDS = (
    "serve tiny-qwen3 --device cpu --enforce-eager --max-model-len 256 --max-num-seqs 4 --port 0"
)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The URL and the process of a server, which may have ended afterwards."""
    command = [sys.executable, "-m", "nanovllm", *WORDS.split()]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if match := re.search(r"is served at (http://\S+)", line):
            break
    else:
        pytest.fail("".join(lines))
    try:
        yield match[1], process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_commands_ask_the_server_until_sigterm_ends_it(
    server: tuple[str, subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    url, process = server
    question = ["What is 37 + 45?", "--temperature", "0", "--max-tokens", "16"]
    assert not run("run", [*question, "--url", url])
    answer = capsys.readouterr().out
    words = ["--device", "cpu", "--enforce-eager", "--max-model-len", "256"]
    assert not run("run", [*question, *words, "--max-num-seqs", "4"])
    assert capsys.readouterr().out == answer, "the same model in this process"
    sizes = "--num-prompts 7 --random-input-len 19 --random-output-len 5 --ignore-eos"
    assert run("bench serve", ["--base-url", url, *sizes.split(), "--disable-tqdm"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^Total input tokens: +133 *$", out, re.MULTILINE)
    assert re.search(r"^Total generated tokens: +35 *$", out, re.MULTILINE)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0
