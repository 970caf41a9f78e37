"""Pixel values and token ids of prompts for Gemma 4 equal those of transformers' processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm.media import patches, settings
from nanovllm.media.placeholders import Placeholders
from nanovllm.tokenizer import Tokenizer
from tests.engines import save_tokenizer
from tests.media.test_media_gemma3 import prepared
from tests.media.vision_cases import picture

IMAGE = {
    "image_processor_type": "Gemma4ImageProcessor", "do_normalize": False, "patch_size": 4,
    "pooling_kernel_size": 3, "max_soft_tokens": 70, "image_mean": [0.0] * 3,
    "image_std": [1.0] * 3, "resample": 3, "rescale_factor": 1 / 255,
}  # fmt: skip
SIZES = [(84, 120), (19, 99), (99, 19), (32, 64), (200, 150), (989, 333), (3, 900), (900, 3)]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' image processor and tokenizer, and our settings and placeholders."""
    import transformers
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    folder = tmp_path_factory.mktemp("gemma4")
    save_tokenizer(folder)
    write(folder)
    extra = settings.GEMMA4_TOKENS
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, extra_special_tokens=extra)
    found = settings.load(folder)
    assert found is not None
    ours = Placeholders(Tokenizer(lambda: tokenizer), False, **found.tokens)
    return Gemma4ImageProcessorPil.from_pretrained(folder), tokenizer, found, ours


def write(folder: Path, **changes: Any) -> None:
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": "Gemma4Processor", "image_processor": {**IMAGE, **changes}})
    )
    (folder / "preprocessor_config.json").write_text(json.dumps({**IMAGE, **changes}))


@pytest.mark.parametrize("size", SIZES)
def test_pixels_equal_transformers(both: Any, size: tuple[int, int]) -> None:
    theirs, _, found, _ = both
    image = picture(*size)
    expected = theirs([image], return_tensors="pt")
    (ours,) = prepared(found, image=image)
    _, rows, columns = ours.grid
    assert ours.num_tokens == int(expected["num_soft_tokens_per_image"][0]) <= 70
    last = expected["image_position_ids"][0, rows * columns - 1].tolist()
    assert last == [columns - 1, rows - 1]
    pixels = expected["pixel_values"][0, : rows * columns]
    split = (2 * (pixels - 0.5)).reshape(rows // 3, 3, columns // 3, 3, 4, 4, 3)
    wanted = split.permute(0, 2, 1, 3, 6, 4, 5).reshape(rows * columns, 48)
    assert torch.equal(ours.values, wanted)


def test_sizes_equal_transformers(both: Any) -> None:
    from transformers.models.gemma4 import image_processing_pil_gemma4 as theirs

    _, _, found, _ = both
    for height in (1, 2, 7, 36, 99, 1000):
        for width in (1, 3, 36, 500, 989):
            sizes = {"patch_size": 4, "max_patches": 630, "pooling_kernel_size": 3}
            expected = theirs.get_aspect_ratio_preserving_size(height, width, **sizes)
            assert patches.image_size(height, width, found.image) == expected


def test_token_ids_are_those_of_the_replaced_text(both: Any) -> None:
    """transformers' processor also needs a video processor: its replacement is written out."""
    _, tokenizer, found, placeholders = both
    images = [picture(40, 30), picture(90, 20)]
    items = prepared(found, image=images)
    text = "see <|image|> and\n<|image|>\nwell"
    made = placeholders.of_text(text, items)
    for one in items:
        text = text.replace("<|image|>", f"<|image>{'<x>' * one.num_tokens}<image|>", 1)
    assert made.token_ids == tokenizer.encode(text.replace("<x>", "<|image|>"))
    assert [num for ((_, num),) in made.spans] == [one.num_tokens for one in items]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_resize": False}, "do_resize=False, which is not supported"),
        ({"do_normalize": True, "image_mean": [0.5] * 3}, r"image_mean=\[0.5, 0.5, 0.5\], which"),
        ({"image_processor_type": "SiglipImageProcessor"}, "image_processor_type is 'Siglip"),
        ({"max_soft_tokens": -1}, "max_soft_tokens is -1"),
    ],
    ids=str,
)
def test_other_steps_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        settings.load(tmp_path)
