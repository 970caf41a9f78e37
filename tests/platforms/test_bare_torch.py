"""Everything imports and the CPU and MPS policies run without Triton, flash-attn and torch_npu."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ABSENT = ("triton", "flash_attn", "torch_npu")

SCRIPT = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import torch
from nanovllm import LLM, SamplingParams, platforms
from nanovllm.platforms.mps import MpsPlatform

torch.set_num_threads(1)
if {mps}:
    platforms.select = lambda device, **_: MpsPlatform(torch.device("cpu"))
params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
sizes = dict(max_model_len=64, max_num_seqs=2, max_num_batched_tokens=32)
llm = LLM({model!r}, device="mps" if {mps} else "cpu", dtype="float32", **sizes)
outputs = llm.generate([[5, 6, 7], [8] * 19], params, use_tqdm=False)
assert not [name for name in {absent!r} if name in sys.modules]
print(json.dumps({{
    "tokens": [output["token_ids"] for output in outputs],
    "distributed": torch.distributed.is_available() and torch.distributed.is_initialized(),
    "eager": llm.engine.runner.compiler.lowering is None,
    "kernels": "nanovllm.kernels.cpu.library" in sys.modules,
}}))
"""


@pytest.fixture(scope="module")
def runs(tiny_qwen3: Path) -> dict[bool, dict[str, object]]:
    """Output of a CPU engine (False) and of the MPS policy (True)."""
    found: dict[bool, dict[str, object]] = {}
    for is_mps in (False, True):
        script = SCRIPT.format(absent=ABSENT, mps=is_mps, model=str(tiny_qwen3))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found[is_mps] = json.loads(done.stdout)
    return found


def test_the_cpu_runs_graphs_and_mps_runs_eagerly_without_any_of_them(
    runs: dict[bool, dict[str, object]],
) -> None:
    assert runs[False]["eager"] is False and runs[True]["eager"] is True
    assert runs[False]["kernels"] is True and runs[True]["kernels"] is False
    assert runs[True]["tokens"] == runs[False]["tokens"]
    assert not any(run["distributed"] for run in runs.values())
