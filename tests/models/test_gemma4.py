"""Gemma 4: checkpoints with encoders, pages of two sizes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from tests.conftest import tiny_config
from tests.models.families import FAMILIES, GEMMA4, VOCAB_SIZE
from tests.models.harness import engine_logits, load, max_difference, sequences
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


def test_answers_are_the_same_after_preemption_and_with_shared_prefixes(tmp_path: Path) -> None:
    """Few blocks, of which both sizes of pages are made."""
    family = next(one for one in FAMILIES if one.name == "gemma4")
    folder = family.save(tmp_path)
    prefix = sequences(VOCAB_SIZE, (40, 40))[0].token_ids
    prompts = [[*prefix, *one.token_ids] for one in sequences(VOCAB_SIZE, (9, 9), (3, 3), (21, 21))]
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    answers: list[list[list[int]]] = []
    for num_blocks, num_seqs in ((64, 1), (21, 3)):
        llm = LLM(
            str(folder), device="cpu", dtype="float32", max_model_len=128, max_num_seqs=num_seqs,
            kvcache_block_size=16, num_kvcache_blocks=num_blocks, enforce_eager=True,
            skip_tokenizer_init=True,
        )  # fmt: skip
        twice = [llm.generate(prompts, params, use_tqdm=False) for _ in range(2)]
        answers += [[output["token_ids"] for output in outputs] for outputs in twice]
        llm.close()
    assert all(one == answers[0] for one in answers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size_per_layer_input": 16}, "hidden_size_per_layer_input 16 is not supported"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers 2 is not supported"),
        ({"enable_moe_block": True}, "enable_moe_block True is not supported"),
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
