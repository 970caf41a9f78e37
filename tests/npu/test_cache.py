"""Compiled graphs are kept: a second process loads them and lowers nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanovllm.compile.lower import torchair

SCRIPT = """
import json, sys
import pytest
from nanovllm.platforms.npu import load_torch_npu
from tests.npu.ge import Ge
from tests.npu.host import Host
load_torch_npu()
ge, host = Ge(), Host()
ge.install(pytest.MonkeyPatch())
host.install(pytest.MonkeyPatch())
from nanovllm import LLM, SamplingParams
with host:
    llm = LLM("tiny-qwen3", device="npu", **json.loads(sys.argv[1]))
    answer = llm.generate("What is 2 + 2?", SamplingParams(temperature=0.0, max_tokens=8), use_tqdm=False)
folders = sorted({graph.options.get("ge.graph_compiler_cache_dir") for graph in ge.graphs})
print(json.dumps({"lowered": ge.num_lowered, "graphs": len(ge.graphs), "text": answer[0]["text"], "folders": folders,
                  "tiling": sorted({graph.options["ge.tiling_schedule_optimize"] for graph in ge.graphs})}))
"""
SIZES = {"max_num_seqs": 2, "num_kvcache_blocks": 5, "max_model_len": 128, "max_num_batched_tokens": 16}


def process(cache: Path, **options: Any) -> dict[str, Any]:
    """One engine in a process of its own; what was lowered, and what GE was given."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps({**SIZES, **options})],
        env={**os.environ, "NANOVLLM_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_second_process_lowers_nothing(tmp_path: Path) -> None:
    first = process(tmp_path)
    assert first["lowered"] == first["graphs"] == 4, first  # prefill, head, sample, decode
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("torchair/*/kernel.py")}
    assert len(kept) == 4 and all(path.stat().st_mode & 0o777 == 0o600 for path in kept)
    # GE keeps its compiled graphs in the same folders
    assert first["folders"] == sorted(str(path.parent) for path in kept)
    second = process(tmp_path)
    assert second == {**first, "lowered": 0}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    # other options are other graphs, and reach GE
    other = process(tmp_path, npu_graph_options={"experimental_config.tiling_schedule_optimize": True})
    assert other["lowered"] == 4 and (first["tiling"], other["tiling"]) == (["0"], ["1"])
    assert other["text"] == first["text"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "key" / "kernel.py"

    def broken(source: str, target: str) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        torchair.write_whole(path, "half")
    assert not path.exists()
    monkeypatch.undo()
    torchair.write_whole(path, "all of it")
    assert path.read_text() == "all of it"
