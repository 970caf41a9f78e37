"""Pixel values and token ids of prompts for Gemma-3 equal those of transformers' processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm.media import mm_inputs, settings
from nanovllm.media.options import MediaOptions
from nanovllm.media.placeholders import Placeholders
from nanovllm.media.prepare import Prepared, Preparer
from nanovllm.tokenizer import Tokenizer
from tests.engines import save_tokenizer
from tests.media.vision_cases import picture

SPECIAL = {
    "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}  # fmt: skip
# as in the release, but smaller: 8 · 8 patches of 4 pixels, 16 tokens
IMAGE = {
    "image_processor_type": "Gemma3ImageProcessor", "do_pan_and_scan": None, "do_convert_rgb": None,
    "size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    "resample": 2, "rescale_factor": 1 / 255, "image_seq_length": 16,
}  # fmt: skip
CONFIG = {"vision_config": {"patch_size": 4, "image_size": 32}, "mm_tokens_per_image": 16}


def write(folder: Path, **changes: Any) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps({**IMAGE, **changes}))
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": "Gemma3Processor", "image_seq_length": 16})
    )
    (folder / "config.json").write_text(json.dumps(CONFIG))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' processor, and our settings and placeholders."""
    import transformers
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    folder = tmp_path_factory.mktemp("gemma3")
    save_tokenizer(folder)
    write(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, extra_special_tokens=SPECIAL)
    images = Gemma3ImageProcessorPil.from_pretrained(folder)
    theirs = transformers.Gemma3Processor(images, tokenizer, image_seq_length=16)
    found = settings.load(folder)
    assert found is not None
    return theirs, found, Placeholders(Tokenizer(lambda: tokenizer), False, **found.tokens)


def prepared(found: settings.VisionSettings, **data: Any) -> list[Prepared]:
    preparer = Preparer(found, MediaOptions(num_media_workers=2))
    try:
        return preparer.submit(mm_inputs.from_data(data)).result(60)
    finally:
        preparer.close()


@pytest.mark.parametrize("size", [(32, 32), (19, 99), (200, 150), (3, 500)])
def test_pixels_equal_transformers(both: Any, size: tuple[int, int]) -> None:
    theirs, found, _ = both
    image = picture(*size)
    expected = theirs.image_processor([image], return_tensors="pt")["pixel_values"][0]
    (ours,) = prepared(found, image=image)
    split = expected.reshape(3, 4, 2, 4, 4, 2, 4).permute(1, 4, 2, 5, 0, 3, 6)
    assert ours.grid == (1, 8, 8) and ours.num_tokens == 16
    assert torch.equal(ours.values, split.reshape(64, 48))


@pytest.mark.parametrize(
    "text", ["<start_of_image>", "see <start_of_image> and\n\n<start_of_image>\nwell", "no image"]
)
def test_token_ids_equal_transformers(both: Any, text: str) -> None:
    theirs, found, placeholders = both
    images = [picture(40, 30 + i) for i in range(text.count("<start"))]
    inputs = theirs(text=[text], images=images or None, return_tensors="pt")
    items = prepared(found, image=images) if images else []
    made = placeholders.of_text(text, items)
    assert made.token_ids == inputs["input_ids"][0].tolist()
    soft = theirs.tokenizer.image_token_id
    for ((start, num),) in made.spans:
        assert made.token_ids[start : start + num] == [soft] * 16
    assert sum(one == soft for one in made.token_ids) == 16 * len(images)


def test_tokens_of_images_that_were_not_given_are_refused(both: Any) -> None:
    _, found, placeholders = both
    (item,) = prepared(found, image=picture(9, 9))
    with pytest.raises(ValueError, match="'<image_soft_token>', which is made of images"):
        placeholders.of_text("<start_of_image> <image_soft_token>", [item])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_pan_and_scan": True}, "do_pan_and_scan=True, which is not supported"),
        ({"size": {"height": 32, "width": 48}}, "it must be a square"),
        ({"size": {"height": 36, "width": 36}}, "a multiple of 16, for 16 tokens"),
        ({"do_resize": False}, "do_resize=False, which is not supported"),
        ({"image_processor_type": "SiglipImageProcessor"}, "image_processor_type is 'Siglip"),
    ],
    ids=str,
)
def test_other_steps_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        settings.load(tmp_path)
