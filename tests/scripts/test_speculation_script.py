"""The benchmark of drafts runs whole on a CPU, with a small shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.bench import speculation


def test_all_cases_run_and_are_compared_with_plain_decoding(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    speculation.main(["--tiny", "--out", str(out)])
    results = {one["case"]: one for one in json.loads(out.read_text())["results"]}
    assert list(results) == [one.name for one in speculation.CASES]
    for case in speculation.CASES:
        rows = results[case.name]["rows"]
        assert list(rows) == [str(num) for num in case.rows if num <= 8]
        assert all(one["tokens_per_second"] > 0 and one["of_plain"] > 0 for one in rows.values())
        if case.method:
            assert results[case.name]["step_ms"]["drafts"][-1] == case.num
        else:
            assert set(rows["1"]["steps_by_drafts"]) <= {"0"}


def test_a_model_is_refused_with_the_small_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--tiny", "--model", "m", "--head", "h", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        speculation.arguments(given)
    assert "leave out --model" in capsys.readouterr().err
