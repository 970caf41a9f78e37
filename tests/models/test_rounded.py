"""The options "fp8" and "int4": their error, and models with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm.config import EngineConfig
from nanovllm.models.formats.format import Extent
from nanovllm.models.formats.fp8 import Fp8Weight
from nanovllm.models.formats.packed_weight import PackedWeight
from nanovllm.models.formats.rounded import Rounded, rounded
from nanovllm.models.schemes import OPTIONS
from tests.conftest import save_tiny
from tests.models import harness
from tests.models.harness import engine_logits, max_difference, sequences
from tests.models.moe_cases import Case
from tests.models.test_formats import LENGTHS, TOLERANCE, is_matrix
from tests.models.test_shards import load_rank, options
from tests.models.thread_ranks import on_ranks


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("depth", "group"), [(19, 128), (99, 32), (128, 128)])
def test_clipping_never_raises_the_error(bits: int, depth: int, group: int) -> None:
    """Each group is at most as far off as if its largest magnitude were the largest code."""
    weight, half = torch.randn(9, depth) ** 3, 2 ** (bits - 1)
    code, scale = rounded("w", weight, bits, group, torch.float32)
    for start in range(0, depth, group):
        own, of_group = weight[:, start : start + group], scale[:, start // group, None]
        plain = own.abs().amax(1, keepdim=True) / (half - 0.5)
        expected = (own / plain).round().clamp(-half, half - 1) * plain - own
        value = code[:, start : start + group].float() - half
        error = value * of_group - own
        assert (error.square().sum(1) <= expected.square().sum(1) * 1.0001).all()
        # no code is farther from its number than another one
        assert torch.equal(value, (own / of_group).round().clamp(-half, half - 1))
    assert code.int().max() < 2**bits


def test_clipping_lowers_the_error_of_4_bits() -> None:
    weight = torch.randn(64, 512)
    found = Rounded().quantized("w", weight, Extent((64, 512), torch.float32)).rows(0)
    scale = weight.unflatten(1, (-1, 128)).abs().amax(-1) / 7.5
    scale = scale.repeat_interleave(128, 1)
    plain = (weight / scale).round().clamp(-8, 7) * scale
    assert (found - weight).norm() < 0.97 * (plain - weight).norm()


def test_what_is_not_finite_is_refused() -> None:
    weight = torch.full((3, 9), torch.nan)
    for scheme in (OPTIONS["fp8"], OPTIONS["int4"]):
        with pytest.raises(ValueError, match="w holds NaN or infinity"):
            scheme.linear.quantized("w", weight, Extent((3, 9), torch.float32))


# Matrices whose columns ranks share: each rank rounds its own.
CUT_BY_COLUMNS = ("o_proj.weight", "down_proj.weight")


def real(folder: Path, quantization: str, num_ranks: int = 1) -> Path:
    """A checkpoint with the numbers that the weights become."""
    weights = load_file(folder / "model.safetensors")
    stored_as = OPTIONS[quantization].linear
    is_head = lambda name: quantization != "int4" and name == "lm_head.weight"  # noqa: E731
    for name, weight in weights.items():
        if is_matrix(name) or is_head(name):
            is_cut = num_ranks > 1 and name.endswith(CUT_BY_COLUMNS)
            parts = weight.chunk(num_ranks if is_cut else 1, dim=1)
            unit = parts[0].shape[1] if is_cut else 0
            extents = [Extent(tuple(part.shape), part.dtype, column_unit=unit) for part in parts]
            found = [stored_as.quantized(name, *both) for both in zip(parts, extents)]
            weights[name] = torch.cat([one.rows(0) for one in found], 1)  # type: ignore[union-attr]
    (folder / "real").mkdir()
    save_file(weights, folder / "real" / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "real" / "config.json").write_text(json.dumps(config))
    return folder / "real"


@pytest.mark.parametrize("quantization", ["fp8", "int4"])
@pytest.mark.parametrize("has_experts", [False, True], ids=["dense", "experts"])
def test_models_have_the_logits_of_the_rounded_numbers(
    quantization: str, has_experts: bool, tmp_path: Path
) -> None:
    """Experts are in graphs."""
    how: dict[str, Any] = {"enforce_eager": True}
    if has_experts:
        folder = Case("mixtral", 4, 2, {"num_hidden_layers": 1}).save(tmp_path)
        how = {"enforce_eager": False, "graph_batch_sizes": [4]}
    else:
        folder = save_tiny(tmp_path, vocab_size=96, tie_word_embeddings=False)
    known = sequences(96, *LENGTHS)
    expected = engine_logits(
        harness.load(real(folder, quantization), "cpu", enforce_eager=True), known
    )
    runner = harness.load(folder, "cpu", quantization=quantization, **how)
    assert max_difference(engine_logits(runner, known), expected) < TOLERANCE
    layer, params = runner.params.layers[0], runner.params
    kind = Fp8Weight if quantization == "fp8" else PackedWeight
    assert isinstance(layer.experts.down_EDF if has_experts else layer.down_DF, kind)
    assert isinstance(params.head_VD, torch.Tensor) == (quantization == "int4")


@pytest.mark.parametrize(
    ("quantization", "has_experts"),
    [("int8", False), ("fp8", False), ("int4", False), ("fp8", True), ("int4", True)],
)
def test_each_of_two_ranks_rounds_its_own_part(
    quantization: str, has_experts: bool, tmp_path: Path
) -> None:
    """Shares of 56 columns; an expert is whole on one of the ranks."""
    if has_experts:
        changes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 48}
        folder = Case("mixtral", 4, 2, changes).save(tmp_path)
    else:
        folder = save_tiny(
            tmp_path, vocab_size=96, intermediate_size=112, tie_word_embeddings=False
        )
    known = sequences(96, *LENGTHS)
    exact = harness.load(real(folder, quantization, 2), "cpu", enforce_eager=True)
    expected = engine_logits(exact, known)
    config = EngineConfig.from_options(str(folder), options(2, quantization=quantization))
    for found in on_ranks(2, lambda group: engine_logits(load_rank(config, group), known)):
        assert max_difference(found, expected) < TOLERANCE
