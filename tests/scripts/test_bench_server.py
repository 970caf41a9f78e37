"""The benchmark of a whole server runs its cases on a CPU, one by one, and reports what fails."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scripts.bench import server, server_results, structured_rows
from scripts.bench.server_process import Limit, run

SMALL = (
    "--requests 7 --random-len 5 --max-model-len 64 --max-num-seqs 4 --api-processes 1 "
    "--case-timeout 120 --model tiny-qwen3"
)
ENGINE = "--device cpu --enforce-eager"


def test_a_case_that_fails_loses_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    def failing(self: server.Bench, limit: Limit) -> dict[str, Any]:
        raise RuntimeError("it has failed")

    monkeypatch.setattr(server.Bench, "_starts", failing)
    monkeypatch.setattr(server.Bench, "_probe", lambda self, limit: {"used_bytes": None})
    words = f"{SMALL} --cases ends start rate-inf --output {tmp_path / 'out'} -- {ENGINE}"
    monkeypatch.setattr(sys, "argv", ["server.py", *words.split()])
    assert server.main() == 1
    results = json.loads((tmp_path / "out").read_text())
    load, ends = results["cases"]["rate-inf"], results["cases"]["ends"]
    assert results["cases"]["start"] == {"error": "RuntimeError: it has failed"}
    assert load["completed"] == 7 and load["total_output_tokens"] == 35
    assert load["p99_ttft_ms"] >= load["p50_ttft_ms"] > 0
    if Path("/proc").is_dir():
        kinds = {one["process"]: one["seconds"] for one in load["processes"]}
        assert {"engine", "api"} <= kinds.keys() and min(kinds.values()) >= 0
    assert ends["sigterm"]["exit_status"] == 0
    assert ends["sigkill_of_the_engine"]["exit_status"] == 1
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3 and "FAILED" in out[0] and "tok/s" in out[1] and "nothing is" in out[2]


def test_the_share_of_the_offline_throughput_is_known_after_both_cases() -> None:
    cases: dict[str, Any] = {"offline": {"output_throughput": 98.0}}
    server_results.add_share(cases)
    assert "share_of_throughput" not in cases["offline"]
    cases["throughput"] = {"tokens_per_second": 100.0}
    server_results.add_share(cases)
    assert cases["offline"]["share_of_throughput"] == 0.98


def test_a_command_ends_with_the_time_of_its_case(tmp_path: Path) -> None:
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    begun = time.monotonic()
    for limit in (2, 10, 50):  # a busy machine may start it too late
        with pytest.raises(TimeoutError, match=rf"longer than {limit} s \(--case-timeout\)"):
            command = [sys.executable, "-c", f"{code}; time.sleep(600)"]
            run(command, dict(os.environ), Limit(float(limit)))
        if (tmp_path / "pid").exists():
            break
    assert time.monotonic() - begun < 300
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    with pytest.raises(RuntimeError, match="exit status 3: no such thing"):
        run([sys.executable, "-c", "import sys; sys.stderr.write('no such thing'); sys.exit(3)"],
            dict(os.environ), Limit(60.0))  # fmt: skip


def test_rows_are_timed_free_beside_a_constrained_one_and_constrained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--model tiny-qwen3 --max-model-len 64 --rows 3 --tokens 7 --runs 2 {ENGINE}"
    monkeypatch.setattr(sys, "argv", ["structured_rows.py", *words.split()])
    structured_rows.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    kinds = {"free", "free_beside_free", "free_beside_one", "constrained"}
    assert found["tokens_per_second"].keys() == kinds
    assert all(len(values) == 2 and min(values) > 0 for values in found["all"].values())
