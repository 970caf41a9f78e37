"""Adapters for the linear layers of every family give the logits of merged models; files that do
not fit are refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm.config import EngineConfig
from nanovllm.models import formats
from nanovllm.models.lora import host_adapter
from nanovllm.models.lora.adapter_file import AdapterFile
from nanovllm.models.lora.peft_config import AdapterError, PeftConfig
from nanovllm.models.lora.regions import Adapted, Bound, with_lora
from nanovllm.models.lora.slots import slots_bytes
from nanovllm.models.model import LoraSlots, Model
from nanovllm.models.schemes import OPTIONS
from nanovllm.models.shards import ALL, Shard
from nanovllm.startup.resolve import resolve_without_weights
from tests.engines import make_llm as make_llm
from tests.models import hybrid_cases, latent_cases, lora_cases, mamba_cases, moe_cases, test_shards
from tests.models.families import FAMILIES, VOCAB_SIZE
from tests.models.harness import engine_logits, load, max_difference, sequences, transformers_logits
from tests.models.lora_cases import CONFIG, WEIGHTS, save_adapter, save_merged
from tests.models.thread_ranks import ThreadGroup, on_ranks

TOLERANCE = 1e-4
LENGTHS = ((1, 5), (19, 22))
# Rows that a family reorders, joins or scales, layers of several kinds, and recurrent ones.
CHOSEN = (
    "granite", "phi3-partial", "glm4", "gemma3", "gemma4", "cohere", "starcoder2", "gpt-oss",
)  # fmt: skip
Case = tuple[Callable[..., Path], int]
CASES: dict[str, Case] = {
    **{one.name: (one.save, VOCAB_SIZE) for one in FAMILIES if one.name in CHOSEN},
    **{one.name: (one.save, VOCAB_SIZE) for one in hybrid_cases.CASES[:2]},
    **{one.name: (one.save, VOCAB_SIZE) for one in mamba_cases.CASES[1:3]},
    "latent": (latent_cases.BY_NAME["v3"].save, latent_cases.VOCAB_SIZE),
    "experts": (moe_cases.Case("qwen2_moe", 4, 4).save, moe_cases.VOCAB_SIZE),
}
LORA: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 5}


def is_supported(module: str) -> bool:
    return ".experts." not in module and "kv_b_proj" not in module


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_merged_model(name: str, tmp_path: Path) -> None:
    save, vocab_size = CASES[name]
    folder = save(tmp_path / "model")
    adapter = save_adapter(tmp_path / "adapter", folder, std=0.1, named=is_supported)
    merged = save_merged(tmp_path / "merged", folder, adapter)
    known = sequences(vocab_size, *LENGTHS)
    runner = load(folder, "cpu", enforce_eager=True, **LORA)
    lora_cases.use(runner, adapter, 2)
    found, expected = engine_logits(runner, known), transformers_logits(merged, known, "cpu")
    assert max_difference(found, expected) < TOLERANCE
    assert max_difference(found, transformers_logits(folder, known, "cpu")) > 100 * TOLERANCE


@pytest.mark.parametrize(("name", "size"), [("phi3-partial", 2), ("gemma4", 4), ("qwen3_next", 2)])
def test_ranks_have_their_parts_of_adapters(name: str, size: int, tmp_path: Path) -> None:
    save, vocab_size = CASES[name]
    folder = save(tmp_path / "model")
    adapter = save_adapter(tmp_path / "adapter", folder, std=0.1, named=is_supported)
    known = sequences(vocab_size, *LENGTHS)
    config = EngineConfig.from_options(str(folder), test_shards.options(size, **LORA))

    def logits(group: ThreadGroup) -> list[torch.Tensor]:
        runner = test_shards.load_rank(config, group)
        lora_cases.use(runner, adapter)
        return engine_logits(runner, known)

    alone = load(folder, "cpu", enforce_eager=True, **LORA)
    lora_cases.use(alone, adapter)
    expected = engine_logits(alone, known)
    for found in on_ranks(size, logits):
        assert max_difference(found, expected) < TOLERANCE


@pytest.mark.parametrize("name", OPTIONS)
def test_products_of_quantized_weights_get_what_adapters_add(name: str) -> None:
    from nanovllm.models.formats.format import Extent

    torch.manual_seed(3)
    stored = OPTIONS[name].linear
    extent = Extent((48, 64), torch.float32, 48, 64, 64)
    base = stored.quantized("w", torch.randn(48, 64), extent)
    a_NLD, b_NOX = torch.randn(2, 6, 64), torch.randn(2, 48, 3)
    rows = lora_cases.grouped([2, 0, 1, 2])
    bound = Bound(Adapted(base, a_NLD, b_NOX, (32, 16)), rows, None)
    x_TD, residual_TO = torch.randn(4, 64), torch.randn(4, 48)
    found_TO = formats.linear(x_TD, bound, None, residual_TO)
    expected_TO = formats.linear(x_TD, base, None) + residual_TO
    for token, number in enumerate(rows.adapter_T.tolist()):
        if number:
            a_LD, b_OX = a_NLD[number - 1], b_NOX[number - 1]
            z_L = a_LD @ x_TD[token]
            expected_TO[token] += torch.cat([b_OX[:32] @ z_L[:3], b_OX[32:] @ z_L[3:]])
    torch.testing.assert_close(found_TO, expected_TO, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["glm4", "qwen3_next"])
def test_bytes_of_slots_are_those_that_they_take(name: str, tmp_path: Path) -> None:
    folder = CASES[name][0](tmp_path)
    adapted, plain = (load(folder, "cpu", enforce_eager=True, **o) for o in (LORA, {}))
    taken = adapted.weights_bytes - plain.weights_bytes
    assert slots_bytes(adapted.model) == taken > 0 == slots_bytes(plain.model)


# files --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    config = EngineConfig.from_options(str(checkpoint), {"device": "cpu", "dtype": "float32"})
    return with_lora(resolve_without_weights(config).model, LoraSlots(1, 8))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora is True: DoRA is not supported"),
    "modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save is .*: whole copies of modules"),
    "activated": (
        {"alora_invocation_tokens": [1]}, "alora_invocation_tokens is .*: activated LoRA is not"
    ),
    "parameters": ({"target_parameters": 3}, "target_parameters is 3: it must be a text, or a"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices .*: trained embeddings"),
    "bias": ({"bias": "some"}, "bias is 'some': it must be one of none, all, lora_only"),
    "bias of B": ({"lora_bias": True}, "lora_bias is True: a bias of B is not supported"),
    "pissa": ({"init_lora_weights": "pissa"}, "'pissa', which changes the base model: convert"),
    "other": ({"peft_type": "IA3"}, "peft_type is 'IA3': only 'LORA' is supported"),
    "unknown": ({"future_field": 3}, "has future_field=3, which is not supported"),
    "rank": ({"r": 0}, "r is 0: it must be a whole number of at least 1"),
    "large rank": ({"r": 9}, r"has rank 9, but max_lora_rank is 8"),
    "large pattern": ({"rank_pattern": {"q_proj": 64}}, "has rank 64, but max_lora_rank is 8"),
    "other rank": ({"r": 3}, r"down_proj has lora_A \[4, 128\], .* must have lora_A \[3, 128\]"),
    "other base": (
        {"r": 3, "base_model_name_or_path": "a/b"}, r"have lora_A \[3, 128\].*trained for 'a/b'\)"
    ),
    "alpha": ({"lora_alpha": None}, "lora_alpha is None: it must be a number"),
    "pattern": ({"alpha_pattern": {"(": 3}}, r"alpha_pattern has '\('"),
    "left out": ({"exclude_modules": ["up_proj"]}, r"up_proj, which target_modules 'all-linear'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_configs_that_do_not_work_are_refused(
    name: str, model: Model, checkpoint: Path, tmp_path: Path
) -> None:
    fields, error = REFUSED[name]
    with pytest.raises(AdapterError, match=error):
        AdapterFile(model, save_adapter(tmp_path, checkpoint, **fields))


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    edit(weights)
    save_file(weights, folder / WEIGHTS)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
EDITS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "no B": (lambda all: all.pop(Q + "B.weight"), r"q_proj has lora_A \[4, 64\]: it must have"),
    "shape": (
        lambda all: all.update({Q + "A.weight": torch.ones(4, 63)}), r"has lora_A \[4, 63\]"
    ),
    "integers": (
        lambda all: all.update({Q + "A.weight": torch.ones(4, 64, dtype=torch.int64)}),
        r"lora_A.weight is I64 \[4, 64\]: it must be a matrix of floating point numbers",
    ),
    "module": (
        lambda all: all.update({"base_model.model.model.norm.lora_A.weight": torch.ones(4, 64)}),
        "model.norm is not a linear layer of Qwen3ForCausalLM that adapters can change",
    ),
    "layer": (
        lambda all: all.update({Q.replace(".0.", ".9.") + "A.weight": torch.ones(4, 64)}),
        "model.layers.9.self_attn.q_proj is not a linear layer",
    ),
    "dora": (
        lambda all: all.update({Q + "magnitude_vector": torch.ones(4)}), "is DoRA, which is not"
    ),
    "table": (
        lambda all: all.update(
            {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 4)}
        ),
        "embed_tokens is not .* that adapters can change: .* need the option lora_embeddings=True",
    ),
    "bias": (
        lambda all: all.update({Q.removesuffix("lora_") + "base_layer.bias": torch.ones(4)}),
        "q_proj.base_layer.bias is not the bias of a linear layer that adapters can change",
    ),
    "copy": (
        lambda all: all.update({"base_model.model.lm_head.weight": torch.ones(4, 4)}),
        "lm_head.weight is the whole weight of a module, as PEFT's modules_to_save and save_embed",
    ),
    "head": (
        lambda all: all.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 64)}),
        "lm_head is not a linear layer of Qwen3ForCausalLM that adapters can change",
    ),
    "other": (lambda all: all.update({"x.lora_C.weight": torch.ones(4)}), "not a matrix of LoRA"),
    "nothing": (lambda all: all.clear(), "adapter_model.safetensors has no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_tensors_that_do_not_fit_are_refused(
    name: str, model: Model, checkpoint: Path, tmp_path: Path
) -> None:
    edit, error = EDITS[name]
    save_adapter(tmp_path, checkpoint)
    change(tmp_path, edit)
    with pytest.raises(AdapterError, match=error):
        AdapterFile(model, tmp_path)


@pytest.mark.parametrize(
    ("missing", "content", "error"),
    [
        (CONFIG, None, "adapter_config.json cannot be read"),
        (WEIGHTS, None, "adapter_model.safetensors cannot be read"),
        (CONFIG, "[", "adapter_config.json cannot be read"),
        (CONFIG, "[]", "adapter_config.json cannot be read: it is not a JSON object"),
        (WEIGHTS, "no safetensors", "adapter_model.safetensors: damaged or not a safetensors file"),
    ],
)
def test_files_that_cannot_be_read_are_refused(
    missing: str, content: str | None, error: str, model: Model, checkpoint: Path, tmp_path: Path
) -> None:
    save_adapter(tmp_path, checkpoint)
    (tmp_path / missing).unlink()
    if content is not None:
        (tmp_path / missing).write_text(content)
    with pytest.raises(AdapterError, match=error):
        AdapterFile(model, tmp_path)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 3e38])
def test_numbers_that_are_not_finite_are_refused_by_every_rank(
    value: float, model: Model, checkpoint: Path, tmp_path: Path
) -> None:
    """They would reach the rows of other adapters. The last one is too large times the factor."""
    save_adapter(tmp_path, checkpoint)
    change(tmp_path, lambda all: all[Q + "B.weight"][-1:].fill_(value))
    file = AdapterFile(model, tmp_path)
    for rank in range(2):  # the number is in the part of the second
        with pytest.raises(
            AdapterError, match=r"q_proj.lora_B.weight has numbers that are not fin"
        ):
            file.read(Shard(rank, 2), lambda num: torch.empty(num, dtype=torch.uint8))


def test_names_of_models_with_towers_are_those_of_their_text(
    model: Model, checkpoint: Path, tmp_path: Path
) -> None:
    """As transformers 5, transformers 4 and the base of a model without a head name modules."""
    for number, prefix in enumerate(("model.language_model.", "thinker.model.", "")):
        folder = save_adapter(tmp_path / str(number), checkpoint)
        weights = load_file(folder / WEIGHTS)
        renamed = {
            name.replace("base_model.model.model.", f"base_model.model.{prefix}"): one
            for name, one in weights.items()
        }
        save_file(renamed, folder / WEIGHTS)
        found = AdapterFile(model, folder).read(ALL, used_memory)
        assert all(one.any() for one in found.blocks)


def used_memory(num_bytes: int) -> torch.Tensor:
    """Bytes that are no number in any dtype, as memory that was used before may have them."""
    return torch.full((num_bytes,), 255, dtype=torch.uint8)


@pytest.mark.parametrize("block_bytes", [64, 4096])
def test_matrices_are_in_blocks(
    block_bytes: int, model: Model, checkpoint: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """With zeros where the file has nothing: modules of its own, and ranks below the slots'."""
    folder = save_adapter(tmp_path, checkpoint, named=lambda module: "k_proj" not in module)
    whole = AdapterFile(model, folder).read(ALL, used_memory)
    monkeypatch.setattr(host_adapter, "BLOCK_BYTES", block_bytes)
    found = AdapterFile(model, folder).read(ALL, used_memory)
    largest = max(math.prod(place.shape) for place in found.places) * 4
    assert len(found.blocks) > len(whole.blocks) == 1
    sizes = {one.nbytes for one in found.blocks}
    assert sizes <= {2**n for n in range(6, 30)} and min(sizes) >= block_bytes
    assert max(sizes) < max(2 * largest, block_bytes + 1)
    matrices = found.matrices(found.blocks)
    assert any((one == 0).any() for one in matrices)
    torch.testing.assert_close(matrices, whole.matrices(whole.blocks), rtol=0, atol=0)


def test_a_file_that_changed_after_its_check_is_refused(
    model: Model, checkpoint: Path, tmp_path: Path
) -> None:
    folder = save_adapter(tmp_path, checkpoint)
    file = AdapterFile(model, folder)
    weights = load_file(folder / WEIGHTS)
    save_file({name: one[:1] for name, one in weights.items()}, folder / WEIGHTS)
    with pytest.raises(AdapterError, match="has changed since it was checked"):
        file.read(ALL, used_memory)


# PEFT's rules -------------------------------------------------------------------------------------

CONFIGS: list[tuple[dict[str, Any], dict[str, bool]]] = [
    ({"target_modules": ["q_proj"]}, {"a.q_proj": True, "a.xq_proj": False, "q_proj": True}),
    ({"target_modules": r".*\.1\..*q_proj"}, {"l.1.q_proj": True, "l.2.q_proj": False}),
    ({"target_modules": "all-linear", "exclude_modules": ["k"]}, {"a.q": True, "a.k": False}),
    ({"target_modules": ["q", "k"], "exclude_modules": r"a\.k"}, {"a.k": False, "b.k": True}),
    (
        {"target_modules": ["q"], "layers_to_transform": 1},
        {"model.layers.1.q": True, "model.layers.11.q": False, "q": False},
    ),
    (
        {"target_modules": ["q"], "layers_to_transform": [0, 2], "layers_pattern": "blocks"},
        {"m.blocks.2.q": True, "m.layers.2.q": False, "m.blocks.1.q": False},
    ),
]


@pytest.mark.parametrize(("fields", "expected"), CONFIGS)
def test_modules_are_targeted_as_by_peft(
    fields: dict[str, Any], expected: dict[str, bool], tmp_path: Path
) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **fields}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    found = PeftConfig.read(tmp_path)
    assert {module: found.targets(module) for module in expected} == expected


def test_patterns_have_ranks_and_factors_of_their_own(tmp_path: Path) -> None:
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear",
        "rank_pattern": {r"layers\.1\..*": 2, "q_proj": 16}, "alpha_pattern": {"q_proj": 3},
    }  # fmt: skip
    (tmp_path / CONFIG).write_text(json.dumps(config))
    found = PeftConfig.read(tmp_path)
    modules = ("m.layers.0.k_proj", "m.layers.1.q_proj", "m.layers.0.q_proj")
    assert [found.rank_of(one) for one in modules] == [4, 2, 16]
    assert [found.scale_of(one) for one in modules] == [2.0, 1.5, 3 / 16]
    (tmp_path / CONFIG).write_text(json.dumps({**config, "use_rslora": True}))
    found = PeftConfig.read(tmp_path)
    assert [found.scale_of(one) for one in modules] == [4.0, 3 / math.sqrt(2), 3 / 4]
