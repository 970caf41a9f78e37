"""The command as a whole: its overview, wrong names, how fast help comes, and how it ends."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import nanovllm
from nanovllm.api import ServerConfig
from nanovllm.cli import serve
from nanovllm.cli.main import COMMANDS, main, run
from nanovllm.config import EngineConfig
from nanovllm.startup import bytecode

ROOT = Path(__file__).parents[2]
MOST_STARTS = 8  # of Python itself, in processor time, that help takes


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the server was started with, which it is not."""
    calls: list[Any] = []

    def start(engine: EngineConfig, server: ServerConfig) -> int:
        calls.append((engine, server))
        return 3

    monkeypatch.setattr("nanovllm.api.serve", start)
    return calls


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["-h"]):
        assert main(words) == 0
        out = capsys.readouterr().out
        assert all(f"  {name} " in out and one.summary in out for name, one in COMMANDS.items())
    assert main(["bench"]) == 0
    out = capsys.readouterr().out
    assert "usage: nanovllm bench COMMAND" in out and "  latency" in out and "precompile" not in out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"nanovllm {nanovllm.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sevre", "nanovllm: error: unknown command sevre: did you mean serve?"),
        ("zzz --help", "nanovllm: error: unknown command zzz: see nanovllm --help"),
        ("--model x", "nanovllm: error: unknown option --model: see nanovllm --help"),
        ("bench latenzy", "nanovllm bench: error: unknown command latenzy: did you mean latency?"),
    ],
)
def test_a_wrong_command_is_answered_with_the_nearest(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    assert capsys.readouterr() == ("", f"{message}\n")


def test_ctrl_c_ends_a_command_with_its_status_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nanovllm.cli.cache.main", interrupted)
    assert run("cache", ["list"]) == 130
    assert capsys.readouterr().err == "nanovllm cache: interrupted\n"


def test_commands_with_an_engine_keep_bytecode_in_its_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Path] = []
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(bytecode, "keep", lambda folder: kept.append(folder()))
    for command in ("info", "cache"):
        monkeypatch.setattr(f"nanovllm.cli.{command}.main", lambda args: 0)
    assert run("info", []) == run("info", ["--compile-cache", "/store"]) == 0
    assert run("cache", ["list"]) == 0
    assert kept == [tmp_path, Path("/store")]


def test_help_of_no_command_imports_torch() -> None:
    script = """
import sys
from nanovllm.cli.main import COMMANDS, run
for name in COMMANDS:
    try:
        run(name, ["--help"])
    except SystemExit as ended:
        assert ended.code == 0
heavy = ("torch", "transformers", "numpy", "starlette", "uvicorn")
print([name for name in heavy if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
    for name in COMMANDS:
        assert f"usage: nanovllm {name} " in done.stdout


@pytest.mark.parametrize("words", [["--help"], ["bench", "serve", "--help"]])
def test_help_is_there_at_once(words: list[str]) -> None:
    def seconds(*command: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # in turns, since other programs slow both
    times = [(seconds("-c", ""), seconds("-m", "nanovllm", *words)) for _ in range(5)]
    start, help_seconds = map(min, zip(*times))
    assert help_seconds < MOST_STARTS * start


def test_mistakes_are_one_line_of_the_process() -> None:
    command = [sys.executable, "-m", "nanovllm", "cache", "list", "/nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "nanovllm: error: /nowhere is not a store of compiled programs\n"


# serve --------------------------------------------------------------------------------------------


def test_serve_gives_options_to_the_engine_and_to_the_server(served: list[Any]) -> None:
    words = "m/n --port 80 --served-model-name a b --max_model_len 64 --block-size 32"
    assert run("serve", words.split()) == 3
    engine = EngineConfig("m/n", max_model_len=64, kvcache_block_size=32)
    assert served == [(engine, ServerConfig(port=80, served_model_name=["a", "b"]))]


def test_serve_names_the_extra_that_is_missing(
    served: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "NEEDED", ("json", "no_such_package"))
    with pytest.raises(ValueError, match=r"needs no_such_package: pip install .*serve"):
        run("serve", [])
    assert served == []


# info ---------------------------------------------------------------------------------------------


def test_info_says_what_is_picked_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tiny-qwen3", "--device", "cpu", "--max-num-seqs", "9", "--enforce-eager"]
    run("info", [*words, "--json"])
    found = json.loads(capsys.readouterr().out)
    picked = found["picked"]
    assert picked["max_num_seqs"] == {"value": 9, "why": "as given"}
    assert picked["dtype"] == {"value": "float32", "why": "the default on a cpu"}
    assert picked["mode"] == {"value": "eager", "why": "enforce_eager is given"}
    assert picked["persistent_step"] == {
        "value": False,
        "why": "enforce_eager=True: eager mode runs op by op",
    }
    assert picked["graph_batch_sizes"]["value"][-1] == 9
    assert found["versions"]["nanovllm"] == nanovllm.__version__
    assert found["devices"]["cpu"] == "can be used" and "npu" in found["devices"]
    assert "sdpa" in found["attention"] and found["model"]["layers"] == 6
    run("info", words)
    out = capsys.readouterr().out
    assert "max_num_seqs            9  (as given)" in out
    assert set(found) <= {line.rstrip(":") for line in out.splitlines()}
