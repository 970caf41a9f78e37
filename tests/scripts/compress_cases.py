"""A tiny Mixtral for the scripts that compress experts, its calibration data, and how they run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# scripts are run as files, and import each other as such
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import collect_moe_calib
import distill_experts_activation_aware as distill_experts

from tests.conftest import save_tiny
from tests.engines import VOCAB_SIZE, save_tokenizer

NUM_EXPERTS, TOP_K, HIDDEN, SIZE, NUM_LAYERS = 5, 2, 48, 40, 3
CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny Mixtral with a tokenizer."""
    folder = save_tiny(
        tmp_path / "model", "mixtral", vocab_size=VOCAB_SIZE, hidden_size=HIDDEN,
        intermediate_size=SIZE, num_hidden_layers=NUM_LAYERS, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K,
    )  # fmt: skip
    save_tokenizer(folder)
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run the main function of a script with arguments."""

    def run(main: Callable[[], object], *arguments: object) -> None:
        monkeypatch.setattr("sys.argv", ["script", *map(str, arguments)])
        main()
        monkeypatch.setenv("NANOVLLM_DISABLE_SVD", "0")  # a script sets it for its process

    return run


@pytest.fixture
def calibration(model: Path, run: Callable[..., None], tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "calib.safetensors"
    run(
        collect_moe_calib.main, "--model-path", model, "--out", path, "--cap-per-group", 199,
        "--num-prompts", 19, "--max-new-tokens", 5, "--temperature", 0.7, "--device", "cpu",
    )  # fmt: skip
    return path


def distill(run: Callable[..., None], model: Path, calibration: Path, *more: object) -> None:
    run(
        distill_experts.main, "--model-path", model, "--calib-path", calibration, "--device", "cpu",
        *more,
    )  # fmt: skip
