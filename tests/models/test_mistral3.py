"""Checkpoints of Mistral 3 answer text as transformers does, in both spellings of their tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm import LLM
from tests.conftest import tiny_config
from tests.models import test_shards
from tests.models.families import GROWING, VOCAB_SIZE, WINDOWS
from tests.models.harness import engine_logits, load, max_difference, sequences
from tests.models.routes import edit

NAME = "Mistral3ForConditionalGeneration"
LENGTHS = ((1, 6), (19, 24), (99, 103))
VISION = {
    "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "head_dim": 16, "image_size": 28, "patch_size": 14,
}  # fmt: skip
TEXT: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": None}, "ministral3": GROWING}


def save(folder: Path, model_type: str, *, tied: bool = False) -> Path:
    """A checkpoint as transformers writes it."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    torch.manual_seed(0)
    own = {"vocab_size": VOCAB_SIZE, "pad_token_id": None, "tie_word_embeddings": tied}
    text = tiny_config(model_type, **own, **TEXT[model_type])
    config = Mistral3Config(
        text_config=text, vision_config=VISION, image_token_index=7, tie_word_embeddings=tied
    )
    Mistral3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits_of_text(folder: Path, token_ids: list[int]) -> Tensor:
    from transformers import Mistral3ForConditionalGeneration

    model = Mistral3ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()(torch.tensor([token_ids])).logits[0]


def as_on_the_hub(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of tensors in published checkpoints."""

    def name(one: str) -> str:
        if one == "lm_head.weight":
            return "language_model.lm_head.weight"
        text = "model.language_model."
        if one.startswith(text):
            return "language_model.model." + one.removeprefix(text)
        return one.removeprefix("model.")

    return {name(one): weight for one, weight in weights.items()}


@pytest.mark.shows("eager", "graph", architectures=[NAME])
@pytest.mark.parametrize(
    ("model_type", "tied", "published", "eager"),
    [
        ("mistral", False, True, True),
        ("ministral3", True, False, True),
        ("ministral3", False, True, True),
        ("mistral", False, True, False),
    ],
)
def test_logits_of_text_are_those_of_transformers(
    model_type: str, tied: bool, published: bool, eager: bool, tmp_path: Path
) -> None:
    folder, known = save(tmp_path, model_type, tied=tied), sequences(VOCAB_SIZE, *LENGTHS)
    expected = [logits_of_text(folder, ids) for ids, _ in known]
    if published:
        edit(folder, as_on_the_hub)
    found = engine_logits(load(folder, "cpu", enforce_eager=eager, graph_batch_sizes=[4]), known)
    assert max_difference(found, expected) <= 1e-4


@pytest.mark.shows("ranks", architectures=[NAME])
def test_ranks_give_the_logits_of_one(tmp_path: Path) -> None:
    test_shards.check(save(tmp_path, "mistral"), 2, VOCAB_SIZE)


def test_images_are_refused_by_name(tmp_path: Path) -> None:
    llm = LLM(
        str(save(tmp_path, "mistral")), device="cpu", enforce_eager=True, num_kvcache_blocks=9,
        max_model_len=64, skip_tokenizer_init=True,
    )  # fmt: skip
    prompt = {"prompt_token_ids": [7, 8], "multi_modal_data": {"image": torch.zeros(3, 28, 28)}}
    with pytest.raises(ValueError, match="accepts text only"):
        llm.generate([prompt], use_tqdm=False)
    llm.close()


def test_another_text_model_is_refused_by_name(tmp_path: Path) -> None:
    path = save(tmp_path, "mistral") / "config.json"
    config = json.loads(path.read_text())
    config["text_config"] = {"model_type": "qwen2", **WINDOWS}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"'qwen2' does not go with the architecture {NAME}"):
        load(tmp_path, "cpu", enforce_eager=True)
