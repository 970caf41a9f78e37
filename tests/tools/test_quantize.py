"""`nanovllm quantize`: the engine, transformers and compressed-tensors read what it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.quantizers import quantizer_finegrained_fp8

from nanovllm.cli.main import run
from nanovllm.models.formats.fp8 import Fp8Weight
from nanovllm.models.formats.packed_weight import PackedWeight
from nanovllm.tools import quantize, quantize_source
from tests.conftest import save_tiny
from tests.models import gpt_oss_cases, harness
from tests.models.harness import engine_logits, max_difference, sequences, transformers_logits
from tests.models.moe_cases import Case
from tests.models.routes import edit
from tests.models.test_formats import LENGTHS, TOLERANCE
from tests.models.test_vision_experts import DOWN, GATE_UP, turned
from tests.models.test_vision_text import saved

SIZES: Any = {"vocab_size": 99, "hidden_size": 128, "intermediate_size": 256}
COMPRESSED = ("w4a16", "w8a16", "int8")


def quantized(folder: Path, name: str) -> Path:
    out = folder / name
    assert run("quantize", [str(folder), "--format", name, "-o", str(out), "--quiet"]) is None
    return out


def real(folder: Path) -> dict[str, Tensor]:
    """The numbers of a quantized checkpoint: by compressed-tensors, or by the formula of fp8."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    weights, found = load_file(folder / "model.safetensors"), {}
    by_module: dict[str, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        module, _, end = name.rpartition(".")
        by_module.setdefault(module, {})[end] = weight
    for module, state in by_module.items():
        if "weight_scale_inv" in state:
            scale = state["weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            rows, columns = state["weight"].shape
            found[f"{module}.weight"] = state["weight"].float() * scale[:rows, :columns]
        elif "weight_scale" in state:
            scheme = QuantizationScheme(**config["config_groups"]["group_0"])
            compressor = BaseCompressor.get_value_from_registry(config["format"])
            found[f"{module}.weight"] = compressor.decompress(state, scheme)["weight"]
        else:
            found |= {f"{module}.{end}": weight for end, weight in state.items()}
    return found


def saved_real(folder: Path) -> Path:
    target = folder / "real"
    target.mkdir()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    tensors = {name: weight.contiguous() for name, weight in real(folder).items()}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("name", [*COMPRESSED, "fp8"])
def test_the_engine_has_the_logits_of_the_stored_numbers(name: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path, tie_word_embeddings=False, **SIZES)
    (tmp_path / "generation_config.json").write_text('{"top_k": 3}')
    folder, known = quantized(source, name), sequences(99, *LENGTHS)
    runner = harness.load(folder, "cpu", enforce_eager=True)
    kind = Fp8Weight if name == "fp8" else PackedWeight
    assert isinstance(runner.params.layers[0].down_DF, kind)
    assert isinstance(runner.params.head_VD, Tensor)
    expected = engine_logits(harness.load(saved_real(folder), "cpu", enforce_eager=True), known)
    assert max_difference(engine_logits(runner, known), expected) < TOLERANCE
    assert (folder / "generation_config.json").read_text() == '{"top_k": 3}'
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [name]


@pytest.mark.parametrize("name", ["w4a16", "w8a16", "fp8"])
def test_transformers_has_the_same_logits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With int8 it quantizes inputs. For fp8 it wants accelerate, which it does not use on a CPU:
    there it dequantizes."""
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    folder, known = quantized(save_tiny(tmp_path, **SIZES), name), sequences(99, *LENGTHS)
    ours = engine_logits(harness.load(folder, "cpu", enforce_eager=True), known)
    assert max_difference(ours, transformers_logits(folder, known, "cpu")) < TOLERANCE


@pytest.mark.parametrize(("name", "bound"), [("fp8", 0.04), ("w8a16", 0.02), ("w4a16", 0.2)])
def test_numbers_are_near_those_of_the_source(name: str, bound: float, tmp_path: Path) -> None:
    source = save_tiny(tmp_path, **SIZES)
    weights, found = load_file(source / "model.safetensors"), real(quantized(source, name))
    assert weights.keys() == found.keys()
    for key, weight in weights.items():
        error = (found[key] - weight).norm() / weight.norm()
        is_matrix = "_proj" in key
        assert 0 < error < bound if is_matrix else torch.equal(found[key], weight)


def test_experts_in_one_tensor_are_written_one_by_one(tmp_path: Path) -> None:
    """As other engines read them; the router stays as it is."""
    changes = {"num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    source = Case("mixtral", 4, 2, changes, stacked=True).save(tmp_path)
    folder, known = quantized(source, "w4a16"), sequences(96, *LENGTHS)
    names = load_file(folder / "model.safetensors")
    assert any(name.endswith("experts.3.w3.weight_packed") for name in names)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert any(name.endswith("gate") for name in config["ignore"])
    runner = harness.load(folder, "cpu", enforce_eager=True)
    assert isinstance(runner.params.layers[0].experts.down_EDF, PackedWeight)
    expected = engine_logits(harness.load(saved_real(folder), "cpu", enforce_eager=True), known)
    assert max_difference(engine_logits(runner, known), expected) < TOLERANCE


def test_transposed_experts_are_written_as_others_are(tmp_path: Path) -> None:
    """The release of Qwen3-VL with experts has transposed matrices: the numbers are the same."""
    saved("qwen3_moe", tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "turned")
    edit(tmp_path / "turned", turned(GATE_UP, DOWN))
    plain, other = (load_file(quantized(tmp_path / name, "w8a16") / "model.safetensors")
                    for name in ("plain", "turned"))  # fmt: skip
    assert plain.keys() == other.keys()
    assert all(torch.equal(plain[name], other[name]) for name in plain)
    assert any(name.endswith("experts.4.down_proj.weight_packed") for name in plain)
    harness.load(tmp_path / "turned" / "w8a16", "cpu", enforce_eager=True, skip_tokenizer_init=True)


def test_experts_without_names_of_their_own_are_refused(tmp_path: Path) -> None:
    source = quantize_source.read_source(gpt_oss_cases.save(tmp_path))
    with pytest.raises(ValueError, match=r"mlp\.experts\.\w+_proj .* is not supported"):
        quantize.write(source, "fp8", tmp_path / "out", int)
    assert not (tmp_path / "out.partial").exists()


def in_files(folder: Path) -> Path:
    """The same checkpoint in two files with an index."""
    path = folder / "model.safetensors"
    weights = sorted(load_file(path).items())
    path.unlink()
    parts = {"model-1.safetensors": weights[::2], "model-2.safetensors": weights[1::2]}
    for name, part in parts.items():
        save_file(dict(part), folder / name, {"format": "pt"})
    weight_map = {key: name for name, part in parts.items() for key, _ in part}
    (folder / quantize.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_an_interrupted_run_goes_on_after_the_last_whole_file(tmp_path: Path) -> None:
    source = quantize_source.read_source(in_files(save_tiny(tmp_path / "source", **SIZES)))
    target, work = tmp_path / "out", tmp_path / "out.partial"

    def stop(num_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize.write(source, "fp8", target, stop)
    first = work / "model-1.safetensors"
    before = first.stat().st_ino, first.stat().st_mtime_ns
    assert not target.exists() and not (work / "model-2.safetensors").exists()
    done: list[int] = []
    quantize.write(source, "fp8", target, done.append)
    found = (target / "model-1.safetensors").stat()
    assert (found.st_ino, found.st_mtime_ns) == before
    assert sum(done) == quantize_source.total_bytes(source) and not work.exists()
    index = json.loads((target / quantize.INDEX).read_text())["weight_map"]
    assert {*index.values()} == {"model-1.safetensors", "model-2.safetensors"}
    harness.load(target, "cpu", enforce_eager=True)


def test_what_is_left_of_another_format_is_not_used(tmp_path: Path) -> None:
    source = quantize_source.read_source(save_tiny(tmp_path / "source", **SIZES))
    target = tmp_path / "out"

    def stop(num_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize.write(source, "fp8", target, stop)
    quantize.write(source, "w8a16", target, int)
    names = load_file(target / "model.safetensors")
    assert not [name for name in names if name.endswith("_scale_inv")]


def test_what_cannot_be_quantized_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "a", **{**SIZES, "intermediate_size": 96})
    source, target = quantize_source.read_source(folder), tmp_path / "out"
    with pytest.raises(ValueError, match=r"down_proj.* its 96 inputs are no multiple of 128"):
        quantize.write(source, "w4a16", target, int)
    assert not target.exists() and not (tmp_path / "out.partial").exists()
    quantize.write(source, "w8a16", target, int)
    with pytest.raises(ValueError, match="out exists: choose another folder"):
        quantize.write(source, "fp8", target, int)
    with pytest.raises(ValueError, match=r"is quantized already .*compressed-tensors"):
        quantize_source.read_source(target)
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "mine").touch()
    with pytest.raises(ValueError, match="is not of nanovllm quantize: remove it"):
        quantize.write(source, "fp8", tmp_path / "other", int)
