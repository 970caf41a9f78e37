"""Patches, grids and token ids equal transformers' own processors on the same inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nanovllm.media import clips, mm_inputs, patches
from nanovllm.media.prepare import Prepared
from tests.media.vision_cases import Case, picture

SIZES = [(1, 1), (19, 99), (99, 19), (28, 28), (32, 64), (200, 150), (989, 333), (3, 500), (400, 2)]


def prepared(case: Case, **data: Any) -> list[Prepared]:
    preparer = case.preparer()
    try:
        return preparer.submit(mm_inputs.from_data(data)).result(60)
    finally:
        preparer.close()


def theirs(case: Case, text: str, **media: Any) -> Any:
    return case.theirs(text=[text], return_tensors="pt", **media)


@pytest.mark.parametrize("size", SIZES)
def test_patches_of_an_image_equal_transformers(case: Case, size: tuple[int, int]) -> None:
    image = picture(*size)
    expected = case.theirs.image_processor([image], return_tensors="pt")
    (ours,) = prepared(case, image=image)
    assert ours.grid == tuple(expected["image_grid_thw"][0].tolist())
    assert torch.equal(ours.values, expected["pixel_values"])
    assert ours.values.dtype == torch.float32


def test_patches_of_several_images_are_in_order(case: Case) -> None:
    images = [picture(40 + 30 * i, 90, seed=i) for i in range(5)]
    expected = case.theirs.image_processor(images, return_tensors="pt")
    ours = prepared(case, image=images)
    assert torch.equal(torch.cat([one.values for one in ours]), expected["pixel_values"])
    assert [list(one.grid) for one in ours] == expected["image_grid_thw"].tolist()


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]
)
def test_modes_are_converted_as_in_transformers(qwen3: Case, mode: str) -> None:
    base = picture(70, 50)
    if "A" in mode and mode != "LAB":
        base.putalpha(picture(70, 50, seed=1).convert("L"))
    if mode == "PA":
        base = base.convert("LA")
    image = base.convert(mode)
    expected = qwen3.theirs.image_processor([image], return_tensors="pt")["pixel_values"]
    assert torch.equal(prepared(qwen3, image=image)[0].values, expected)


def test_a_transparent_colour_of_a_palette_lies_over_white(qwen3: Case) -> None:
    image = picture(70, 50).convert("P")
    image.info["transparency"] = image.getpixel((0, 0))
    expected = qwen3.theirs.image_processor([image], return_tensors="pt")["pixel_values"]
    assert torch.equal(prepared(qwen3, image=image)[0].values, expected)


@pytest.mark.parametrize("shape", [(50, 70, 1), (50, 70, 3), (50, 70, 4), (3, 50, 70), (4, 50, 70)])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_arrays_are_read_as_in_transformers(qwen3: Case, shape: tuple[int, ...], kind: str) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    image = torch.from_numpy(array) if kind == "torch" else array
    expected = qwen3.theirs.image_processor([image], return_tensors="pt")["pixel_values"]
    assert torch.equal(prepared(qwen3, image=image)[0].values, expected)


@pytest.mark.parametrize("num_frames", [2, 3, 5, 16])
def test_patches_of_a_video_equal_transformers(
    case: Case, without_torchvision: None, num_frames: int
) -> None:
    frames = [picture(110, 75, seed=i) for i in range(num_frames)]
    expected = case.theirs.video_processor([frames], return_tensors="pt", return_metadata=True)
    (ours,) = prepared(case, video=frames)
    assert ours.grid == tuple(expected["video_grid_thw"][0].tolist())
    assert torch.equal(ours.values, expected["pixel_values_videos"])


@pytest.mark.parametrize("given_fps", [None, 8.0])
def test_tokens_and_times_of_a_video_equal_transformers(
    case: Case, without_torchvision: None, given_fps: float | None
) -> None:
    frames = [picture(70, 50, seed=i) for i in range(11)]
    facts = {"fps": given_fps, "total_num_frames": 11, "frames_indices": list(range(11))}
    metadata = [facts] if given_fps else None
    text = "see <|vision_start|><|video_pad|><|vision_end|> and say"
    expected = theirs(case, text, videos=[frames], video_metadata=metadata)
    ours = prepared(case, video=(frames, {"fps": given_fps} if given_fps else {}))
    expanded = case.placeholders.of_text(text, ours)
    assert expanded.token_ids == expected["input_ids"][0].tolist()
    if "second_per_grid_ts" in expected:
        assert ours[0].seconds_per_grid == pytest.approx(float(expected["second_per_grid_ts"][0]))


VISION = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.mark.parametrize(
    "text",
    [
        f"{VISION}what is it?", f"the {VISION} in", f"the end{VISION}", VISION,
        f"a{VISION}{VISION}b", f"{VISION} and {VISION} and {VISION}", "bare<|image_pad|>token",
    ],
)  # fmt: skip
def test_token_ids_equal_transformers(case: Case, text: str) -> None:
    images = [picture(60 + 25 * i, 80, seed=i) for i in range(text.count("<|image_pad|>"))]
    expected = theirs(case, text, images=images)
    items = prepared(case, image=images)
    expanded = case.placeholders.of_text(text, items)
    assert expanded.token_ids == expected["input_ids"][0].tolist()
    short = case.theirs.tokenizer(text)["input_ids"]
    assert case.placeholders.of_ids(short, items) == expanded


def test_images_and_videos_are_placed_in_one_prompt(case: Case, without_torchvision: None) -> None:
    video = "<|vision_start|><|video_pad|><|vision_end|>"
    text = f"{video}then{VISION}and{video}{VISION}"
    images = [picture(60, 80), picture(90, 40)]
    videos = [
        [picture(70, 50, seed=i) for i in range(4)],
        [picture(50, 70, seed=i) for i in range(6)],
    ]
    expected = theirs(case, text, images=images, videos=videos)
    items = prepared(case, image=images, video=videos)
    expanded = case.placeholders.of_text(text, items)
    assert expanded.token_ids == expected["input_ids"][0].tolist()


def test_spans_are_the_placeholder_tokens(case: Case, without_torchvision: None) -> None:
    text = f"a{VISION}b<|vision_start|><|video_pad|><|vision_end|>c{VISION}"
    frames = [picture(70, 50, seed=i) for i in range(8)]
    items = prepared(case, image=[picture(60, 80), picture(90, 40)], video=frames)
    expanded = case.placeholders.of_text(text, items)
    tokenizer = case.theirs.tokenizer
    for kind in ("image", "video"):
        token = tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>")
        spans = [s for one, item in zip(expanded.spans, items) if item.kind == kind for s in one]
        positions = sorted(p for start, num in spans for p in range(start, start + num))
        assert positions == [i for i, one in enumerate(expanded.token_ids) if one == token]
    for item, spans in zip(items, expanded.spans):
        assert sum(num for _, num in spans) == item.num_tokens


def test_one_image_in_two_places_has_two_spans(qwen3: Case) -> None:
    image = picture(60, 80)
    items = prepared(qwen3, image=[image, image])
    expanded = qwen3.placeholders.of_text(f"{VISION}x{VISION}", items)
    (first,), (second,) = expanded.spans
    assert first[0] < second[0] and first[1] == second[1] == items[0].num_tokens


@pytest.mark.parametrize("cap", [False, True])
@pytest.mark.parametrize("num_frames", [2, 3, 7, 40])
@pytest.mark.parametrize("size", [(1, 1), (20, 300), (720, 405), (33, 989)])
def test_sizes_of_frames_equal_transformers(
    case: Case, without_torchvision: None, num_frames: int, size: tuple[int, int], cap: bool
) -> None:
    processor = case.theirs.video_processor
    settings = case.settings.video
    settings = type(settings)(**{**vars_of(settings), "cap_pixels_per_frame": cap})
    frames = torch.zeros(1, num_frames, 3, *size, dtype=torch.uint8)
    from transformers.image_utils import SizeDict

    resized = processor.resize(
        frames,
        size=SizeDict(shortest_edge=settings.min_pixels, longest_edge=settings.max_pixels),
        resample=Image.Resampling.BICUBIC,
        factor=settings.factor,
        temporal_factor=2,
        cap_pixels_per_frame=cap,
    )
    assert patches.video_size(num_frames, *size, settings) == tuple(resized.shape[-2:])


def vars_of(settings: Any) -> dict[str, Any]:
    from dataclasses import fields

    return {one.name: getattr(settings, one.name) for one in fields(settings)}


@pytest.mark.parametrize("total", [1, 2, 3, 19, 99, 989])
@pytest.mark.parametrize("fps", [7.0, 24.0, 29.97])
@pytest.mark.parametrize("how", [{"fps": 2}, {"fps": 0.5}, {"num_frames": 4}, {}])
def test_sampled_frames_equal_transformers(
    case: Case, total: int, fps: float, how: dict[str, Any]
) -> None:
    from transformers.video_utils import VideoMetadata

    processor = case.theirs.video_processor
    ours = {**vars_of(case.settings.video), "do_sample_frames": True, "fps": None, **how}
    settings = type(case.settings.video)(**ours)
    clip = clips.Clip(total, fps, lambda chosen: iter(()))
    if not how and not settings.over_time:  # transformers compares None with a number here
        assert list(clips.sampled(clip, settings)) == list(range(total))
        return
    try:
        expected = processor.sample_frames(VideoMetadata(total, fps=fps), **how).tolist()
    except (ValueError, ZeroDivisionError, RuntimeError):
        with pytest.raises(ValueError, match=f"the video has {total} frames"):
            clips.sampled(clip, settings)
        return
    assert list(clips.sampled(clip, settings)) == expected
