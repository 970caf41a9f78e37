"""The store keeps lowered graphs: a second process loads them and lowers nothing."""

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

from nanovllm import LLM, EngineConfig
from nanovllm.compile.lower import torchair
from nanovllm.compile.program import CompileRequired
from nanovllm.compile.trace import trace
from nanovllm.startup.compile_farm.builder import small_runner
from nanovllm.startup.resolve import resolve_without_weights
from tests.npu.conftest import answers
from tests.npu.ge import Ge

SCRIPT = """
import json, sys
from sitecustomize import ge
from nanovllm import LLM
from tests.npu.conftest import answers
llm = LLM(sys.argv[1], device="npu", **json.loads(sys.argv[2]))
tokens = answers(llm, max_tokens=int(sys.argv[3]))
llm.close()
folders = sorted({graph.options.get("ge.graph_compiler_cache_dir") for graph in ge.graphs})
found = {"lowered": ge.num_lowered, "graphs": len(ge.graphs)}
print(json.dumps({**found, "tokens": tokens, "folders": folders}))
"""
SMALL: dict[str, Any] = {
    "max_num_seqs": 2,
    "num_kvcache_blocks": 5,
    "max_model_len": 128,
    "max_num_batched_tokens": 16,
}


def run(command: list[str], **environment: str) -> str:
    """Output of a Python process with the patches of this one (see at_start/sitecustomize.py)."""
    paths = [str(Path(__file__).parent / "at_start"), os.environ["PYTHONPATH"]]
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def process(cache: Path, model: str, num_tokens: int = 8, **options: Any) -> dict[str, Any]:
    """Run one engine in its own process; returns what was lowered and what GE got."""
    out = run(
        ["-c", SCRIPT, model, json.dumps(options), str(num_tokens)], NANOVLLM_CACHE=str(cache)
    )
    return json.loads(out.splitlines()[-1])


def test_a_second_process_lowers_nothing(tmp_path: Path, shallow: str, ge: Ge) -> None:
    num_graphs, num_lowered = len(ge.graphs), ge.num_lowered
    llm = LLM(shallow, device="npu", compile_cache=tmp_path, **SMALL)
    tokens = answers(llm, max_tokens=8)
    llm.close()
    graphs = ge.graphs[num_graphs:]
    assert ge.num_lowered - num_lowered == len(graphs) == 4  # prefill, head, sample, decode
    # GE keeps its compiled graphs in the store, one folder for each
    folders = sorted(graph.options["ge.graph_compiler_cache_dir"] for graph in graphs)
    assert folders == sorted(str(path) for path in (tmp_path / "ge").iterdir())
    assert len(set(folders)) == 4
    second = process(tmp_path, shallow, **SMALL, compile_cache_mode="require")
    assert second == {"lowered": 0, "graphs": 4, "tokens": tokens, "folders": folders}


def test_what_precompile_leaves_is_all_that_a_start_needs(
    tmp_path: Path, shallow: str, ge: Ge
) -> None:
    options: dict[str, Any] = {"device": "npu", "compile_cache": tmp_path, **SMALL}
    resolved = resolve_without_weights(EngineConfig.from_options(shallow, options))
    runner = small_runner(resolved)
    for kind, size in resolved.spec.layout.buckets:
        runner.run_bucket(kind, size)
    runner.close()
    num_lowered = ge.num_lowered
    llm = LLM(shallow, **options, compile_cache_mode="require")
    assert ge.num_lowered == num_lowered and llm.engine.runner.compiler.num_loaded == 4
    llm.close()
    # another cache size or other options of GE make other graphs
    for change in ({"num_kvcache_blocks": 6}, {"npu_graph_options": {"ge_config.oo_level": "O1"}}):
        with pytest.raises(CompileRequired, match="program"):
            LLM(shallow, **{**options, **change}, compile_cache_mode="require")


def test_a_start_takes_what_the_script_left(tmp_path: Path, shallow: str) -> None:
    named = [f"--{name.replace('_', '-')}={size}" for name, size in SMALL.items()]
    command = [
        "scripts/precompile.py", f"--model={shallow}", "--device=npu", f"--out={tmp_path}",
        *named, "--bs", "2",
    ]  # fmt: skip
    # prefill, decode, head and sampler after a prefill
    assert f"{tmp_path}: 2 buckets, 4 programs compiled, 0 already there" in run(command)
    assert f"{tmp_path}: 2 buckets, 0 programs compiled" in run([*command, "--jobs=2"])
    elsewhere = tmp_path / "not the store"
    started = process(
        elsewhere, shallow, **SMALL, graph_batch_sizes=(2,),
        compile_cache=str(tmp_path), compile_cache_mode="require",
    )  # fmt: skip
    assert started["lowered"] == 0 and started["graphs"] == 4 and all(started["tokens"])
    assert not elsewhere.exists()


@pytest.fixture
def graph(ge: Ge) -> tuple[GraphModule, list[Tensor]]:
    x = torch.zeros(3, 8, dtype=torch.bfloat16).npu()
    traced, fakes, _ = trace(lambda x, weight: x @ weight.T, {"x": x, "weight": x})
    return traced, fakes


def test_options_reach_ge(graph: tuple[GraphModule, list[Tensor]]) -> None:
    option = "experimental_config.tiling_schedule_optimize"
    settings = [torchair.TorchairOptions(), torchair.TorchairOptions({option: True})]
    codes = [torchair.generate(*graph, one) for one in settings]
    *_, weight = graph[0].graph.find_nodes(op="placeholder")
    weight.meta["frozen"] = True
    codes.append(torchair.generate(*graph, torchair.TorchairOptions()))
    tiling = [f'local_compile_options["ge.tiling_schedule_optimize"] = "{on}"' for on in (0, 1, 0)]
    frozen = [
        f'local_compile_options["frozenInput"] = "{flags}"' for flags in ("0,0", "0,0", "0,1")
    ]
    assert all(line in code for lines in (tiling, frozen) for line, code in zip(lines, codes))


def test_a_stored_program_is_the_same_program(
    graph: tuple[GraphModule, list[Tensor]], tmp_path: Path, ge: Ge
) -> None:
    program = torchair.lower(*graph, settings=torchair.TorchairOptions(ge_cache=tmp_path))
    kind, content = program.stored()
    assert (
        kind == "torchair"
        and str(tmp_path).encode() in content
        and torchair.UNKNOWN_FOLDER.encode() not in content
    )
    num_lowered = ge.num_lowered
    loaded = torchair.load(content)
    x, weight = (torch.randn(3, 8).bfloat16().npu() for _ in range(2))
    assert torch.equal(loaded(x, weight)[0].cpu(), program(x, weight)[0].cpu())
    assert ge.num_lowered == num_lowered


def test_code_that_does_not_run_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="torchair cannot take it: ModuleNotFoundError"):
        torchair.load(b"import torchair.of_another_version")
