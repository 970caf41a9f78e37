"""The dense families beyond Llama, Mistral and Qwen give transformers' logits and tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm import LLM, SamplingParams
from nanovllm.models.formats import int8 as int8_format
from nanovllm.models.formats import rows
from tests.architectures import of_types
from tests.models import test_shards
from tests.models.families import ALL_EXPERTS, FAMILIES, VOCAB_SIZE, Family
from tests.models.harness import (
    BF16,
    check_bf16,
    engine_logits,
    load,
    max_difference,
    sequences,
    transformers_logits,
    transformers_model,
)

TOLERANCE = 1e-4
OWN = tuple(family for family in FAMILIES if not family.plain)
NO_BOUND = ("olmo2", "gemma4_text")
NAMES = of_types(*(family.model_type for family in FAMILIES))
GRAPH_SIZES: dict[str, Any] = {
    "max_num_seqs": 2,
    "graph_batch_sizes": [2],
    "max_num_batched_tokens": 64,
}


def difference(family: Family, folder: Path, device: str, **options: Any) -> float:
    """How far the engine's logits are from transformers', after every token."""
    runner = load(folder, device, max_model_len=family.max_model_len, **options)
    assert (runner.compiler.lowering is None) == options.get("enforce_eager", False)
    worst = 0.0
    for lengths in (family.lengths[:2], family.lengths[2:]):
        known = sequences(VOCAB_SIZE, *lengths)
        found = engine_logits(runner, known) if known else []
        expected = transformers_logits(folder, known, device)
        worst = max(worst, max_difference(found, expected) if known else 0.0)
    return worst


@pytest.mark.shows("eager", "graph", "GPU", architectures=NAMES)
@pytest.mark.parametrize(
    ("family", "mode"), [(family, mode) for family in FAMILIES for mode in family.modes], ids=str
)
def test_logits_are_those_of_transformers(
    family: Family, mode: str, device: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"enforce_eager": True} if mode == "eager" else GRAPH_SIZES
    assert difference(family, family.save(tmp_path), device, **options) <= TOLERANCE


@pytest.mark.parametrize("family", OWN, ids=str)
def test_greedy_tokens_are_those_of_transformers(
    family: Family, device: str, tmp_path: Path
) -> None:
    """Prompts of a batch, and answers that cross blocks."""
    folder = family.save(tmp_path)
    prompts = [one.token_ids for one in sequences(VOCAB_SIZE, *((n, n) for n in (1, 19, 33)))]
    if family.lengths[0][0] > 64:  # transformers changes its frequencies at this length
        prompts = [prompt * 66 for prompt in prompts[:1]]
    llm = LLM(
        str(folder), device=device, dtype="float32", max_model_len=family.max_model_len,
        max_num_seqs=4, kvcache_block_size=16, num_kvcache_blocks=33, enforce_eager=True,
        skip_tokenizer_init=True,
    )  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    model = transformers_model(folder, device)
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = list(prompt)
        for _ in range(20):
            with torch.no_grad():
                logits = model(torch.tensor([ids], device=device)).logits
            ids.append(int(logits[0, -1].argmax()))
        assert output["token_ids"] == ids[len(prompt) :]


@pytest.mark.parametrize("family", OWN, ids=str)
def test_bf16_agrees_up_to_rounding(family: Family, device: str, tmp_path: Path) -> None:
    known = sequences(VOCAB_SIZE, *family.lengths)
    options = {"enforce_eager": True, "max_model_len": family.max_model_len}
    folder = family.save(tmp_path, **{**BF16, **all_experts(family)})
    if family.model_type == "gemma3_text":
        make_sums_exact(folder)
    if family.model_type == "gemma4_text":
        soften(folder)
    check_bf16(folder, device, known, **options)


def all_experts(family: Family) -> dict[str, Any]:
    """Changes of a family with experts that keep its routes when numbers are rounded."""
    return ALL_EXPERTS if family.model_type == "gpt_oss" else {}


def soften(folder: Path) -> None:
    """Shorten queries, whose products with keys have no factor 1 / √H: the weights of trained norms
    have it. Otherwise attention is so sharp that rounding changes it."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name, weight in weights.items():
        if "q_norm" in name:
            weights[name] = weight * 0.25
    save_file(weights, path, metadata={"format": "pt"})


def make_sums_exact(folder: Path) -> None:
    """Round the norms' weights w so that 1 + w is a bf16 number.

    The engine keeps 1 + w in bf16, and transformers adds the 1 in fp32: that difference is not one
    of the layers.
    """
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name, weight in weights.items():
        if "norm" in name:
            weights[name] = (weight.float() + 1).to(weight.dtype) - 1
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", OWN, ids=str)
def test_int8_logits_are_those_of_the_stored_integers(family: Family, tmp_path: Path) -> None:
    """Factors and orders of rows are folded in before weights are quantized."""
    folder, known = family.save(tmp_path), sequences(VOCAB_SIZE, family.lengths[1])
    options = {"enforce_eager": True, "max_model_len": family.max_model_len}
    if family.model_type == "gpt_oss":
        with pytest.raises(ValueError, match="'int8' is not supported for a model with experts"):
            load(folder, "cpu", quantization="int8", **options)
        return
    plain, int8 = (load(folder, "cpu", quantization=how, **options) for how in (None, "int8"))
    before = engine_logits(plain, known)
    plain.steps = replace(plain.steps, params=real_values(int8.params))
    found = engine_logits(int8, known)
    assert max_difference(found, engine_logits(plain, known)) <= TOLERANCE
    assert max_difference(found, before) > TOLERANCE


def real_values(stored: Any) -> Any:
    """Parameters with the numbers that int8 weights stand for."""
    if isinstance(stored, int8_format.Int8Weight):
        return rows(stored, 0)
    if not isinstance(stored, tuple):
        return stored
    values = [real_values(one) for one in stored]
    return type(stored)(*values) if hasattr(stored, "_fields") else tuple(values)


@pytest.mark.parametrize("family", OWN, ids=str)
def test_an_fp8_cache_holds_every_key_and_value_within_its_scale(
    family: Family, tmp_path: Path
) -> None:
    """Or it is refused: the largest stored number is below 448, at which a cache saturates."""
    folder = family.save(tmp_path, **all_experts(family))
    known = sequences(VOCAB_SIZE, family.lengths[-1])
    options = {"enforce_eager": True, "max_model_len": family.max_model_len}
    if family.model_type in NO_BOUND:
        with pytest.raises(ValueError, match="ForCausalLM has no bound for its keys"):
            load(folder, "cpu", kv_cache_dtype="fp8", **options)
        return
    runner = load(folder, "cpu", kv_cache_dtype="fp8", **options)
    found = engine_logits(runner, known)[0]
    plain = engine_logits(load(folder, "cpu", **options), known)[0]
    assert 1e-4 < (found - plain).std() / plain.std() < 0.2
    for cache in runner.steps.caches:
        for stored in (cache.k_CBKH, cache.v_CBKH):
            assert stored.float().nan_to_num(0.0).abs().max() < 448


@pytest.mark.shows("ranks", architectures=NAMES)
@pytest.mark.parametrize(
    ("family", "size"), [(family, size) for family in FAMILIES for size in family.ranks], ids=str
)
def test_ranks_give_the_logits_of_one(family: Family, size: int, tmp_path: Path) -> None:
    """Two key-value heads, so that four ranks have them twice."""
    folder = family.save(tmp_path / "m")
    test_shards.check(folder, size, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for 4 layers"),
        (
            "smollm3",
            {"layer_types": ["sliding_attention"] * 4, "sliding_window": 16},
            "use_sliding_window False with layer_types 'sliding_attention' is not supported",
        ),
        ("granite", {"residual_multiplier": 0.0}, "residual_multiplier is 0.0: it must be a numb"),
        ("granite", {"logits_scaling": 0}, "logits_scaling is 0: it must be a number above 0"),
        ("granite", {"attention_multiplier": -1.0}, "attention_multiplier is -1.0: it must be"),
        ("phi3", {"partial_rotary_factor": 0.1}, "rotates 3 of 32 elements of a head"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not supp"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gemma3", {"hidden_activation": "silu"}, "hidden_activation 'silu' is not supported"),
    ],
    ids=str,
)
def test_what_is_not_built_is_refused_by_name(
    name: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    path = family.save(tmp_path) / "config.json"
    config = json.loads(path.read_text())
    if name == "phi3":
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, **change}
    path.write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        load(tmp_path, "cpu", enforce_eager=True)
