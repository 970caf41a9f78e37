"""fp8, compressed-tensors, GPTQ and AWQ give the logits of the numbers that they stand for.

They are packed here by loops that follow the layouts' descriptions, and read as their config says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm import LLM, SamplingParams
from nanovllm.compile.trace import tensors
from nanovllm.config import EngineConfig
from nanovllm.kernels import reference
from nanovllm.kernels.reference.packed import Codes
from nanovllm.models import loader
from nanovllm.models.checkpoint import CheckpointError
from nanovllm.models.formats.fp8 import Fp8Weight
from nanovllm.models.formats.mixed import Mixed
from nanovllm.models.formats.packed_weight import PackedWeight
from nanovllm.models.loader import Shard, Target
from nanovllm.platforms import cpu
from tests.conftest import save_tiny
from tests.models import harness, int4_format
from tests.models.harness import engine_logits, max_difference, sequences
from tests.models.moe_cases import Case
from tests.models.test_formats import LENGTHS, TOLERANCE, is_matrix, model_of
from tests.models.test_shards import load_rank, options
from tests.models.thread_ranks import on_ranks

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that is in place i of a word
E4M3 = torch.float8_e4m3fn
Packed = tuple[dict[str, Tensor], Tensor]


def fp8(weight: Tensor, rows: int, columns: int, scale_name: str) -> Packed:
    """Blocks of rows × columns; 0 are all."""
    (num_rows, depth), real = weight.shape, weight.float().clone()
    rows, columns = rows or num_rows, columns or depth
    values, scales = torch.empty(num_rows, depth, dtype=E4M3), []
    for r in range(0, num_rows, rows):
        for c in range(0, depth, columns):
            block = real[r : r + rows, c : c + columns]
            scale = block.abs().max() / 448
            scales.append(scale)
            values[r : r + rows, c : c + columns] = (block / scale).to(E4M3)
            block.copy_(values[r : r + rows, c : c + columns].float() * scale)
    of_tensor = rows == num_rows and columns == depth
    scale = torch.stack(scales).view(-1, -(-depth // columns))
    scale = scale.view(1) if of_tensor else scale
    return {"weight": values, scale_name: scale, "input_scale": torch.ones(())}, real


def fp8_of_transformers(weight: Tensor, rows: int, columns: int) -> Packed:
    """As transformers and Mistral write it: the scale of a tensor has no axis."""
    found, real = fp8(weight, rows, columns, "weight_scale_inv")
    found["activation_scale"] = found.pop("input_scale")
    if not rows:
        found["weight_scale_inv"] = found["weight_scale_inv"].view(())
    return found, real


def words(values: Tensor, bits: int, order: tuple[int, ...] = ()) -> Tensor:
    """Words of 32 bits along the last axis."""
    per_word = 32 // bits
    found = torch.zeros(values.shape[0], values.shape[1] // per_word, dtype=torch.int64)
    for i in range(per_word):
        at = order[i] if order else i
        found |= values[:, at::per_word].long() << (bits * i)
    return torch.where(found >= 2**31, found - 2**32, found).int()


def grouped(
    weight: Tensor,
    bits: int,
    group: int,
    kind: str,
    has_order: bool = False,
    symmetric: bool = False,
) -> Packed:
    """GPTQ ("gptq", "gptq_v2") or AWQ; all zeros of `symmetric` ones are half of all values."""
    (num_rows, depth), largest = weight.shape, 2**bits - 1
    group = depth if group < 0 else group
    group_D = torch.arange(depth) // group
    if has_order:
        group_D = group_D[torch.randperm(depth)]
    num_groups = -(-depth // group)
    real, value = torch.empty(num_rows, depth), torch.empty(num_rows, depth)
    scale, zero = torch.empty(num_rows, num_groups), torch.empty(num_rows, num_groups)
    for g in range(num_groups):
        own = weight[:, group_D == g].float()
        low, high = own.amin(1).clamp(max=-1e-4), own.amax(1).clamp(min=1e-4)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high * (largest + 1) / (largest - 1)  # the zero is in the middle
        scale[:, g] = ((high - low) / largest).half().float()
        zero[:, g] = (-low / scale[:, g]).round().clamp(1, largest)
        own_value = ((own / scale[:, g, None]).round() + zero[:, g, None]).clamp(0, largest)
        value[:, group_D == g] = own_value
        real[:, group_D == g] = (own_value - zero[:, g, None]) * scale[:, g, None]
    stored = zero - 1 if kind == "gptq" else zero
    order = AWQ_ORDER if kind == "awq" else ()
    companions = {
        "qweight": words(value, bits, order).T if not order else words(value.T, bits, order),
        "qzeros": words(stored.T, bits, order),
        "scales": scale.T.half(),
    }
    if kind != "awq":
        companions["qweight"] = words(value, bits).T
        companions["g_idx"] = group_D.int()
    return companions, real


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint: how a matrix is packed, and what its config says."""

    name: str
    of_matrix: Callable[[Tensor], Packed]
    config: dict[str, Any]

    def __str__(self) -> str:
        return self.name


def compressed(strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"type": "float", "num_bits": 8, "symmetric": True, "strategy": strategy, **more}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }


def gptq(**config: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, **config}


def auto_round(packing: str | None = "auto_round:auto_gptq", **config: Any) -> dict[str, Any]:
    found = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True,
             "data_type": "int", "packing_format": packing}  # fmt: skip
    return {**found, **config}


AWQ = {
    "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
}  # fmt: skip
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [24, 40]}
STATIC = {"quant_method": "fp8", "activation_scheme": "static"}
KINDS = [
    Kind("fp8 blocks", partial(fp8, rows=24, columns=40, scale_name="weight_scale_inv"), BLOCKS),
    Kind("fp8 tensors", partial(fp8, rows=0, columns=0, scale_name="weight_scale"),
         STATIC),
    Kind("fp8 tensors of transformers", partial(fp8_of_transformers, rows=0, columns=0),
         {**STATIC, "weight_block_size": None}),
    Kind("fp8 of modelopt", partial(fp8, rows=0, columns=0, scale_name="weight_scale"),
         {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}),
    Kind("fp8 channels", partial(fp8, rows=1, columns=0, scale_name="weight_scale"),
         compressed("channel")),
    Kind("gptq", partial(grouped, bits=4, group=32, kind="gptq"), gptq()),
    Kind("gptq symmetric", partial(grouped, bits=4, group=64, kind="gptq", symmetric=True),
         gptq(group_size=64, sym=True)),
    Kind("gptq ordered", partial(grouped, bits=4, group=16, kind="gptq", has_order=True),
         gptq(group_size=16, desc_act=True)),
    Kind("gptq v2, 8 bits", partial(grouped, bits=8, group=-1, kind="gptq_v2"),
         gptq(bits=8, group_size=-1, checkpoint_format="gptq_v2")),
    Kind("awq", partial(grouped, bits=4, group=32, kind="awq"), AWQ),
    Kind("auto-round", partial(grouped, bits=4, group=32, kind="gptq_v2"),
         auto_round("auto_round", sym=False)),
]  # fmt: skip
BY_NAME = {str(kind): kind for kind in KINDS}


def pack(kind: Kind, folder: Path, **more: Any) -> Path:
    return int4_format.write(
        folder, folder / "packed", is_matrix, kind.of_matrix, {**kind.config, **more}
    )


def check(folder: Path, vocab_size: int, **how: Any) -> Any:
    """The logits of the numbers that the checkpoint stands for; returns the packed parameters."""
    known = sequences(vocab_size, *LENGTHS)
    runner = harness.load(folder, "cpu", **{"enforce_eager": True, **how})
    expected = engine_logits(harness.load(folder / "real", "cpu", enforce_eager=True), known)
    assert max_difference(engine_logits(runner, known), expected) < TOLERANCE
    return runner.params


def check_ranks(folder: Path, size: int, vocab_size: int) -> None:
    known = sequences(vocab_size, *LENGTHS)
    alone = engine_logits(harness.load(folder / "real", "cpu", enforce_eager=True), known)
    config = EngineConfig.from_options(str(folder), options(size))
    for found in on_ranks(size, lambda group: engine_logits(load_rank(config, group), known)):
        assert max_difference(found, alone) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_dense_models_alone_and_on_two_ranks(kind: Kind, tmp_path: Path) -> None:
    """The shares of the MLP are 56 columns: they cut blocks and groups."""
    folder = pack(kind, save_tiny(tmp_path, vocab_size=99, intermediate_size=112))
    params = check(folder, 99)
    stored = params.layers[0].down_DF
    assert isinstance(stored, Fp8Weight if "fp8" in kind.name else PackedWeight)
    check_ranks(folder, 2, 99)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_experts_alone_and_on_two_ranks(kind: Kind, tmp_path: Path) -> None:
    changes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 48}
    folder = pack(kind, Case("mixtral", 4, 2, changes).save(tmp_path))
    check(folder, 96)
    check_ranks(folder, 2, 96)


@pytest.mark.parametrize("name", ["gptq ordered", "awq"])
def test_interleaved_rows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As processors have them that are faster so; with exact inputs none is."""

    def prefers(platform: cpu.CpuPlatform, codes: Codes, depth: int) -> bool:
        return not reference.packed.is_interleaved(codes[0])

    monkeypatch.setattr(cpu.CpuPlatform, "prefers_interleaved", prefers)
    folder = pack(BY_NAME[name], save_tiny(tmp_path, vocab_size=99, num_hidden_layers=1))
    assert dims(check(folder, 99, enforce_eager=False, graph_batch_sizes=[4])) == {4}
    changes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 48}
    experts = pack(BY_NAME[name], Case("mixtral", 4, 2, changes).save(tmp_path / "experts"))
    assert dims(check(experts, 96)) == {4, 5}


def dims(weights: Any) -> set[int]:
    """The dimensions of codes of all packed weights."""
    if isinstance(weights, PackedWeight):
        return {weights.code_OC.dim()}
    return {n for one in weights for n in dims(one)} if isinstance(weights, tuple) else set()


@pytest.mark.parametrize(
    "name",
    ["fp8 blocks", "fp8 tensors", "fp8 channels", "gptq", "gptq ordered", "awq", "auto-round"],
)
def test_graphs(name: str, tmp_path: Path) -> None:
    folder = pack(BY_NAME[name], save_tiny(tmp_path, vocab_size=99, num_hidden_layers=1))
    check(folder, 99, enforce_eager=False, graph_batch_sizes=[4])


def test_two_processes_that_sleep(tmp_path: Path) -> None:
    """Ranks in processes read their own parts; one process reads its weights again after sleep."""
    changes = {"num_hidden_layers": 1, "hidden_size": 64}
    folder = pack(BY_NAME["gptq ordered"], Case("mixtral", 4, 2, changes).save(tmp_path))
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

    def answer(llm: LLM) -> list[int]:
        return llm.generate([[5, 6, 7]], params, use_tqdm=False)[0]["token_ids"]

    alone = LLM(str(folder), **options(1), enable_sleep_mode=True)
    expected = answer(alone)
    for level in (1, 2):
        alone.sleep(level=level)
        alone.wake_up()
        assert answer(alone) == expected
    both = LLM(str(folder), **options(2))
    assert answer(both) == expected
    both.close()


def test_stacked_experts_in_fp8(tmp_path: Path) -> None:
    """transformers 5 names the scales of `gate_up_proj` `gate_up_proj_scale_inv`."""
    kind, changes = BY_NAME["fp8 blocks"], {"num_hidden_layers": 1}
    saved = Case("mixtral", 4, 2, changes, stacked=True).save(tmp_path)
    folder = pack(kind, saved)
    path = folder / "model.safetensors"
    renamed = {re.sub("_weight(_scale_inv|)$", r"\1", k): v for k, v in load_file(path).items()}
    unread = {name for name in renamed if name.endswith("_input_scale")}
    save_file({k: v for k, v in renamed.items() if k not in unread}, path, {"format": "pt"})
    check(folder, 96)
    check_ranks(folder, 2, 96)


@pytest.mark.parametrize("block", [None, [24, 40]])
def test_stacked_experts_with_scales_of_inputs(block: list[int] | None, tmp_path: Path) -> None:
    """The scales of whole matrices have two axes of 1, as transformers writes them."""
    rows, columns = block or (0, 0)
    kind = Kind(
        "", partial(fp8_of_transformers, rows=rows, columns=columns),
        {**STATIC, "weight_block_size": block},
    )  # fmt: skip
    folder = pack(
        kind, Case("mixtral", 4, 2, {"num_hidden_layers": 1}, stacked=True).save(tmp_path)
    )
    path = folder / "model.safetensors"
    renamed = {re.sub("_weight(_scale_inv|)$", r"\1", k): v for k, v in load_file(path).items()}
    for name, scale in renamed.items():
        if name.endswith("_scale_inv") and scale.dim() == 1:
            renamed[name] = scale.view(-1, 1, 1)
    save_file(renamed, path, {"format": "pt"})
    check(folder, 96)
    check_ranks(folder, 2, 96)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", ["fp8 blocks", "gptq ordered", "awq"])
def test_bytes_are_those_of_the_stored_tensors(name: str, size: int, tmp_path: Path) -> None:
    folder = pack(BY_NAME[name], Case("mixtral", 4, 2, {"hidden_size": 64}).save(tmp_path))
    model, target = model_of(folder, size), Target(torch.device("cpu"))
    target = target._replace(shard=Shard(0, size))
    for params in (loader.load(model, folder, target, int), loader.random(model, target, 0, int)):
        unique = {tensor.data_ptr(): tensor.nbytes for tensor in tensors(params)}
        assert model.param_bytes == sum(unique.values())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_random_weights_are_near_what_was_drawn(kind: Kind, tmp_path: Path) -> None:
    """Weights of a quantized config are those of the plain one, rounded."""
    folder = pack(kind, save_tiny(tmp_path))
    found, plain = (
        loader.random(model_of(at), Target(torch.device("cpu")), 0, int).layers[0].down_DF
        for at in (folder, folder / "real")
    )
    assert 0 < (found.rows(0) - plain).abs().max() < 0.1 * plain.abs().max()


def test_a_module_that_is_not_converted(tmp_path: Path) -> None:
    kind, saved = BY_NAME["fp8 blocks"], save_tiny(tmp_path, vocab_size=99)
    plain = "model.layers.0.self_attn.v_proj"
    folder = int4_format.write(
        saved, saved / "packed", lambda name: is_matrix(name) and plain not in name, kind.of_matrix,
        {**kind.config, "modules_to_not_convert": [plain, "lm_head"]},
    )  # fmt: skip
    params = check(folder, 99)
    assert isinstance(params.layers[0].qkv_ED, Mixed)
    assert isinstance(params.layers[1].qkv_ED, Fp8Weight)


def test_modules_that_gptq_leaves_plain(tmp_path: Path) -> None:
    """The first entry that matches a module decides; entries may repeat what holds for all."""
    kind, saved = BY_NAME["gptq"], save_tiny(tmp_path, vocab_size=99)
    dynamic = {
        "lm_head": {}, "+:.*layers\\.1\\..*": {"bits": 4, "damp_percent": 0.1}, "-:.*attn.*": {},
    }  # fmt: skip
    plain = "model.layers.0.self_attn"
    folder = int4_format.write(
        saved, saved / "packed", lambda name: is_matrix(name) and plain not in name, kind.of_matrix,
        {**kind.config, "dynamic": dynamic},
    )  # fmt: skip
    first, second = check(folder, 99).layers
    assert isinstance(first.qkv_ED, Tensor) and isinstance(first.down_DF, PackedWeight)
    assert isinstance(second.qkv_ED, PackedWeight)


ONE = "model.layers.1.mlp.up_proj."


@pytest.mark.parametrize("size", [1, 2])
def test_biases_of_zeros_that_autogptq_adds(size: int, tmp_path: Path) -> None:
    """One for each packed matrix, also where the model has none."""
    folder = pack(BY_NAME["gptq"], save_tiny(tmp_path))
    path = folder / "model.safetensors"
    weights = load_file(path)
    ends = {name: one.shape[1] for name, one in weights.items() if name.endswith(".qweight")}
    weights |= {
        name.replace("qweight", "bias"): torch.zeros(num, dtype=torch.float16)
        for name, num in ends.items()
    }
    save_file(weights, path, {"format": "pt"})
    target = Target(torch.device("cpu"))._replace(shard=Shard(0, size))
    loader.load(model_of(folder, size), folder, target, int)
    weights[ONE + "bias"][-1] = 0.5
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"1 tensor.* does not have, e\.g\. {ONE}bias"):
        loader.load(model_of(folder, size), folder, target, int)


@pytest.mark.parametrize(
    ("name", "end", "change", "message"),
    [
        ("fp8 blocks", "weight_scale_inv", None, "weight_scale_inv is missing, and .* is not quan"),
        ("fp8 blocks", "weight_scale_inv", lambda x: x[1:], "weight_scale_inv has shape"),
        ("fp8 blocks", "weight_scale_inv", lambda x: x * torch.nan, "a scale is NaN or infinite"),
        ("fp8 tensors", "weight", lambda x: x.float(), "weight is stored as float32: its format"),
        ("gptq", "scales", lambda x: x * torch.inf, "a scale is NaN or infinite"),
        ("gptq ordered", "g_idx", lambda x: x + 1, "g_idx names a group that is not there"),
        ("awq", "qweight", lambda x: x[:, 1:], "qweight has shape"),
    ],
)
def test_damage_is_named(name: str, end: str, change: Any, message: str, tmp_path: Path) -> None:
    folder = pack(BY_NAME[name], save_tiny(tmp_path))
    path = folder / "model.safetensors"
    weights = load_file(path)
    found = weights.pop(ONE + end)
    if change is not None:
        weights[ONE + end] = change(found).contiguous()
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        loader.load(model_of(folder), folder, Target(torch.device("cpu")), int)


@pytest.fixture
def plain_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that multiplies plain tensors alone."""
    monkeypatch.setattr(cpu, "TRAITS", replace(cpu.TRAITS, takes_quantized=False))


def test_the_log_says_whether_weights_stay_quantized(
    tmp_path: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pack(BY_NAME["awq"], save_tiny(tmp_path))
    assert model_of(folder).param_bytes
    assert "weights stay quantized (quant_method 'awq')" in caplog.text
    request.getfixturevalue("plain_device")
    model_of(folder)
    assert "weights are dequantized to float32 (quant_method 'awq'): a cpu device" in caplog.text


@pytest.mark.usefixtures("plain_device")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_devices_without_products_dequantize(kind: Kind, tmp_path: Path) -> None:
    folder = pack(kind, save_tiny(tmp_path, vocab_size=99, intermediate_size=112))
    params = check(folder, 99)
    assert {type(one) for layer in params.layers for one in layer} <= {Tensor, type(None)}
    check_ranks(folder, 2, 99)


@pytest.mark.usefixtures("plain_device")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_devices_without_products_dequantize_experts(kind: Kind, tmp_path: Path) -> None:
    changes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 48}
    folder = pack(kind, Case("mixtral", 4, 2, changes).save(tmp_path))
    assert all(isinstance(one, Tensor) for one in check(folder, 96).layers[0].experts)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**BLOCKS, "fmt": "e5m2"}, "has fmt 'e5m2'"),
        ({**BLOCKS, "weight_block_size": [128]}, r"has blocks of \[128\]"),
        (gptq(bits=3), "has bits 3"),
        (gptq(group_size=0), "has group_size 0"),
        (gptq(dynamic=["-:.*"]), "has dynamic .* it must be an object"),
        (gptq(dynamic={"-:*": {}}), "names modules by"),
        (gptq(dynamic={"+:.*down.*": {"bits": 8}}), r"has dynamic '\+:\.\*down\.\*' with bits 8"),
        (gptq(dynamic={".*": {"group_size": 64}}), "with group_size 64, .* only 32"),
        (gptq(dynamic={".*": 8}), "has dynamic '.*' 8: not an object"),
        ({**AWQ, "version": "gemv"}, "has version 'gemv'"),
        (auto_round("auto_round:fp8"), "has packing_format 'auto_round:fp8', .* 'auto_round:auto_"),
        (auto_round(data_type="mx_fp"), "has data_type 'mx_fp'"),
        (auto_round("auto_round:auto_awq", bits=8), "has bits 8"),
        (auto_round(extra_config=["lm_head"]), "has extra_config .* it must be an object"),
        (auto_round(extra_config={"lm_head": 16}), "has extra_config 'lm_head' 16: no object"),
        (auto_round(extra_config={"x": {"bits": 8}}), "'x' with bits 8, .* only 4, as for the oth"),
        (auto_round(extra_config={"x": {"data_type": "fp"}}), "with data_type 'fp', .* only 'int'"),
        (auto_round(extra_config={"(": {"bits": 16}}), "names modules by"),
        ({**AWQ, "zero_point": False}, "has zero_point False"),
        (compressed("group"), "has strategy 'group'"),
        (compressed("tensor", num_bits=4), "has num_bits 4"),
        ({**compressed("tensor"), "config_groups": {}}, "has the groups"),
        ({**compressed("tensor"), "kv_cache_scheme": {"num_bits": 8}}, "has kv_cache_scheme"),
        ({**compressed("tensor"), "format": "pack-quantized"}, "has type 'float'"),
    ],
)
def test_configs_that_are_not_followed_are_refused(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = pack(BY_NAME["fp8 blocks"], save_tiny(tmp_path))
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "quantization_config": config}))
    with pytest.raises(ValueError, match=message):
        model_of(folder)
