"""Checkpoints load exactly, or raise an error that names the problem."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from nanovllm.models import loader as weights
from nanovllm.models import registry
from nanovllm.models.dense import Layer
from nanovllm.models.loader import CheckpointError
from nanovllm.models.model import Model, Params
from tests.conftest import save_tiny

MODEL_FILE = "model.safetensors"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def described(folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    hf = AutoConfig.from_pretrained(folder)
    return registry.architecture(hf.architectures)(hf, dtype=dtype)


def load(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    progress: Callable[[int], object] = int,
) -> Params:
    return weights.load(
        described(folder, dtype), folder, weights.Target(torch.device(device)), progress
    )


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Let `edit` change the tensors of the checkpoint's only file."""
    tensors = load_file(folder / MODEL_FILE)
    edit(tensors)
    save_file(tensors, folder / MODEL_FILE)


def same(left: Params, right: Params) -> bool:
    def leaves(params: Params) -> list[Tensor | None]:
        return [
            params.embed_VD,
            params.final_norm_D,
            params.head_VD,
            *(w for layer in params.layers for w in layer),
        ]

    pairs = list(zip(leaves(left), leaves(right), strict=True))
    return all(
        a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs
    )


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny", "qwen3", tie_word_embeddings=False)


def test_tensors_arrive_where_they_belong(tmp_path: Path, device: str) -> None:
    folder = save_tiny(
        tmp_path, "llama", tie_word_embeddings=False, attention_bias=True, mlp_bias=True
    )
    stored = load_file(folder / MODEL_FILE)
    loaded: list[int] = []
    params = load(folder, device=device, progress=loaded.append)
    assert sum(loaded) == len(params.layers) == 2
    assert all(
        weight is None or weight.device.type == device
        for layer in params.layers
        for weight in layer
    )

    def stacked(layer_idx: int, *names: str) -> Tensor:
        return torch.cat([stored[f"model.layers.{layer_idx}.{name}"] for name in names])

    for layer_idx, layer in enumerate(params.layers):
        qkv, gate_up = [f"self_attn.{c}_proj" for c in "qkv"], ["mlp.gate_proj", "mlp.up_proj"]
        expected = Layer(
            attn_norm_D=stacked(layer_idx, "input_layernorm.weight"),
            qkv_ED=stacked(layer_idx, *(name + ".weight" for name in qkv)),
            qkv_bias_E=stacked(layer_idx, *(name + ".bias" for name in qkv)),
            q_norm_H=None,
            k_norm_H=None,
            out_DQ=stacked(layer_idx, "self_attn.o_proj.weight"),
            out_bias_D=stacked(layer_idx, "self_attn.o_proj.bias"),
            mlp_norm_D=stacked(layer_idx, "post_attention_layernorm.weight"),
            gate_up_GD=stacked(layer_idx, *(name + ".weight" for name in gate_up)),
            gate_up_bias_G=stacked(layer_idx, *(name + ".bias" for name in gate_up)),
            down_DF=stacked(layer_idx, "mlp.down_proj.weight"),
            down_bias_D=stacked(layer_idx, "mlp.down_proj.bias"),
        )
        for name, weight, wanted in zip(Layer._fields, layer, expected, strict=True):
            assert (weight is None) == (wanted is None), name
            assert weight is None or torch.equal(weight.cpu(), wanted), name
    assert torch.equal(params.embed_VD.cpu(), stored["model.embed_tokens.weight"])
    assert torch.equal(params.final_norm_D.cpu(), stored["model.norm.weight"])
    assert torch.equal(params.head_VD.cpu(), stored["lm_head.weight"])


@pytest.mark.parametrize("wanted", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_any_float_dtype_loads_into_the_one_asked_for(
    stored: str, wanted: str, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path, "qwen2", dtype=stored)
    tensors = load_file(folder / MODEL_FILE)
    assert {tensor.dtype for tensor in tensors.values()} == {DTYPES[stored]}
    params = load(folder, DTYPES[wanted])
    assert {w.dtype for layer in params.layers for w in layer if w is not None} == {DTYPES[wanted]}
    assert torch.equal(params.embed_VD, tensors["model.embed_tokens.weight"].to(DTYPES[wanted]))
    assert torch.equal(
        params.layers[1].out_DQ,
        tensors["model.layers.1.self_attn.o_proj.weight"].to(DTYPES[wanted]),
    )


def test_shards_with_an_index_give_the_same_parameters(tiny: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert same(load(sharded), load(tiny))


def test_files_without_an_index_are_read_together(tiny: Path) -> None:
    expected = load(tiny)
    tensors = load_file(tiny / MODEL_FILE)
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:5]}, tiny / "a.safetensors")
    save_file({name: tensors[name] for name in names[5:]}, tiny / "b.safetensors")
    (tiny / MODEL_FILE).unlink()
    assert same(load(tiny), expected)


def test_other_files_beside_the_model_s_are_not_read(tiny: Path) -> None:
    """Some repositories contain the same weights a second time under other names."""
    expected = load(tiny)
    save_file({"layers.0.attention.wq.weight": torch.ones(2)}, tiny / "consolidated.safetensors")
    assert same(load(tiny), expected)


def test_tied_embeddings_are_one_tensor_even_if_the_head_is_stored(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama", tie_word_embeddings=True)
    stored = load_file(folder / MODEL_FILE)
    assert "lm_head.weight" not in stored
    expected = load(folder)
    assert expected.head_VD is expected.embed_VD
    head = stored["model.embed_tokens.weight"].clone()
    change(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    assert not weights.has_own_head(folder, torch.float32)
    params = load(folder)
    assert params.head_VD is params.embed_VD
    assert same(params, expected)


@pytest.mark.parametrize("row", [0, 98, 99, 511])
def test_a_head_of_its_own_is_seen_in_any_row(
    row: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "ROWS_AT_ONCE", 99)
    folder = save_tiny(tmp_path, "llama", tie_word_embeddings=True)
    head = load_file(folder / MODEL_FILE)["model.embed_tokens.weight"].clone()
    head[row, 3] += 1e-3
    change(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    assert weights.has_own_head(folder, torch.float32)


def test_a_head_that_is_equal_in_the_model_s_dtype_is_tied(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama", tie_word_embeddings=True)
    head = load_file(folder / MODEL_FILE)["model.embed_tokens.weight"].bfloat16()
    change(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    assert not weights.has_own_head(folder, torch.bfloat16)
    assert weights.has_own_head(folder, torch.float32)


def test_a_folder_without_weights_has_no_head_of_its_own(tmp_path: Path) -> None:
    assert not weights.has_own_head(tmp_path, torch.float32)


def test_buffers_of_old_checkpoints_are_passed_over(tiny: Path) -> None:
    expected = load(tiny)
    change(
        tiny,
        lambda tensors: tensors.update(
            {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
        ),
    )
    assert same(load(tiny), expected)


@pytest.mark.parametrize(
    "name",
    ["q_scale", "kv_scale", "k_scale", "k_proj.k_scale", "v_proj.v_scale", "k_proj.output_scale"],
)
def test_scales_of_an_8_bit_cache_are_passed_over(name: str, tiny: Path) -> None:
    expected = load(tiny)
    scale = {f"model.layers.0.self_attn.{name}": torch.ones(1)}
    change(tiny, lambda tensors: tensors.update(scale))
    assert same(load(tiny), expected)


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.1.self_attn.v_proj.weight",
        "model.layers.0.self_attn.q_norm.weight",
    ],
)
def test_a_missing_tensor_is_named(name: str, tiny: Path) -> None:
    change(tiny, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"tensor {name} is missing"):
        load(tiny)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_proj.weight_scale",
        "transformer.wte.weight",
    ],
)
def test_a_tensor_left_over_is_named(name: str, tiny: Path) -> None:
    change(tiny, lambda tensors: tensors.update({name: torch.ones(3)}))
    with pytest.raises(
        CheckpointError, match=rf"1 tensor\(s\) that Qwen3ForCausalLM does not have, e\.g\. {name}"
    ):
        load(tiny)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.self_attn.k_proj.weight", [64, 64]),
        ("model.layers.1.mlp.down_proj.weight", [64, 128]),
        ("model.norm.weight", [64]),
        ("lm_head.weight", [512, 64]),
    ],
)
def test_a_misshapen_tensor_is_named_with_both_shapes(
    name: str, shape: list[int], tiny: Path
) -> None:
    def widen(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.ones(shape[0] + 1, *shape[1:])

    change(tiny, widen)
    with pytest.raises(CheckpointError) as caught:
        load(tiny)
    assert name in str(caught.value)
    assert str([shape[0] + 1, *shape[1:]]) in str(caught.value)
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize(
    "stored", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2]
)
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_a_quantized_tensor_is_named_with_its_dtype(
    name: str, stored: torch.dtype, tiny: Path
) -> None:
    change(tiny, lambda tensors: tensors.update({name: tensors[name].to(stored)}))
    spelled = str(stored).removeprefix("torch.")
    with pytest.raises(CheckpointError, match=f"tensor {name} is stored as {spelled}: it is quant"):
        load(tiny)


def test_one_number_is_not_spread_over_a_tensor(tiny: Path) -> None:
    change(tiny, lambda tensors: tensors.update({"model.norm.weight": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[1\]"):
        load(tiny)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage"])
def test_a_damaged_file_is_named(damage: str, sharded: bool, tiny: Path, tmp_path: Path) -> None:
    folder = tiny
    if sharded:
        folder = tmp_path / "sharded"
        AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(folder, max_shard_size="100KB")
    path = max(folder.glob("*.safetensors"))
    content = path.read_bytes()
    path.write_bytes(
        {"truncated": content[:-100], "empty": b"", "garbage": b"\xff" * len(content)}[damage]
    )
    with pytest.raises(CheckpointError, match=path.name):
        load(folder)


def test_a_folder_without_safetensors_is_refused(tiny: Path) -> None:
    torch.save(load_file(tiny / MODEL_FILE), tiny / "pytorch_model.bin")
    (tiny / MODEL_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        load(tiny)


@pytest.fixture
def indexed(tiny: Path) -> tuple[Path, dict[str, str]]:
    """A checkpoint of one shard without the index, and the map that the index should have."""
    (tiny / MODEL_FILE).rename(tiny / "shard.safetensors")
    return tiny, dict.fromkeys(load_file(tiny / "shard.safetensors"), "shard.safetensors")


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_shard_that_is_not_there_is_named(indexed: tuple[Path, dict[str, str]]) -> None:
    folder, weight_map = indexed
    write_index(folder, weight_map)
    load(folder)
    write_index(folder, {**weight_map, "model.norm.weight": "model-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"model-00002\.safetensors, which does not exist"):
        load(folder)


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/outside.safetensors", "sub/outside.safetensors",
     "..\\outside.safetensors", "C:outside.safetensors", "shard.bin", ".."],
)  # fmt: skip
def test_an_index_names_only_files_beside_it(
    name: str, indexed: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder, weight_map = indexed
    shutil.copy(folder / "shard.safetensors", folder.parent / "outside.safetensors")
    write_index(folder, {**weight_map, "model.norm.weight": name})
    with pytest.raises(CheckpointError, match=re.escape(repr(name))):
        load(folder)


def test_a_tensor_that_is_not_in_its_shard_is_named(indexed: tuple[Path, dict[str, str]]) -> None:
    folder, weight_map = indexed
    write_index(folder, weight_map)
    tensors = load_file(folder / "shard.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "shard.safetensors")
    with pytest.raises(
        CheckpointError, match=r"shard\.safetensors: tensor model\.norm\.weight cannot be read"
    ):
        load(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "{}", "[]", '{"weight_map": []}', '{"weight_map": null}', '{"weight_map": {"a": 1}}'],
)
def test_an_unreadable_index_is_named(text: str, indexed: tuple[Path, dict[str, str]]) -> None:
    (indexed[0] / "model.safetensors.index.json").write_text(text)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors\.index\.json: not a readable index"
    ):
        load(indexed[0])


# Random weights -----------------------------------------------------------------------------------


def test_random_weights_depend_on_the_seed_alone(tiny: Path, device: str) -> None:
    model = described(tiny)
    first, again, other = (
        weights.random(model, weights.Target(torch.device(device)), seed, int) for seed in (0, 0, 1)
    )
    assert same(first, again)
    assert not same(first, other)
    assert not torch.equal(first.layers[0].qkv_ED, first.layers[1].qkv_ED)


def test_random_weights_have_the_shapes_of_a_checkpoint(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama", attention_bias=True)
    model = described(folder, torch.bfloat16)
    drawn, loaded = (
        weights.random(model, weights.Target(torch.device("cpu")), 0, int),
        load(folder, torch.bfloat16),
    )
    assert drawn.head_VD is drawn.embed_VD
    for ours, theirs in zip(drawn.layers[1], loaded.layers[1], strict=True):
        assert (ours is None) == (theirs is None)
        assert (
            ours is None
            or theirs is None
            or (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        )
    layer = drawn.layers[0]
    assert layer.qkv_ED.float().std().item() == pytest.approx(weights.RANDOM_STD, rel=0.1)
    assert layer.attn_norm_D.eq(1).all()
    assert layer.qkv_bias_E is not None and layer.qkv_bias_E.eq(0).all()
