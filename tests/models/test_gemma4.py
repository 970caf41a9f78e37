"""Gemma 4: checkpoints with encoders, pages of two sizes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from tests.conftest import tiny_config
from tests.models import test_shards
from tests.models.families import FAMILIES, GEMMA4, VOCAB_SIZE
from tests.models.harness import engine_logits, load, max_difference, sequences
from tests.models.routes import edit
from tests.models.test_moe_configs import read

NAME = "Gemma4ForConditionalGeneration"
TEXT = {**GEMMA4, "vocab_size": VOCAB_SIZE, "pad_token_id": 0, "attention_k_eq_v": True}
VISION = {
    "model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def save(folder: Path) -> Path:
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    torch.manual_seed(0)
    text = tiny_config("gemma4_text", **TEXT).to_dict()
    config = Gemma4Config(text_config=text, vision_config=VISION, audio_config=None)
    Gemma4ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.shows("eager", architectures=[NAME])
def test_logits_of_text_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import Gemma4ForConditionalGeneration

    folder, known = save(tmp_path), sequences(VOCAB_SIZE, (19, 24), (99, 103))
    model = Gemma4ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        expected = [model(torch.tensor([ids])).logits[0] for ids, _ in known]
    found = engine_logits(load(folder, "cpu", enforce_eager=True), known)
    assert max_difference(found, expected) <= 1e-4


def test_small_pages_lie_beside_each_other(tmp_path: Path) -> None:
    """Three full layers with pages of half the size take the tensors of two layers."""
    family = next(one for one in FAMILIES if one.name == "gemma4")
    runner = load(family.save(tmp_path), "cpu", enforce_eager=True)
    groups = runner.model.page_groups
    assert groups.num_tensors == 2 and [one.per_tensor for one in groups.groups] == [2, 1]
    caches = [cache.k_CBKH for cache in runner.steps.caches]
    storages = [cache.untyped_storage().data_ptr() for cache in caches]
    assert storages[2] == storages[3] == storages[0] and storages[4] == storages[1]
    assert [tuple(cache.shape[1:]) for cache in caches] == [(16, 4, 16)] * 2 + [(16, 1, 32)] * 3
    for layer_idx, cache in enumerate(caches):
        cache.fill_(float(layer_idx))
    assert (caches[2] == 2).all() and (caches[3] == 3).all()


@pytest.mark.parametrize("name", ["gemma4", "gemma4-small", "gemma4-experts"])
def test_answers_are_the_same_after_preemption_and_with_shared_prefixes(
    name: str, tmp_path: Path
) -> None:
    """Few blocks, of which both sizes of pages are made."""
    family = next(one for one in FAMILIES if one.name == name)
    folder = family.save(tmp_path)
    prefix = sequences(VOCAB_SIZE, (40, 40))[0].token_ids
    prompts = [[*prefix, *one.token_ids] for one in sequences(VOCAB_SIZE, (9, 9), (3, 3), (21, 21))]
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    answers: list[list[list[int]]] = []
    for num_blocks, num_seqs in ((64, 1), (28 if name == "gemma4-small" else 21, 3)):
        llm = LLM(
            str(folder), device="cpu", dtype="float32", max_model_len=128, max_num_seqs=num_seqs,
            kvcache_block_size=16, num_kvcache_blocks=num_blocks, enforce_eager=True,
            skip_tokenizer_init=True,
        )  # fmt: skip
        twice = [llm.generate(prompts, params, use_tqdm=False) for _ in range(2)]
        answers += [[output["token_ids"] for output in outputs] for outputs in twice]
        llm.close()
    assert all(one == answers[0] for one in answers)


def test_layers_read_the_caches_of_others(tmp_path: Path) -> None:
    """The last three layers add nothing to the cache, and have no weights of keys and values,
    whatever the checkpoint has."""
    family = next(one for one in FAMILIES if one.name == "gemma4-small")
    extra = "model.layers.5.self_attn.k_norm.weight"
    folder = edit(family.save(tmp_path), lambda weights: {**weights, extra: torch.ones(32)})
    runner = load(folder, "cpu", enforce_eager=True)
    caches = [cache.k_CBKH.data_ptr() for cache in runner.steps.caches]
    assert caches[3:] == [caches[1], caches[2], caches[2]]
    layers, groups = runner.params.layers, runner.model.page_groups
    assert [layer.k_norm_H is None for layer in layers] == [False] * 3 + [True] * 3
    assert [len(layer.down_DF[0]) for layer in layers] == [128] * 3 + [256] * 3
    with_all = load(
        family.save(tmp_path / "all", num_kv_shared_layers=0), "cpu", enforce_eager=True
    )
    per_token = [one.token_bytes(torch.float32) for one in (groups, with_all.model.page_groups)]
    # a layer with a window keeps 2 · 4 · 16 numbers of a token, a full one twice as many
    assert per_token == [4 * (256 + 128 + 256), 4 * (4 * 256 + 2 * 128)]


def test_experts_with_gelu_are_not_offloaded(tmp_path: Path) -> None:
    family = next(one for one in FAMILIES if one.name == "gemma4-experts")
    with pytest.raises(ValueError, match="activation 'gelu', and those are not offloaded"):
        load(family.save(tmp_path), "cpu", enforce_eager=True, expert_offload=3)


def test_whole_experts_on_each_rank_give_the_logits_of_one(tmp_path: Path) -> None:
    family = next(one for one in FAMILIES if one.name == "gemma4-experts")
    test_shards.check(family.save(tmp_path), 2, VOCAB_SIZE, enable_expert_parallel=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size_per_layer_input": -1}, "hidden_size_per_layer_input is -1"),
        (
            {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 98},
            "vocab_size_per_layer_input is 98: it must be at least vocab_size, 99",
        ),
        ({"num_kv_shared_layers": 5}, "num_kv_shared_layers is 5: it must be at least 0 and below"),
        (
            {
                "num_kv_shared_layers": 4,
                "layer_types": ["full_attention", *["sliding_attention"] * 3, "full_attention"],
            },
            "no layer of type 'sliding_attention' is left",
        ),
        ({"enable_moe_block": True}, "num_experts is null"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention 'all' is not"),
        ({"hidden_activation": "silu"}, "hidden_activation 'silu' is not supported"),
        ({"global_head_dim": 520}, "head_dim 520 is not supported: it must be .* up to 512"),
        ({"final_logit_softcapping": 0.0}, "final_logit_softcapping is 0.0"),
        ({"global_head_dim": 24}, "pages of different sizes, which is not supported unless"),
    ],
    ids=str,
)
def test_what_is_not_computed_is_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    fields = json.loads(json.dumps({**TEXT, "hidden_size": 64, "num_attention_heads": 4}))
    fields |= {"architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", **changes}
    with pytest.raises(ValueError, match=message):
        read(fields, tmp_path)[1].page_groups.check()
