"""Compiled graphs are kept: a second process loads them and lowers nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from nanovllm.compile.lower import torchair
from nanovllm.compile.trace import trace
from tests.npu.ge import Ge

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
print(json.dumps({"lowered": ge.num_lowered, "graphs": len(ge.graphs), "text": answer[0]["text"], "folders": folders}))
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


@pytest.fixture
def graph(ge: Ge) -> tuple[GraphModule, list[Tensor]]:
    x = torch.zeros(3, 8, dtype=torch.bfloat16).npu()
    traced, fakes, _ = trace(lambda x, weight: x @ weight.T, {"x": x, "weight": x})
    return traced, fakes


def test_options_are_in_the_key_and_reach_ge(graph: tuple[GraphModule, list[Tensor]]) -> None:
    option = "experimental_config.tiling_schedule_optimize"
    settings = [torchair.Settings(), torchair.Settings({option: True}), torchair.Settings(frozen=("weight",))]
    assert len({torchair.cache_key(graph[0], one) for one in settings}) == 3
    codes = [torchair.generate(*graph, one) for one in settings]
    tiling = [f'local_compile_options["ge.tiling_schedule_optimize"] = "{on}"' for on in (0, 1, 0)]
    frozen = [f'local_compile_options["frozenInput"] = "{flags}"' for flags in ("0,0", "0,0", "0,1")]
    assert all(line in code for lines in (tiling, frozen) for line, code in zip(lines, codes))


def test_shapes_dtypes_and_constants_are_in_the_key(ge: Ge) -> None:
    def key(x: Tensor, factor: float) -> str:
        graph, _, _ = trace(lambda x: x * factor, {"x": x.npu()})
        return torchair.cache_key(graph, torchair.Settings())

    x = torch.zeros(3, 8)
    variants = [(x, 2.0), (x, 3.0), (x[:2], 2.0), (x.half(), 2.0), (torch.zeros(8, 3).T, 2.0)]
    assert len({key(*variant) for variant in variants}) == len(variants)
    assert key(x, 2.0) == key(torch.ones(3, 8), 2.0)


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
