"""Gemma 4 with images: the tower's features, and answers of the small models (inputs of layers,
causal images) and the large ones (images that see themselves in windows), are transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import tiny_config
from tests.models import gemma_images as cases
from tests.models.harness import load

NAME = "Gemma4ForConditionalGeneration"
VISION = {
    "hidden_size": 64, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "patch_size": 4, "pooling_kernel_size": 2,
    "position_embedding_size": 20,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99,
        "num_kv_shared_layers": 1, "vision": {"use_clipped_linears": True},
    },
    "large": {
        "hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision",
        "vision": {"standardize": True},
    },
}  # fmt: skip
NUM_TOKENS, ROWS, COLUMNS = 16, 4, 16  # 2 · 8 tokens


def made(name: str, folder: Path, **changes: Any) -> Any:
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    own = {**MODELS[name], **changes}
    vision = {**VISION, **own.pop("vision")}
    text = tiny_config("gemma4_text", **{**cases.TEXT, "global_head_dim": 32, **own}).to_dict()
    config = Gemma4Config(
        text_config=text, vision_config=vision, audio_config=None, image_token_id=cases.IMAGE,
        boi_token_id=cases.START, eoi_token_id=cases.END, video_token_id=93, audio_token_id=94,
        tie_word_embeddings=False,
    )  # fmt: skip
    config.text_config.tie_word_embeddings = False
    hf = Gemma4ForConditionalGeneration(config).eval()
    for number, (buffer_name, buffer) in enumerate(hf.named_buffers()):
        if buffer_name.endswith(("put_min", "put_max")):
            buffer.fill_((0.8 + 0.01 * (number % 7)) * (-1 if buffer_name.endswith("min") else 1))
        if "std_" in buffer_name:
            torch.nn.init.normal_(buffer, mean=1.0, std=0.2)
    return cases.randomize(hf, folder)


@pytest.fixture(scope="module", params=MODELS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    return made(request.param, folder), folder


def patches(num: int, seed: int, rows: int = ROWS, columns: int = COLUMNS) -> tuple[Tensor, Any]:
    """Patches as the engine has them, group by group and colour by colour, of each image; and
    transformers' inputs with padding."""
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.rand(num, rows, columns, 4, 4, 3, generator=draw)  # rows and columns of patches
    ours = (2 * pixels - 1).reshape(num, rows // 2, 2, columns // 2, 2, 4, 4, 3)
    ours = ours.permute(0, 1, 3, 2, 4, 7, 5, 6).reshape(num, rows * columns, 48)
    col, row = torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="xy")
    places = torch.stack((col, row), dim=-1).reshape(1, -1, 2).expand(num, -1, -1)
    padded = torch.cat((pixels.reshape(num, rows * columns, 48), torch.zeros(num, 16, 48)), dim=1)
    places = torch.cat((places, torch.full((num, 16, 2), -1)), dim=1)
    return ours, {"pixel_values": padded, "image_position_ids": places}


def prompts_of(hf: Any) -> tuple[list[Any], list[Any]]:
    """Prompts, and transformers' answers."""
    prompts, wanted = [], []
    for seed, parts in enumerate(cases.PROMPTS):
        ids, starts = cases.prompt_of(parts, NUM_TOKENS, seed)
        ours, inputs = patches(len(starts), seed)
        images = [(one, (1, ROWS, COLUMNS)) for one in ours]
        prompts.append(cases.media_prompt(ids, starts, NUM_TOKENS, images))
        wanted.append(cases.expected(hf, ids, "mm_token_type_ids", **(inputs if starts else {})))
    return prompts, wanted


def test_features_are_those_of_transformers(both: Any) -> None:
    hf, folder = both
    tower = load(folder, "cpu", enforce_eager=True).towers.by_name["vision"]
    for num, rows, columns in ((2, 4, 16), (1, 10, 6)):
        ours, inputs = patches(num, 7, rows, columns)
        with torch.no_grad():
            expected = torch.cat(list(hf.model.get_image_features(**inputs).pooler_output))
        found = tower.features(ours.flatten(0, 1), [(1, rows, columns)] * num)
        torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"22 patches on a side: images of .* have at most 20"):
        tower.features(torch.zeros(44, 48), [(1, 2, 22)])


SIZES = {
    "hidden_size": 96, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 6,
    "num_key_value_heads": 6, "head_dim": 16, "rms_norm_eps": 0.1, "position_embedding_size": 30,
    "use_clipped_linears": False, "standardize": False,
    "rope_parameters": {"rope_type": "axial", "rope_theta": 50.0},
}  # fmt: skip
UNREAD = {"attention_bias": True, "attention_dropout": 0.5, "max_position_embeddings": 7}
SAME = {"hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02}


@pytest.mark.parametrize("changes", [SIZES, UNREAD], ids=["sizes", "unread"])
def test_fields_of_the_tower_are_honoured(changes: dict[str, Any], tmp_path: Path) -> None:
    """Patches and groups have other sizes than by default in all tests."""
    from transformers import Gemma4VisionConfig

    cases.check_fields(Gemma4VisionConfig, [*VISION, *SAME], SIZES, UNREAD)
    vision = {**MODELS["small"]["vision"], **changes}
    hf, (ours, inputs) = made("small", tmp_path, vision=vision), patches(2, 5)
    with torch.no_grad():
        expected = torch.cat(list(hf.model.get_image_features(**inputs).pooler_output))
    tower = load(tmp_path, "cpu", enforce_eager=True).towers.by_name["vision"]
    found = tower.features(ours.flatten(0, 1), [(1, ROWS, COLUMNS)] * 2)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-4)


@pytest.mark.shows("eager", "images", "GPU", architectures=[NAME])
def test_answers_about_images_are_those_of_transformers(both: Any, device: str) -> None:
    """In steps of at most 32 tokens; again with shared prefixes."""
    hf, folder = both
    prompts, wanted = prompts_of(hf)
    llm = cases.engine(folder, enforce_eager=True, device=device)
    try:
        is_large = hf.config.text_config.use_bidirectional_attention == "vision"
        assert llm.engine.scheduler.keeps_images_whole == is_large
        cases.check_answers(llm, prompts, wanted)
        again = cases.check_answers(llm, prompts, wanted)
    finally:
        llm.close()
    assert [one.num_cached_tokens for one in again] == [
        len(p.token_ids) // 16 * 16 for p in prompts
    ]


@pytest.mark.shows("graph", "ranks", architectures=[NAME])
def test_graphs_and_ranks_give_the_answers_of_transformers(tmp_path: Path) -> None:
    one = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "num_kv_shared_layers": 0}
    hf = made("small", tmp_path, **one)  # each kind of layer takes long to compile
    prompts, wanted = prompts_of(hf)
    for options in ({"tensor_parallel_size": 2, "enforce_eager": True}, {}):
        llm = cases.engine(
            tmp_path, max_num_batched_tokens=16, vision_patch_budgets=[64], **options
        )
        try:
            cases.check_answers(llm, prompts[:2], wanted[:2])
        finally:
            llm.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_activation": "gelu"}, "hidden_activation 'gelu' of the vision tower"),
        ({"num_key_value_heads": 1}, "num_key_value_heads 1 of the vision tower"),
        ({"head_dim": 24}, "head_dim 24 of the vision tower"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}},
            "rope_type 'linear' of the vision tower",
        ),
    ],
    ids=str,
)
def test_what_the_tower_does_not_compute_is_refused(
    changes: dict[str, Any], message: str, both: Any, tmp_path: Path
) -> None:
    _, folder = both
    fields = json.loads((folder / "config.json").read_text())
    fields["vision_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        load(tmp_path, "cpu", enforce_eager=True)
