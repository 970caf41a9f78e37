"""A checkpoint whose config.json has no dtype, as gpt-oss's, gets the one of its weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nanovllm import EngineConfig
from nanovllm.models.checkpoint import CheckpointError
from nanovllm.platforms import cpu
from nanovllm.startup.resolve import resolve_without_weights
from nanovllm.startup.stored_dtype import stored_dtype
from tests.conftest import save_tiny

TABLE = "model.embed_tokens.weight"


def saved(folder: Path, **tensors: Tensor) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder


def zeros(num: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(num, dtype=dtype)


def test_the_table_decides_and_else_most_numbers(tmp_path: Path) -> None:
    assert stored_dtype(tmp_path) is None
    scales = {"scales": zeros(64, torch.float32), "code": zeros(512, torch.uint8)}
    norms = {"norm": zeros(8, torch.bfloat16), "other norm": zeros(8, torch.bfloat16)}
    assert stored_dtype(saved(tmp_path, **scales, **norms)) is torch.float32
    table = {f"language_model.{TABLE}": zeros(4, torch.float16)}  # of a model with a tower
    assert stored_dtype(saved(tmp_path, **scales, **table)) is torch.float16
    packed = {TABLE: zeros(4, torch.uint8)}
    assert stored_dtype(saved(tmp_path, **packed, **norms)) is torch.bfloat16
    assert stored_dtype(saved(tmp_path, **packed)) is None
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="damaged"):
        stored_dtype(tmp_path)


@pytest.mark.parametrize("has_weights", [True, False])
def test_a_device_that_takes_the_checkpoints_dtype_takes_that_of_weights(
    has_weights: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """As GPUs do. Without weights it is float32, with a warning."""
    monkeypatch.setattr(cpu, "TRAITS", replace(cpu.TRAITS, auto_dtype=None))
    folder = save_tiny(tmp_path / "tiny", dtype="bfloat16")
    fields = json.loads((folder / "config.json").read_text())
    del fields["dtype"]
    (folder / "config.json").write_text(json.dumps(fields))
    if not has_weights:
        (folder / "model.safetensors").unlink()
    for _ in range(2):  # the second config is the store's copy
        config = EngineConfig(str(folder), device="cpu", compile_cache=tmp_path / "store")
        found = resolve_without_weights(config).model.config.dtype
        assert found is (torch.bfloat16 if has_weights else torch.float32)
    assert ("names no dtype: it runs in float32" in caplog.text) is not has_weights
