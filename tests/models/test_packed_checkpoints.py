"""compressed-tensors, MXFP4 and bitsandbytes give the logits of the numbers that they stand for."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from nanovllm.models import loader
from nanovllm.models.checkpoint import CheckpointError
from nanovllm.models.formats.fp8 import Fp8Weight
from nanovllm.models.formats.mixed import Mixed
from nanovllm.models.formats.packed_weight import PackedWeight
from nanovllm.models.loader import Target
from nanovllm.models.param import Param
from nanovllm.models.quant_methods import of_checkpoint
from tests.conftest import save_tiny
from tests.models import int4_format
from tests.models.moe_cases import Case
from tests.models.packers import (
    Compressed,
    bnb4,
    bnb8,
    mxfp4,
    nvfp4_of_modelopt,
    of_groups,
    with_g_idx,
)
from tests.models.test_formats import is_matrix, model_of
from tests.models.test_quantized_checkpoints import Kind, check, check_ranks, pack
from tests.models.test_quantized_checkpoints import plain_device as plain_device


def ints(bits: int, strategy: str, *, symmetric: bool = True, group: int | None = None) -> Any:
    found = {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric}
    return {**found, "group_size": group} if group is not None else found


def floats(bits: int, strategy: str, group: int | None = None) -> Any:
    found = {"num_bits": bits, "type": "float", "strategy": strategy, "symmetric": True}
    return {**found, "group_size": group} if group is not None else found


def compressed(name: str, stored: str, weights: dict[str, Any]) -> Kind:
    packer = Compressed(stored, weights)
    return Kind(name, packer, packer.config)


def modelopt(algorithm: str | None, **more: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"], **more}


PACKED, INT8 = "pack-quantized", "int-quantized"
ORDERED = of_groups(
    {"g": {"targets": ["Linear"], "weights": {**ints(4, "group", group=32), "actorder": "group"}}},
    PACKED,
)
BNB = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": ["lm_head"]}
NF4 = {**BNB, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
KINDS = [
    compressed("w4 groups", PACKED, ints(4, "group", group=32)),
    compressed("w4 groups, zeros", PACKED, ints(4, "group", group=32, symmetric=False)),
    compressed("w4 channels, zeros", PACKED, ints(4, "channel", symmetric=False)),
    compressed("w8 groups", PACKED, ints(8, "group", group=32)),
    Kind("w4 ordered", partial(with_g_idx, group=32), ORDERED),
    compressed("int8 channels", INT8, ints(8, "channel")),
    compressed("int8 tensors, zeros", "naive-quantized", ints(8, "tensor", symmetric=False)),
    compressed("nvfp4", "nvfp4-pack-quantized", floats(4, "tensor_group", 16)),
    Kind("nvfp4 of modelopt", nvfp4_of_modelopt, modelopt("NVFP4")),
    compressed("mxfp4", "mxfp4-pack-quantized", floats(4, "group", 32)),
    Kind("bnb nf4", partial(bnb4, kind="nf4", nested=True),
         {**NF4, "bnb_4bit_use_double_quant": True}),
    Kind("bnb fp4", partial(bnb4, kind="fp4", nested=False), {**NF4, "bnb_4bit_quant_type": "fp4"}),
    Kind("bnb int8", bnb8, {**BNB, "load_in_8bit": True}),
]  # fmt: skip
BY_NAME = {str(kind): kind for kind in KINDS}
# On two ranks blocks of 64 are cut, elsewhere of 32; nf4 has several blocks of 256 scales.
WIDTHS = {"bnb nf4": 448, "bnb fp4": 192}


def saved(kind: Kind, folder: Path, **changes: Any) -> Path:
    width = WIDTHS.get(str(kind), 96)
    return pack(kind, save_tiny(folder, vocab_size=99, intermediate_size=width, **changes))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_dense_models_alone_and_on_two_ranks(kind: Kind, tmp_path: Path) -> None:
    folder = saved(kind, tmp_path)
    params = check(folder, 99)
    assert isinstance(params.layers[0].down_DF, PackedWeight)
    check_ranks(folder, 2, 99)


@pytest.mark.usefixtures("plain_device")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_devices_without_products_dequantize(kind: Kind, tmp_path: Path) -> None:
    params = check(saved(kind, tmp_path), 99)
    assert {type(one) for layer in params.layers for one in layer} <= {torch.Tensor, type(None)}


@pytest.mark.parametrize(
    "name",
    [
        "w4 groups, zeros",
        "w4 ordered",
        "int8 channels",
        "int8 tensors, zeros",
        "nvfp4",
        "nvfp4 of modelopt",
        "bnb nf4",
        "bnb fp4",
        "mxfp4",
        "bnb int8",
    ],
)
def test_experts_alone_and_on_two_ranks(name: str, tmp_path: Path) -> None:
    width = WIDTHS.get(name, 96)
    changes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": width}
    folder = pack(BY_NAME[name], Case("mixtral", 4, 2, changes).save(tmp_path))
    check(folder, 96)
    check_ranks(folder, 2, 96)


def test_four_ranks_that_cut_words_of_zeros(tmp_path: Path) -> None:
    """The rows of a rank's part of the MLP, 21, are no multiple of 8."""
    changes = {"num_key_value_heads": 4, "num_hidden_layers": 1, "intermediate_size": 84}
    saved = save_tiny(tmp_path, vocab_size=99, **changes)
    check_ranks(pack(BY_NAME["w4 channels, zeros"], saved), 4, 99)


@pytest.mark.parametrize(
    "name",
    [
        "nvfp4",
        "nvfp4 of modelopt",
        "mxfp4",
        "w4 groups, zeros",
        "int8 channels",
        "int8 tensors, zeros",
        "bnb nf4",
        "bnb fp4",
        "bnb int8",
    ],
)
def test_graphs(name: str, tmp_path: Path) -> None:
    """With tables of levels, zeros, and 8 bits; `test_quantized_checkpoints` has an order."""
    folder = saved(BY_NAME[name], tmp_path, num_hidden_layers=1)
    check(folder, 99, enforce_eager=False, graph_batch_sizes=[4])


def test_the_status_of_older_versions(tmp_path: Path) -> None:
    folder = pack(BY_NAME["w4 groups"], save_tiny(tmp_path), quantization_status="frozen")
    assert isinstance(check(folder, 512).layers[0].down_DF, PackedWeight)


@pytest.mark.parametrize(
    ("name", "is_packed"),
    [
        ("model.layers.0.self_attn.q_proj", False),
        ("model.layers.10.self_attn.q_proj", True),
        ("model.layers.0.mlp.up_proj", True),
        ("model.layers.10.mlp.shared_expert.up_proj", False),
        ("model.layers.1.mlp.up_proj", False),
    ],
)
def test_globs_of_modelopt_name_plain_modules(name: str, is_packed: bool) -> None:
    """In config.json, where the spelling may be that of a checkpoint with towers, and in the file
    of older exports."""
    globs = ["model.layers.0.self_attn*", "*.mlp.shared_expert.*", "lm_head",
             "language_model.model.layers.1.*"]  # fmt: skip
    older = {"quantization": {"quant_algo": "W4A16_NVFP4", "exclude_modules": globs}}
    for config in (modelopt("NVFP4", ignore=globs), {"quant_method": "modelopt", **older}):
        scheme = of_checkpoint(PretrainedConfig(quantization_config=config))
        (part,) = scheme.parts(Param.one("linear", f"{name}.weight", 64, 64))
        assert part.format.is_packed == is_packed


@pytest.mark.parametrize("algorithm", ["NVFP4", None])
def test_older_exports_of_modelopt_have_a_file_of_their_own(
    algorithm: str | None, tmp_path: Path
) -> None:
    """Without an algorithm only the cache is quantized."""
    folder = saved(BY_NAME["nvfp4 of modelopt"], tmp_path)
    folder = folder if algorithm else folder / "real"
    fields = json.loads((folder / "config.json").read_text())
    fields.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(fields))
    quantization = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8", "group_size": 16,
                    "exclude_modules": ["lm_head"]}  # fmt: skip
    content = {"producer": {"name": "modelopt"}, "quantization": quantization}
    (folder / "hf_quant_config.json").write_text(json.dumps(content))
    target = Target(torch.device("cpu"))
    params = loader.load(model_of(folder), folder, target, int)
    assert isinstance(params.layers[0].down_DF, PackedWeight if algorithm else torch.Tensor)


def of_gpt_oss(folder: Path) -> Path:
    """A mixture whose experts are in MXFP4, with the names that gpt-oss has."""
    changes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96}
    saved = Case("mixtral", 4, 2, changes, stacked=True).save(folder)

    def of_matrix(weight: torch.Tensor) -> Any:
        return mxfp4(weight, interleaved=weight.shape[0] == 2 * 96)

    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.0.self_attn"]}
    return int4_format.write(
        saved, saved / "packed", lambda name: ".experts." in name, of_matrix, config
    )


def test_experts_of_gpt_oss(tmp_path: Path) -> None:
    """A rank's part of the 96 columns of down cuts a block of 32."""
    folder = of_gpt_oss(tmp_path)
    names = load_file(folder / "model.safetensors")
    assert [name for name in names if name.endswith("experts.gate_up_proj_blocks")]
    layer = check(folder, 96).layers[0]
    assert isinstance(layer.experts.down_EDF, PackedWeight)
    assert isinstance(layer.qkv_ED, torch.Tensor)
    check_ranks(folder, 2, 96)


def test_groups_of_modules_in_formats_of_their_own(tmp_path: Path) -> None:
    """Names and regular expressions come before "Linear"; the ignored are plain."""
    plain, by_name = "model.layers.1.mlp.down_proj", "model.layers.0.mlp.down_proj"
    of_class = Compressed(PACKED, ints(4, "group", group=32, symmetric=False))
    of_values = Compressed("float-quantized", floats(8, "channel"))
    of_name = Compressed(INT8, ints(8, "channel"))
    groups = {
        "a": {"targets": ["Linear"], "weights": of_class.weights, "format": PACKED},
        "b": {"targets": ["re:.*v_proj$"], "weights": of_values.weights,
              "format": "float-quantized", "input_activations": {"num_bits": 8, "dynamic": True}},
        "c": {"targets": [by_name], "weights": of_name.weights, "format": INT8},
    }  # fmt: skip
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    config = of_groups(groups, "mixed-precision", kv_cache_scheme=cache)
    config["ignore"].append(plain)
    folder = save_tiny(tmp_path, vocab_size=99)
    weights = load_file(folder / "model.safetensors")
    by_shape = {"v_proj": of_values, by_name: of_name}
    packers = {name: next((p for key, p in by_shape.items() if key in name), of_class)
               for name in weights}  # fmt: skip
    order = iter([name for name in weights if is_matrix(name) and plain not in name])
    packed = int4_format.write(
        folder, folder / "packed", lambda name: is_matrix(name) and plain not in name,
        lambda weight: packers[next(order)](weight), config,
    )  # fmt: skip
    path = packed / "model.safetensors"
    scale = {"model.layers.0.self_attn.k_scale": torch.ones(1)}  # of an 8-bit cache: not read
    save_file({**load_file(path), **scale}, path, {"format": "pt"})
    first, second = check(packed, 99).layers
    assert isinstance(first.qkv_ED, Mixed) and isinstance(first.qkv_ED.parts[1], Fp8Weight)
    assert first.down_DF.bits == 8 and first.gate_up_GD.bits == 4
    assert isinstance(second.down_DF, torch.Tensor)


HEAD = "lm_head.weight"
LAYER = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("language_model.lm_head", HEAD),
        ("model.language_model.lm_head", HEAD),
        ("re:language_model\\.lm_head", HEAD),
        ("re:.*language_model.*self_attn.*", LAYER),
        ("re:model\\.language_model\\.layers\\.1\\..*", LAYER),
        ("language_model.model.layers.1.self_attn.q_proj", LAYER),
    ],
)
def test_names_of_checkpoints_with_towers(name: str, source: str) -> None:
    """As those of modules that are ignored, and of a group's targets."""
    weights = {"weights": ints(8, "channel"), "format": INT8}
    both = {"a": {"targets": ["Linear"], **weights}, "b": {"targets": [name], **weights}}
    for groups, ignored in (({"a": both["a"]}, [name]), ({"b": both["b"]}, [])):
        config = {**of_groups(groups, INT8), "ignore": ignored}
        scheme = of_checkpoint(PretrainedConfig(quantization_config=config))
        for one in (HEAD, LAYER, "model.layers.2.mlp.up_proj.weight"):
            (part,) = scheme.parts(Param.one("linear", one, 64, 64))
            assert part.format.is_packed == ((one == source) != bool(ignored))


ONE = "model.layers.1.mlp.up_proj."
STATE = "weight.quant_state.bitsandbytes__nf4"


def json_bytes(**changes: Any) -> Any:
    def change(found: torch.Tensor) -> torch.Tensor:
        state = {**json.loads(bytes(found.tolist())), **changes}
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    ("name", "end", "change", "message"),
    [
        ("w4 groups", "weight_scale", None, "up_proj.weight_scale is missing"),
        ("w4 groups", "weight_scale", lambda x: x * torch.nan, "a scale is NaN or infinite"),
        ("w4 groups", "weight_packed", lambda x: x[:, 1:], "weight_packed has shape"),
        ("w4 groups, zeros", "weight_zero_point", None, "weight_zero_point is missing"),
        ("w4 ordered", "weight_g_idx", lambda x: x * 0, "groups of other sizes than 32 inputs"),
        ("int8 channels", "weight", lambda x: x.int(), "weight is stored as int32"),
        ("nvfp4", "weight_global_scale", lambda x: x * 0, "a scale is NaN or infinite"),
        ("nvfp4 of modelopt", "weight_scale_2", None, "weight_scale_2 is missing"),
        ("nvfp4 of modelopt", "weight_scale_2", lambda x: x * torch.nan, "a scale is NaN or inf"),
        ("mxfp4", "weight_scale", lambda x: x | 255, "a scale is NaN or infinite"),
        ("bnb nf4", STATE, lambda x: x[1:], "quant_state is not JSON"),
        ("bnb nf4", STATE, lambda x: x.repeat(40), r"has shape \[\d+\], but its format asks for"),
        ("bnb nf4", STATE, json_bytes(blocksize=128), "has blocksize 128, but 64 is needed"),
        ("bnb nf4", STATE, json_bytes(nested_offset="1"), "has nested_offset '1'"),
        ("bnb nf4", "weight.quant_map", lambda x: x * 2, "other levels than those of nf4"),
        ("bnb nf4", "weight.nested_absmax", lambda x: x * torch.inf, "a scale is NaN or infinite"),
        ("bnb nf4", "weight.absmax", lambda x: x[1:], "weight.absmax has shape"),
        ("bnb int8", "weight_format", lambda x: x + 1, "weight_format is 1: only 0"),
    ],
)
def test_damage_is_named(name: str, end: str, change: Any, message: str, tmp_path: Path) -> None:
    folder = saved(BY_NAME[name], tmp_path)
    path = folder / "model.safetensors"
    weights = load_file(path)
    found = weights.pop(ONE + end)
    if change is not None:
        weights[ONE + end] = change(found).contiguous()
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        loader.load(model_of(folder), folder, Target(torch.device("cpu")), int)


def group(stored: str, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    config = Compressed(stored, weights).config
    config["config_groups"]["group_0"] |= more
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (group(PACKED, ints(3, "group", group=32)), "has num_bits 3, which is .* only 4, 8"),
        (group(PACKED, ints(4, "tensor", symmetric=False)), "'tensor' and symmetric False"),
        (group(PACKED, ints(4, "group", group=0)), "has group_size 0"),
        (group("marlin-24", ints(4, "channel")), "has format 'marlin-24', which is .* 'pack-q"),
        (group(PACKED, ints(4, "channel"), format="x"), "has format 'x'"),
        (group(PACKED, ints(4, "channel"), targets=["Qwen3MLP"]), "has the target 'Qwen3MLP'"),
        (group(PACKED, ints(4, "channel"), targets=["re:("]), "names modules by"),
        ({**group(PACKED, ints(4, "channel")), "sparsity_config": {"format": "y"}}, "format 'y'"),
        (
            {**group(PACKED, ints(4, "channel")), "quantization_status": "calibration"},
            "quantization_status 'calibration', .* only 'compressed', 'frozen'",
        ),
        (group("nvfp4-pack-quantized", floats(4, "group", 32)), "has group_size 32"),
        ({**NF4, "bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage 'bfloat16'"),
        ({**NF4, "bnb_4bit_quant_type": "nf3"}, "bnb_4bit_quant_type 'nf3'"),
        (modelopt("MIXED_PRECISION"), "has quant_algo 'MIXED_PRECISION', .* only 'FP8', 'NVFP4'"),
        (modelopt("NVFP4", group_size=32), "has group_size 32"),
        (modelopt("FP8", ignore="lm_head"), "has plain modules 'lm_head'"),
        ({"quant_method": "modelopt", "quantization": "FP8"}, "has quantization 'FP8': not an obj"),
        (BNB, "load_in_4bit False and load_in_8bit False"),
    ],
)
def test_configs_that_are_not_followed_are_refused(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "quantization_config": config}))
    with pytest.raises(ValueError, match=message):
        model_of(folder)


def test_blocks_that_do_not_end_with_rows_are_refused(tmp_path: Path) -> None:
    kind = replace(BY_NAME["bnb int8"], config=NF4)
    folder = pack(kind, save_tiny(tmp_path, intermediate_size=96))
    with pytest.raises(ValueError, match="blocks of 64 numbers do not end with its rows of 96"):
        model_of(folder)
