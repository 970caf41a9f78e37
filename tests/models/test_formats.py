"""Weights in a checkpoint's own format: read, shared by ranks, multiplied, and refused.

The format is `int4_format`, which packs what ranks cut; the other side of every comparison is the
engine with the plain numbers that the packed ones stand for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm import LLM, SamplingParams
from nanovllm.compile.trace import tensors
from nanovllm.config import EngineConfig
from nanovllm.models import loader, quant_methods
from nanovllm.models.checkpoint import CheckpointError
from nanovllm.models.formats.mixed import Mixed
from nanovllm.models.loader import Target
from nanovllm.models.model import Model
from nanovllm.models.param import Times
from nanovllm.runner.runner import Runner
from nanovllm.startup.resolve import resolve_without_weights
from tests.conftest import save_tiny
from tests.models import harness, int4_format
from tests.models.families import FAMILIES
from tests.models.harness import engine_logits, max_difference, sequences
from tests.models.int4_format import Int4, Int4Weight, unpacked
from tests.models.moe_cases import Case
from tests.models.test_shards import load_rank, options
from tests.models.thread_ranks import on_ranks

LENGTHS = ((1, 5), (19, 22), (70, 72))
TOLERANCE = 1e-4
GROUP = 24  # divides no size below
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
LINEAR = re.compile(r".*\.(self_attn|mlp|shared_experts?)\.\w+_proj(_with_mqa)?\.weight")
EXPERT = re.compile(r".*\.experts\.(\d+\.(\w+_proj|w\d)\.weight|gate_up_proj|down_proj)")


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(quant_methods.CHECKPOINTS, int4_format.METHOD, int4_format.scheme)


def is_matrix(name: str) -> bool:
    return bool(LINEAR.fullmatch(name) or EXPERT.fullmatch(name))


def pack(
    folder: Path, is_packed: Callable[[str], bool] = is_matrix, group: int = GROUP, **config: Any
) -> Path:
    quantization = {"quant_method": int4_format.METHOD, "group_size": group, **config}
    of_matrix = partial(int4_format.of_matrix, group=group)
    return int4_format.write(folder, folder / "packed", is_packed, of_matrix, quantization)


def logits(folder: Path, known: Any, **how: Any) -> tuple[Runner, list[Tensor]]:
    runner = harness.load(folder, "cpu", **{"enforce_eager": True, **how})
    return runner, engine_logits(runner, known)


def check(folder: Path, vocab_size: int, **how: Any) -> Runner:
    """The packed checkpoint gives the logits of its real numbers, and has packed weights."""
    known = sequences(vocab_size, *LENGTHS)
    runner, found = logits(folder, known, **how)
    assert max_difference(found, logits(folder / "real", known)[1]) < TOLERANCE
    assert list(packed_weights(runner.params))
    return runner


def packed_weights(tree: Any) -> Iterator[Int4Weight]:
    if isinstance(tree, Int4Weight):
        yield tree
    elif isinstance(tree, tuple):
        for part in tree:
            yield from packed_weights(part)


def model_of(folder: Path, size: int = 1, **changes: Any) -> Model:
    config = EngineConfig.from_options(str(folder), options(size, **changes))
    return resolve_without_weights(config).model


# Models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_dense_models(architecture: str, tmp_path: Path) -> None:
    biases = {"attention_bias": True, "mlp_bias": True} if architecture == "llama" else {}
    folder = pack(save_tiny(tmp_path, architecture, vocab_size=99, **biases))
    runner = check(folder, 99)
    assert len(list(packed_weights(runner.params))) == 4 * runner.model.config.num_layers
    assert isinstance(runner.params.head_VD, Tensor)


@pytest.mark.parametrize("name", ["phi3-partial", "gemma3"])
def test_joined_tensors_and_rows_in_another_order(name: str, tmp_path: Path) -> None:
    """A Phi-3 has one tensor for q, k and v, and the rows of its heads change places."""
    family = next(one for one in FAMILIES if str(one) == name)
    check(pack(family.save(tmp_path)), 99)


@pytest.mark.parametrize("is_stacked", [False, True], ids=["one by one", "stacked"])
@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe"])
def test_experts(architecture: str, is_stacked: bool, tmp_path: Path) -> None:
    folder = Case(architecture, 5, 2, {"num_hidden_layers": 2}, stacked=is_stacked).save(tmp_path)
    has_graphs = is_stacked and architecture == "mixtral"
    graphs: Any = {"enforce_eager": False, "graph_batch_sizes": [4]} if has_graphs else {}
    runner = check(pack(folder), 96, **graphs)
    experts = runner.params.layers[0].experts
    assert isinstance(experts.gate_up_EGD, Int4Weight) and isinstance(experts.down_EDF, Int4Weight)


def test_graphs_of_layers_in_different_formats(tmp_path: Path) -> None:
    """Modules that a checkpoint leaves as they are make a layer kind of their own."""
    plain = "model.layers.1.mlp"
    folder = pack(
        save_tiny(tmp_path, vocab_size=99, num_hidden_layers=3),
        lambda name: is_matrix(name) and plain not in name,
        modules_to_not_convert=[plain, "re:.*nothing"],
    )
    runner = check(folder, 99, enforce_eager=False, graph_batch_sizes=[4])
    assert [kind.name for kind in runner.model.layer_kinds] == [
        "window0",
        "window0_format1",
        "window0",
    ]
    first, second, _ = runner.params.layers
    assert isinstance(first.gate_up_GD, Int4Weight) and isinstance(second.gate_up_GD, Tensor)
    assert isinstance(second.qkv_ED, Int4Weight)


# Parts of one matrix, tables ----------------------------------------------------------------------


def leaving(folder: Path, *plain: str, **config: Any) -> Path:
    """Packed, but for the modules whose names have one of `plain` in them."""
    is_packed = lambda name: is_matrix(name) and not any(one in name for one in plain)  # noqa: E731
    return pack(folder, is_packed, modules_to_not_convert=list(plain), **config)


@pytest.mark.parametrize("plain", [["q_proj"], ["k_proj", "up_proj"], ["v_proj", "gate_proj"]])
def test_sources_of_one_matrix_in_different_formats(plain: list[str], tmp_path: Path) -> None:
    biases = {"attention_bias": True, "mlp_bias": True}
    folder = leaving(save_tiny(tmp_path, "llama", vocab_size=99, **biases), *plain)
    weight = check(folder, 99).params.layers[0].qkv_ED
    assert isinstance(weight, Mixed) and len(weight.parts) == (3 if "k_proj" in plain else 2)


def test_graphs_of_mixed_matrices(tmp_path: Path) -> None:
    folder = leaving(save_tiny(tmp_path, vocab_size=99), "v_proj")
    check(folder, 99, enforce_eager=False, graph_batch_sizes=[4])


def test_sources_that_a_format_keeps_apart(tmp_path: Path) -> None:
    runner = check(pack(save_tiny(tmp_path, vocab_size=99), apart=True), 99)
    assert len(runner.params.layers[0].gate_up_GD.parts) == 2


def test_rows_of_a_mixed_matrix_in_another_order(tmp_path: Path) -> None:
    """A Phi-3 with tensors of its own for q, k and v: the rows of its heads change places."""
    family = next(one for one in FAMILIES if str(one) == "phi3-partial")
    folder = family.save(tmp_path)
    path = folder / "model.safetensors"
    weights, config = load_file(path), json.loads((folder / "config.json").read_text())
    size = config["hidden_size"] // config["num_attention_heads"]
    sizes = [config[f"num_{kind}_heads"] * size for kind in ("attention", "key_value", "key_value")]
    for name in [name for name in weights if "qkv_proj" in name]:
        for c, part in zip("qkv", weights.pop(name).split(sizes)):
            weights[name.replace("qkv", c)] = part.contiguous()
    save_file(weights, path, {"format": "pt"})
    assert isinstance(check(leaving(folder, "v_proj"), 99).params.layers[0].qkv_ED, Mixed)
    check_ranks(folder / "packed", 2, 99)


def test_experts_whose_gate_is_plain(tmp_path: Path) -> None:
    folder = leaving(Case("mixtral", 5, 2, {"num_hidden_layers": 2}).save(tmp_path), "w1")
    assert isinstance(check(folder, 96).params.layers[0].experts.gate_up_EGD, Mixed)


def with_table(folder: Path, **config: Any) -> Path:
    names = (TABLE, HEAD)
    return pack(folder, lambda name: is_matrix(name) or name in names, table=True, **config)


@pytest.mark.parametrize("tied", [False, True], ids=["plain head", "tied"])
@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text"])
def test_packed_tables(architecture: str, tied: bool, tmp_path: Path) -> None:
    """A tied head is the packed table, with its bytes counted once, in eager mode and graphs."""
    saved = save_tiny(tmp_path, architecture, vocab_size=99, tie_word_embeddings=tied)
    folder = with_table(saved, lm_head=True)
    runner = check(folder, 99, enforce_eager=False, graph_batch_sizes=[4])
    params = runner.params
    assert isinstance(params.embed_VD, Int4Weight) and isinstance(params.head_VD, Int4Weight)
    assert (params.head_VD is params.embed_VD) == tied == runner.model.head_is_table
    unique = {tensor.data_ptr(): tensor.nbytes for tensor in tensors(params)}
    assert runner.model.param_bytes == sum(unique.values())


def test_packed_tables_on_two_ranks(tmp_path: Path) -> None:
    folder = with_table(save_tiny(tmp_path, vocab_size=101, tie_word_embeddings=True))
    check_ranks(folder, 2, 101)


def test_a_table_in_a_format_that_cannot_be_looked_up_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_table(save_tiny(tmp_path, tie_word_embeddings=True))
    monkeypatch.setattr(Int4, "kinds", frozenset({"linear"}))
    with pytest.raises(ValueError, match="not supported for a model whose table is stored so"):
        model_of(folder)


def test_an_fp8_cache_has_scales_of_the_real_weights(tmp_path: Path) -> None:
    folder, known = pack(save_tiny(tmp_path, vocab_size=99)), sequences(99, *LENGTHS)
    found, expected = (
        logits(at, known, kv_cache_dtype="fp8")[0].steps.caches[0]
        for at in (folder, folder / "real")
    )
    assert torch.equal(found.k_scale_K, expected.k_scale_K)  # type: ignore[arg-type]
    assert torch.equal(found.v_scale_K, expected.v_scale_K)  # type: ignore[arg-type]


# Ranks --------------------------------------------------------------------------------------------


def check_ranks(folder: Path, size: int, vocab_size: int, **changes: Any) -> None:
    known = sequences(vocab_size, *LENGTHS)
    _, alone = logits(folder / "real", known)
    config = EngineConfig.from_options(str(folder), options(size, **changes))

    def work(group: Any) -> tuple[int, list[Tensor]]:
        runner = load_rank(config, group)
        return len(list(packed_weights(runner.params))), engine_logits(runner, known)

    for num_packed, found in on_ranks(size, work):
        assert num_packed and max_difference(found, alone) < TOLERANCE


@pytest.mark.parametrize(("size", "group"), [(2, 24), (4, 64)])
def test_ranks_that_cut_words_and_groups(size: int, group: int, tmp_path: Path) -> None:
    """The rows of a rank's part of the MLP are no multiple of 8, its columns none of the group.

    The packed head has an odd number of rows, so the last rank's part is padded."""
    width = {2: 72, 4: 84}[size]  # 36 and 21 a rank
    changes = {"intermediate_size": width, "vocab_size": 101, "tie_word_embeddings": False}
    folder = save_tiny(tmp_path, **changes)
    is_packed = lambda name: is_matrix(name) or name == HEAD  # noqa: E731
    check_ranks(pack(folder, is_packed, group, lm_head=True), size, 101)


@pytest.mark.parametrize("is_stacked", [False, True], ids=["one by one", "stacked"])
@pytest.mark.parametrize("whole", [False, True], ids=["a part of every expert", "whole experts"])
def test_experts_on_two_ranks(whole: bool, is_stacked: bool, tmp_path: Path) -> None:
    changes = {"num_hidden_layers": 2, "intermediate_size": 20}  # 10 a rank
    folder = Case("mixtral", 6, 2, changes, stacked=is_stacked).save(tmp_path)
    check_ranks(pack(folder, group=16), 2, 96, expert_parallel=whole)


def test_joined_tensors_on_two_ranks(tmp_path: Path) -> None:
    family = next(one for one in FAMILIES if str(one) == "phi3-partial")
    check_ranks(pack(family.save(tmp_path)), 2, 99)


# Numbers and bytes --------------------------------------------------------------------------------


def test_packed_numbers_arrive_unchanged(tmp_path: Path) -> None:
    """Values and scales are those of the checkpoint, bit for bit, in one matrix of q, k and v."""
    folder = pack(save_tiny(tmp_path, vocab_size=99))
    stored = load_file(folder / "model.safetensors")
    layer = harness.load(folder, "cpu", enforce_eager=True).params.layers[1]
    names = [f"model.layers.1.self_attn.{c}_proj." for c in "qkv"]
    values = torch.cat([unpacked(stored[name + "qweight"]).T for name in names])
    assert torch.equal(unpacked(layer.qkv_ED.packed_OW), values)
    scales = torch.cat([stored[name + "scales"].T for name in names]).float()
    assert torch.equal(layer.qkv_ED.scale_OG, scales)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe"])
def test_bytes_are_those_of_the_stored_tensors(model_type: str, size: int, tmp_path: Path) -> None:
    """In the memory plan as on the device, read or random; and fewer than those of real numbers."""
    saved = save_tiny(tmp_path) if model_type == "qwen3" else Case(model_type, 4, 2).save(tmp_path)
    folder = pack(saved)
    model, target = model_of(folder, size), Target(torch.device("cpu"))
    target = target._replace(shard=loader.Shard(0, size))
    for params in (loader.load(model, folder, target, int), loader.random(model, target, 0, int)):
        unique = {tensor.data_ptr(): tensor.nbytes for tensor in tensors(params)}
        assert model.param_bytes == sum(unique.values())
        in_experts = [weight.experts[-2:] for weight in params.layers if model_type == "qwen3_moe"]
        assert model.expert_bytes == sum(tensor.nbytes for tensor in tensors(tuple(in_experts)))
    real = model_of(folder / "real", size)
    assert model.param_bytes < real.param_bytes and model.num_weights() == real.num_weights()


class LargestReal(TorchDispatchMode):
    """Notes the most numbers of any floating point tensor that an op makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and found.is_floating_point():
            self.numel = max(self.numel, found.numel())
        return found


@pytest.mark.parametrize("size", [1, 2])
def test_reading_makes_no_matrix_of_real_numbers(size: int, tmp_path: Path) -> None:
    """No floating point tensor on the way is larger than the largest one that stays."""
    changes = {"num_hidden_layers": 1, "vocab_size": 16}
    folder = pack(Case("mixtral", 4, 2, changes).save(tmp_path), group=8)
    target = Target(torch.device("cpu"))._replace(shard=loader.Shard(0, size))
    with LargestReal() as largest:
        params = loader.load(model_of(folder, size), folder, target, int)
    stays = max(tensor.numel() for tensor in tensors(params) if tensor.is_floating_point())
    num_packed = params.layers[0].experts.gate_up_EGD.real(torch.float32).numel()
    assert largest.numel == stays < num_packed / 4


def test_a_factor_goes_to_the_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pack(save_tiny(tmp_path))
    model, target = model_of(folder), Target(torch.device("cpu"))
    before = loader.load(model, folder, target, int).layers[0].out_DQ
    after = loader.load(with_adapt(model, Times(0.5)), folder, target, int).layers[0].out_DQ
    assert torch.equal(after.rows(0), before.rows(0) * 0.5)
    assert torch.equal(after.packed_OW, before.packed_OW)
    monkeypatch.delattr(Int4, "scaled")
    message = rf"o_proj\.weight: the format {int4_format.METHOD} cannot take the factor 0\.5"
    with pytest.raises(CheckpointError, match=message):
        loader.load(with_adapt(model, Times(0.5)), folder, target, int)
    with pytest.raises(CheckpointError, match=rf"{int4_format.METHOD} cannot take <built-in"):
        loader.load(with_adapt(model, max), folder, target, int)


def with_adapt(model: Model, adapt: Any) -> Model:
    def layer_params(*args: Any) -> Any:
        declared = model.layer_params(*args)
        return declared | {"out_DQ": declared["out_DQ"]._replace(adapt=adapt)}

    return replace(model, layer_params=layer_params)


def test_sleep_gives_packed_weights_back_and_reads_them_again(tmp_path: Path) -> None:
    folder = pack(save_tiny(tmp_path, vocab_size=99))
    llm = LLM(str(folder), **{**options(1), "enable_sleep_mode": True})
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    before = llm.generate([[5, 6, 7]], params, use_tqdm=False)[0]["token_ids"]
    llm.sleep(level=2)
    llm.wake_up()
    assert llm.generate([[5, 6, 7]], params, use_tqdm=False)[0]["token_ids"] == before


# Refusals -----------------------------------------------------------------------------------------

ONE = "model.layers.1.mlp.up_proj."


@pytest.mark.parametrize(
    ("end", "change", "message"),
    [
        ("qweight", None, f"tensor {ONE}qweight is missing"),
        ("scales", None, f"tensor {ONE}scales is missing"),
        ("scales", lambda x: x[1:], f"{ONE}scales has shape [2, 128], but the config asks for [3,"),
        ("qzeros", lambda x: x[:, 1:], f"{ONE}qzeros has shape [3, 15], but the config asks for"),
        ("qweight", lambda x: x.long(), f"{ONE}qweight is stored as int64: its format asks for"),
        ("scales", lambda x: x.int(), f"{ONE}scales is stored as int32: it is quantized"),
        ("scales", lambda x: x * torch.nan, f"{ONE}weight: a scale is NaN or infinite"),
        ("other", lambda x: torch.ones(2), "1 tensor(s) that Qwen3ForCausalLM does not have, e.g."),
    ],
)
def test_a_wrong_companion_is_named(
    end: str, change: Callable[[Any], Tensor] | None, message: str, tmp_path: Path
) -> None:
    folder = pack(save_tiny(tmp_path))
    path = folder / "model.safetensors"
    weights = load_file(path)
    found = weights.pop(ONE + end, None)
    if change is not None:
        weights[ONE + end] = change(found).contiguous()
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=re.escape(message)):
        loader.load(model_of(folder), folder, Target(torch.device("cpu")), int)


def test_a_module_that_is_not_packed_must_be_named(tmp_path: Path) -> None:
    folder = pack(save_tiny(tmp_path), lambda name: is_matrix(name) and "o_proj" not in name)
    message = r"o_proj\.qweight is missing, and .*o_proj\.weight is there: it is not quantized"
    with pytest.raises(CheckpointError, match=message):
        loader.load(model_of(folder), folder, Target(torch.device("cpu")), int)


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ("experts.1", "gives .*experts.0.w1.weight the format int4_of_tests and .* plain: the exp"),
        ("re:(", "names modules by"),
    ],
)
def test_names_that_cannot_be_followed_are_refused(
    plain: str, message: str, tmp_path: Path
) -> None:
    folder = pack(Case("mixtral", 4, 2).save(tmp_path), modules_to_not_convert=[plain])
    with pytest.raises(ValueError, match=message):
        model_of(folder)


def test_ranks_that_cut_what_cannot_be_cut_are_refused(tmp_path: Path) -> None:
    folder = pack(save_tiny(tmp_path, intermediate_size=96), group=32, whole=True)
    message = r"down_proj\.weight \[64, 96\] cannot be shared by 2 rank\(s\): its shares of 48 col"
    assert model_of(folder).param_bytes
    with pytest.raises(ValueError, match=message):
        model_of(folder, 2)


def test_options_that_do_not_go_with_a_packed_checkpoint_are_refused(tmp_path: Path) -> None:
    folder = pack(Case("mixtral", 4, 2).save(tmp_path))
    with pytest.raises(ValueError, match="'int8', but the checkpoint is quantized already"):
        model_of(folder, quantization="int8")
    with pytest.raises(ValueError, match="expert_offload is 2, but the model's experts are"):
        model_of(folder, expert_offload=2)


def test_a_format_without_a_product_for_experts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pack(Case("mixtral", 4, 2).save(tmp_path))
    monkeypatch.setattr(Int4, "kinds", frozenset({"linear"}))
    with pytest.raises(
        ValueError, match=f"'{int4_format.METHOD}' is not supported for a model with"
    ):
        model_of(folder)
