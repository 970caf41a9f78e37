"""Packages without bytecode: an engine says so, and programs of ours keep it in the store."""

from __future__ import annotations

import importlib.util
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

# as in a container whose packages have no bytecode: Python looks for it in an empty folder
REPORT = (
    "import sys; sys.pycache_prefix = sys.argv[1]\n"
    "from nanovllm import log; from nanovllm.startup import bytecode\n"
    "log.configure(); bytecode.report_missing()"
)
# The prefix stands for the installation, so it must not count as chosen by the user.
KEEP = """
import importlib.util, os, subprocess, sys
from pathlib import Path
from nanovllm.startup import bytecode
bytecode.missing_in = lambda: Path("site-packages")
bytecode.keep(lambda: Path(sys.argv[1]))
import json.tool
print(sys.pycache_prefix, json.tool.__cached__)
command = [sys.executable, "-c", "import sys; print(sys.pycache_prefix, sys.dont_write_bytecode)"]
subprocess.run(command, check=True)
"""


def run(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    unset = ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "NANOVLLM_LOG_LEVEL")
    kept = {name: text for name, text in os.environ.items() if name not in unset}
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env=kept | {"PYTHONPATH": root} | environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip


def test_a_start_says_that_torch_has_no_bytecode(tmp_path: Path) -> None:
    hint = run(REPORT, tmp_path, PYTHONDONTWRITEBYTECODE="1").stderr
    assert "-m compileall -q -j 0 " in hint and "site-packages" in hint
    assert run(REPORT, tmp_path).stderr == "", "the first import writes it"
    torch_file = importlib.util.find_spec("torch").origin  # type: ignore[union-attr]
    cached = tmp_path / torch_file.removeprefix("/")  # type: ignore[union-attr]
    cached.parent.mkdir(parents=True)
    cached.with_name(f"__init__.{sys.implementation.cache_tag}.pyc").touch()
    assert run(REPORT, tmp_path, PYTHONDONTWRITEBYTECODE="1").stderr == ""


def test_programs_keep_bytecode_in_the_store_for_themselves_and_their_children(
    tmp_path: Path,
) -> None:
    own, child = run(KEEP, tmp_path / "store", PYTHONDONTWRITEBYTECODE="1").stdout.splitlines()
    folder = tmp_path / "store" / "bytecode"
    prefix, cached = own.split()
    assert prefix == str(folder) and Path(cached).is_file() and cached.startswith(prefix)
    assert child.split() == [str(folder), "False"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("why", ["shared", "chosen"])
def test_bytecode_stays_where_it_is(tmp_path: Path, why: str) -> None:
    """In a folder that others may write to is code of theirs; a user's prefix is the user's."""
    store, chosen = tmp_path / "store", str(tmp_path / "chosen")
    store.mkdir()
    environment = {"PYTHONDONTWRITEBYTECODE": "1"}
    if why == "shared":
        store.chmod(0o777)
    else:
        environment["PYTHONPYCACHEPREFIX"] = chosen
    _, child = run(KEEP, store, **environment).stdout.splitlines()
    assert child.split() == [chosen if why == "chosen" else "None", "True"]
    assert not (store / "bytecode").exists()
