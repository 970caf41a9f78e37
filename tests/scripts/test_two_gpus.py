"""The cases of two GPUs: each runs once, and a failed one again; none begins without its time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.bench import two_gpus
from scripts.bench.two_gpus import Case


def test_cases_go_on_where_an_earlier_call_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    flag = tmp_path / "flag"
    once = f"import pathlib, sys; pathlib.Path({str(flag)!r}).touch(exist_ok=False)"
    again = f"import pathlib, sys; pathlib.Path({str(flag)!r}).stat(); print('done')"
    cases = {
        "later": Case(20, ("-c", again)),
        "once": Case(20, ("-c", once + "; print('{\"a\": 1}')")),
        "long": Case(1000, ("-c", "")),
    }
    monkeypatch.setattr(two_gpus, "CASES", cases)
    words = ["--out", str(out), "--store", str(tmp_path), "--seconds", "100"]
    monkeypatch.setattr(sys, "argv", ["two_gpus.py", *words])

    def call() -> tuple[int, dict[str, Any]]:
        return two_gpus.main(), json.loads(out.read_text())

    code, found = call()
    assert code == 1 and "FileNotFoundError" in found["later"]["error"]
    assert found["once"]["lines"] == [{"a": 1}] and "long" not in found
    code, found = call()
    assert code == 0 and found["later"]["last_line"] == "done"
    assert "error" not in found["once"] and "long" not in found
