"""`nanovllm serve` end to end: the commands that ask a server, and its end."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator

import pytest

from nanovllm import api
from nanovllm.api.config import ServerConfig
from nanovllm.cli.main import run
from tests.api.command_server import command_server

WORDS = "tiny-qwen3 --device cpu --enforce-eager --max-model-len 256 --max-num-seqs 4"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The URL and the process of a server, which may have ended afterwards."""
    with command_server(*WORDS.split()) as one:
        yield one


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
    assert process.wait(timeout=60) == 0


def test_a_command_line_for_vllm_that_reads_calls_of_tools_is_understood(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served: list[ServerConfig] = []
    monkeypatch.setattr(api, "serve", lambda engine, server: served.append(server))
    words = ["tiny-qwen3", "--enable-auto-tool-choice", "--tool-call-parser"]
    run("serve", [*words, "hermes"])
    assert [server.tool_call_parser for server in served] == ["hermes"]
    with pytest.raises(ValueError, match="enable_auto_tool_choice needs a tool_call_parser"):
        run("serve", [*words, "none"])
