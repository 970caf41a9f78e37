"""`nanovllm completion`: what the scripts offer in each shell that is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from nanovllm import hub
from nanovllm.cli import completion
from nanovllm.cli.main import COMMANDS, run

BASH = """
source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); _nanovllm; printf '%s\\n' "${COMPREPLY[@]}"
"""
ZSH = """
compdef() { true }; _files() { print FILES }; compadd() { shift; print -l -- "$@" }
source "$0"; words=("$@"); CURRENT=$#; _nanovllm
"""
FISH = 'source $argv[1]; complete -C "$argv[2]"'
INSTALLED = {name: path for name in completion.WRITERS if (path := shutil.which(name))}
FIRST = {name.split()[0] for name in COMMANDS}
CASES = [
    (["nanovllm", ""], FIRST),
    (["nanovllm", "se"], {"serve"}),
    (["nanovllm", "bench", ""], {"throughput", "latency", "serve"}),
    (["nanovllm", "bench", "la"], {"latency"}),
    (["nanovllm", "serve", "--max-model-l"], {"--max-model-len"}),
    (["nanovllm", "bench", "serve", "--burst"], {"--burstiness"}),
    (["nanovllm", "bench", "serve", "--backend", ""], {"openai", "vllm", "openai-chat"}),
    (["nanovllm", "cache", "v"], {"verify"}),
    (["nanovllm", "completion", ""], {"bash", "zsh", "fish"}),
    (["nanovllm", "run", "tiny"], set(hub.EMBEDDED)),
    (["nanovllm", "serve", "--no-fus"], {"--no-fuse"}),
]


@pytest.fixture
def script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Path]:
    made = {}
    for shell in completion.WRITERS:
        run("completion", [shell])
        made[shell] = tmp_path / shell
        made[shell].write_text(capsys.readouterr().out)
    return made


def offered(shell: str, script: Path, words: list[str], folder: Path) -> set[str]:
    """What a shell offers at the end of the words, in an empty folder."""
    program = INSTALLED[shell]
    code = {"bash": BASH, "zsh": ZSH, "fish": FISH}[shell]
    end = [str(script), " ".join(words)] if shell == "fish" else [str(script), *words]
    plain = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    done = subprocess.run(
        [program, *plain, "-c", code, *end], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "HOME": str(folder)}, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    found = {line.split("\t")[0] for line in done.stdout.splitlines() if line} - {"FILES"}
    # zsh itself leaves out what does not fit
    return {one for one in found if one.startswith(words[-1])}


@pytest.mark.parametrize("shell", INSTALLED)
def test_a_shell_offers_what_can_follow(
    shell: str, script: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("empty")
    for words, expected in CASES:
        assert offered(shell, script[shell], words, folder) == expected, words


@pytest.mark.parametrize("shell", [name for name in INSTALLED if name != "fish"])
def test_an_option_with_a_file_leaves_it_to_the_shell(
    shell: str, script: dict[str, Path], tmp_path: Path
) -> None:
    words = ["nanovllm", "serve", "--compile-cache", ""]
    assert offered(shell, script[shell], words, tmp_path) == set()


def test_scripts_have_every_option(script: dict[str, Path]) -> None:
    found = completion.commands()
    assert found.keys() == {"", "bench", *COMMANDS}
    assert "--max-model-len" in found["serve"].options
    for shell, path in script.items():
        text = path.read_text()
        for one in found.values():
            for option in one.options:
                assert (f"-l {option[2:]}" if shell == "fish" else option) in text, option
