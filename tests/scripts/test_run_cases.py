"""The cases of GPUs: each runs once, and a failed one again; none begins without its time and its
GPUs; those of one GPU run side by side."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.bench import run_cases
from scripts.bench.gpu_cases import CASES, MODEL, PLACE, Case


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(cases: dict[str, Case], *words: str) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(run_cases, "CASES", cases)
        places = ["--out", str(tmp_path / "out"), "--store", str(tmp_path / "store")]
        monkeypatch.setattr(sys, "argv", ["run_cases.py", *places, "--seconds", "100", *words])
        return run_cases.main(), json.loads((tmp_path / "out" / "results.json").read_text())

    return run


def test_cases_go_on_where_an_earlier_call_ended(call: Any, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    once = f"import pathlib, sys; pathlib.Path({str(flag)!r}).touch(exist_ok=False)"
    again = f"import pathlib, sys; pathlib.Path({str(flag)!r}).stat(); print('done')"
    cases = {
        "later": Case(20, ("-c", again)),
        "once": Case(20, ("-c", once + "; print('{\"a\": 1}')")),
        "long": Case(1000, ("-c", "")),
        "wide": Case(20, ("-c", ""), 2),
    }
    code, found = call(cases, "--gpus", "1")
    assert code == 1 and "FileNotFoundError" in found["later"]["error"]
    assert found["once"]["lines"] == [{"a": 1}] and found.keys() == {"later", "once"}
    code, found = call(cases, "--gpus", "1")
    assert code == 0 and found["later"]["last_line"] == "done"
    assert "error" not in found["once"] and found.keys() == {"later", "once"}


def test_cases_of_a_trained_model_need_one(
    call: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show = "import json, sys; print(json.dumps({'model': sys.argv[1]}))"
    cases = {"trained": Case(20, ("-c", show, MODEL)), "other": Case(20, ("-c", show, "x"))}
    code, found = call(cases, "--gpus", "1")
    assert code == 0 and found.keys() == {"other"}
    assert "trained: needs --model" in capsys.readouterr().err
    _, found = call(cases, "--gpus", "1", "--model", str(tmp_path / "a.gguf"))
    assert found["trained"]["lines"] == [{"model": str(tmp_path / "a.gguf")}]


def test_cases_share_the_gpus(call: Any, tmp_path: Path) -> None:
    """Two cases of one GPU wait for each other's file, so they end only side by side."""
    wait = (
        "import os, pathlib, sys, time\nown, other = map(pathlib.Path, sys.argv[1:])\nown.touch()\n"
        "while not other.exists(): time.sleep(0.01)\n"
        "print('{\"gpus\": \"%s\"}' % os.environ['CUDA_VISIBLE_DEVICES'])"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    show = "import os; print('{\"gpus\": \"%s\"}' % os.environ['CUDA_VISIBLE_DEVICES'])"
    cases = {
        "a": Case(30, ("-c", wait, a, b)),
        "b": Case(30, ("-c", wait, b, a)),
        "both": Case(30, ("-c", show), 2),
    }
    code, found = call(cases, "--gpus", "2")
    gpus = [found[name]["lines"][0]["gpus"] for name in cases]
    assert code == 0 and sorted(gpus[:2]) == ["0", "1"] and sorted(gpus[2].split(",")) == ["0", "1"]


def test_a_case_that_ends_at_its_limit_keeps_its_lines(call: Any) -> None:
    code = "import time; print({1: 2}); print('{\"a\": 1}', flush=True); time.sleep(100)"
    for limit in (2, 10, 50):  # a busy machine may start it too late
        status, found = call({"slow": Case(limit, ("-c", code))}, "--gpus", "1")
        assert status == 1 and f"{limit} s" in found["slow"]["error"]
        if "lines" in found["slow"]:
            break
    assert found["slow"]["lines"] == [{"a": 1}]


def test_a_case_that_is_killed_while_it_writes_keeps_its_error(call: Any, tmp_path: Path) -> None:
    """Its file is not taken for that of a later run, which fails before it writes one."""
    code = (
        "import pathlib, sys, time\nplace, first = map(pathlib.Path, sys.argv[1:])\n"
        "first.touch(exist_ok=False)\nplace.write_text('{\"a\": 1, ')\ntime.sleep(100)"
    )
    command = ("-c", code, PLACE, str(tmp_path / "first"))
    for limit in (2, 10, 50):  # a busy machine may start it too late
        cases = {"killed": Case(limit, command)}
        status, found = call(cases, "--gpus", "1")
        assert status == 1 and f"{limit} s" in found["killed"]["error"]
        assert "results" not in found["killed"]
        if (tmp_path / "first").exists():
            break
    (tmp_path / "out" / "killed.json").write_text('{"a": 1}')
    status, found = call(cases, "--gpus", "1")
    assert status == 1 and "FileExistsError" in found["killed"]["error"]
    assert "results" not in found["killed"]


def test_another_tree_runs_first(call: Any, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "revision.py").write_text("print('{\"revision\": 1}')")
    cases = {"both": Case(20, ("-c", "import os, json; print(json.dumps({'at': os.getcwd()}))"))}
    _, found = call(cases, "--gpus", "1", "--other", str(tmp_path / "tree"))
    assert found["both"]["other"]["lines"] == [{"at": str(tmp_path / "tree")}]
    assert found["both"]["lines"] == [{"at": str(run_cases.TREE)}]


def test_patterns_choose_cases() -> None:
    assert run_cases.chosen(["int4-1*", "hot-8b-1"]) == ["int4-1", "int4-16", "hot-8b-1"]
    with pytest.raises(ValueError, match="'absent'"):
        run_cases.chosen(["absent"])


def test_scripts_of_cases_exist() -> None:
    named = [word for case in CASES.values() for word in case.words if word.endswith(".py")]
    assert named and all((run_cases.TREE / word).exists() for word in named)


def test_a_machine_may_be_shared(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs are those that the environment leaves, so two calls can have different ones."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    show = "import os; print('{\"gpus\": \"%s\"}' % os.environ['CUDA_VISIBLE_DEVICES'])"
    _, found = call({"both": Case(20, ("-c", show), 2)}, "--gpus", "2")
    assert found["both"]["lines"] == [{"gpus": "5,7"}]
