"""Gemma-3 with images: the tower's features, and answers in which tokens of an image see all of
it, are transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm import SamplingParams
from tests.models import gemma_images as cases
from tests.models.harness import load

NAME = "Gemma3ForConditionalGeneration"
VISION = {
    "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 4,
}  # fmt: skip
NUM_TOKENS, GRID = 16, (1, 8, 8)


def made(folder: Path, **vision: Any) -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config = Gemma3Config(
        text_config={**cases.TEXT, "query_pre_attn_scalar": 50},
        vision_config={**VISION, **vision},
        mm_tokens_per_image=NUM_TOKENS, image_token_index=cases.IMAGE, boi_token_index=cases.START,
        eoi_token_index=cases.END, tie_word_embeddings=False,
    )  # fmt: skip
    return cases.randomize(Gemma3ForConditionalGeneration(config).eval(), folder)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("gemma3")
    return made(folder), folder


def patches(image_CHW: Tensor) -> Tensor:
    """An image's patches, group by group."""
    split = image_CHW.reshape(3, 4, 2, 4, 4, 2, 4)
    return split.permute(1, 4, 2, 5, 0, 3, 6).reshape(64, 48)


def images(num: int, seed: int) -> Tensor:
    return torch.randn(num, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def prompts_of(hf: Any) -> tuple[list[Any], list[Any]]:
    """Prompts, and transformers' answers."""
    prompts, wanted = [], []
    for seed, parts in enumerate(cases.PROMPTS):
        ids, starts = cases.prompt_of(parts, NUM_TOKENS, seed)
        pixels = images(len(starts), seed)
        prompts.append(
            cases.media_prompt(ids, starts, NUM_TOKENS, [(patches(one), GRID) for one in pixels])
        )
        inputs = {"pixel_values": pixels} if starts else {}
        wanted.append(cases.expected(hf, ids, "token_type_ids", **inputs))
    return prompts, wanted


def test_features_are_those_of_transformers(both: Any) -> None:
    hf, folder = both
    pixels = images(3, 7)
    with torch.no_grad():
        expected = hf.model.get_image_features(pixels).pooler_output.flatten(0, 1)
    tower = load(folder, "cpu", enforce_eager=True).towers.by_name["vision"]
    found = tower.features(torch.cat([patches(one) for one in pixels]), [GRID] * 3)
    assert tower.budgets == (64,)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"12 patches on a side: images of .* have 8"):
        tower.features(torch.zeros(144, 48), [(1, 12, 12)])


SIZES = {
    "hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "layer_norm_eps": 0.1, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
UNREAD = {"attention_dropout": 0.0, "vision_use_head": False}


@pytest.mark.parametrize("changes", [SIZES, UNREAD], ids=["sizes", "unread"])
def test_fields_of_the_tower_are_honoured(changes: dict[str, Any], tmp_path: Path) -> None:
    from transformers import SiglipVisionConfig

    cases.check_fields(SiglipVisionConfig, [*VISION, "num_channels"], SIZES, UNREAD)
    hf, pixels = made(tmp_path, **changes), images(2, 5)
    with torch.no_grad():
        expected = hf.model.get_image_features(pixels).pooler_output.flatten(0, 1)
    tower = load(tmp_path, "cpu", enforce_eager=True).towers.by_name["vision"]
    found = tower.features(torch.cat([patches(one) for one in pixels]), [GRID] * 2)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-4)


@pytest.mark.shows("eager", "graph", "images", "GPU", architectures=[NAME])
@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graph"])
def test_answers_about_images_are_those_of_transformers(
    enforce_eager: bool, both: Any, device: str
) -> None:
    """In steps of few tokens, which split no image; again with shared prefixes."""
    hf, folder = both
    prompts, wanted = prompts_of(hf)
    options = {
        "enforce_eager": enforce_eager,
        "max_num_batched_tokens": 32 if enforce_eager else 16,
    }
    llm = cases.engine(folder, device=device, **options)
    try:
        assert llm.engine.scheduler.keeps_images_whole
        cases.check_answers(llm, prompts, wanted)
        again = cases.check_answers(llm, prompts, wanted)
    finally:
        llm.close()
    assert [one.num_cached_tokens for one in again] == [
        len(p.token_ids) // 16 * 16 for p in prompts
    ]


@pytest.mark.shows("ranks", architectures=[NAME])
def test_two_ranks_give_the_answers_of_transformers(both: Any) -> None:
    hf, folder = both
    prompts, wanted = prompts_of(hf)
    llm = cases.engine(folder, enforce_eager=True, tensor_parallel_size=2)
    try:
        cases.check_answers(llm, prompts[:2], wanted[:2])
    finally:
        llm.close()


def test_an_image_that_no_step_takes_is_refused(both: Any) -> None:
    _, folder = both
    llm = cases.engine(folder, enforce_eager=True, max_num_batched_tokens=16)
    embeddings = [(1, torch.zeros(17, 64))]
    try:
        with pytest.raises(ValueError, match="an image has 17 tokens, and max_num_batched_tokens"):
            llm.engine.add_request([1] * 19, SamplingParams(), embeddings=embeddings)
    finally:
        llm.close()


def test_names_of_the_release_are_read(both: Any, tmp_path: Path) -> None:
    """A module around the tower, and the part of SigLIP that makes one vector of an image."""
    from safetensors.torch import load_file, save_file

    _, folder = both
    weights = load_file(folder / "model.safetensors")
    assert any(name.startswith("vision_tower.head.") for name in weights)
    renamed = {
        name.replace("vision_tower.", "vision_tower.vision_model."): weight
        for name, weight in weights.items()
    }
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    pixels = torch.cat([patches(one) for one in images(1, 3)])
    first, second = (
        load(one, "cpu", enforce_eager=True).towers.by_name["vision"].features(pixels, [GRID])
        for one in (folder, tmp_path)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("vision_config", {"hidden_act": "gelu"}, "hidden_act 'gelu' of the vision tower"),
        (
            "vision_config",
            {"image_size": [32, 16]},
            r"image_size of the vision tower is \[32, 16\]",
        ),
        ("vision_config", {"model_type": "clip_vision_model"}, "'clip_vision_model' is not"),
        ("", {"mm_tokens_per_image": 12}, "mm_tokens_per_image is 12: it must be the square of a"),
        ("", {"mm_tokens_per_image": 9}, "mm_tokens_per_image is 9: it must be the square of a"),
    ],
    ids=str,
)
def test_what_the_tower_does_not_compute_is_refused(
    part: str, changes: dict[str, Any], message: str, both: Any, tmp_path: Path
) -> None:
    _, folder = both
    fields = json.loads((folder / "config.json").read_text())
    fields |= {part: fields[part] | changes} if part else changes
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        load(tmp_path, "cpu", enforce_eager=True)
