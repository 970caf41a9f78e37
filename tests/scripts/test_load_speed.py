"""Random checkpoints for benchmarks are whole, and reading them is measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from nanovllm.models import loader, registry
from nanovllm.tools.shapes import CONFIGS
from scripts.bench import load_speed
from scripts.bench.random_checkpoint import write_checkpoint

SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 99,
}  # fmt: skip
MIXTRAL = {**CONFIGS["Mixtral-8x7B"], **SMALL}
QWEN3_MOE = {**CONFIGS["Qwen3-30B-A3B"], **SMALL, "moe_intermediate_size": 24,
             "mlp_only_layers": [1], "num_experts": 16}  # fmt: skip


@pytest.mark.parametrize("stacks_experts", [False, True])
@pytest.mark.parametrize("config", [MIXTRAL, QWEN3_MOE, {**CONFIGS["Qwen3-0.6B"], **SMALL}])
def test_a_random_checkpoint_has_every_tensor_and_no_other(
    config: dict[str, Any], stacks_experts: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    write_checkpoint(folder, config, 0, 40_000, stacks_experts=stacks_experts)
    assert len(list(folder.glob("*.safetensors"))) > 2
    hf = AutoConfig.from_pretrained(folder)
    model = registry.architecture(hf.architectures)(hf, dtype=torch.bfloat16)
    params = loader.load(model, folder, loader.Target(torch.device("cpu")), int)
    for layer, kind in zip(params.layers, model.layer_kinds):
        drawn = layer.experts.gate_up_EGD.flatten(0, 1) if kind.sparse else layer.gate_up_GD
        assert drawn.float().std().item() == pytest.approx(0.02, rel=0.1)
        assert not torch.equal(drawn[0], drawn[1])


def test_each_run_is_a_line_with_its_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(CONFIGS, "Mixtral-8x7B", MIXTRAL)
    options = f"--shape Mixtral-8x7B --layers 2 --runs 2 --device cpu --folder {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["load_speed.py", *options.split(), "--shard-gb", "1e-4"])
    load_speed.main(load_speed.arguments())
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2 and all(line["seconds"] > 0 for line in lines)
    assert lines[0]["layers"] == 2 and lines[0]["files"] > 1
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_each_rank_reads_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capfd: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setitem(CONFIGS, "Qwen3-0.6B", {**CONFIGS["Qwen3-0.6B"], **SMALL})
    options = f"--shape Qwen3-0.6B --ranks 2 --runs 1 --device cpu --folder {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["load_speed.py", *options.split()])
    load_speed.main(load_speed.arguments())
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert sorted(line["rank"] for line in lines) == [0, 1]
