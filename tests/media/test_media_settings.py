"""A checkpoint's processor files, in the layouts of old and new releases."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from nanovllm.media import patches, settings
from tests.media.vision_cases import FAMILIES, Case, video_class

IMAGES = [
    {},
    {"min_pixels": 3136, "max_pixels": 12845056},
    {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16},
    {"size": {"shortest_edge": 100, "longest_edge": 5000}, "max_pixels": 9000},
    {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "rescale_factor": 0.01},
    {"do_rescale": False, "do_normalize": False, "resample": 2, "merge_size": 1},
]


def write(folder: Path, name: str, found: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(found))


def assert_equal(ours: Any, theirs: Any) -> None:
    for one in fields(settings.PatchSettings):
        if one.name in ("fixed_size", "max_tokens"):  # of other families
            continue
        if one.name in ("min_pixels", "max_pixels"):
            edge = "shortest_edge" if one.name == "min_pixels" else "longest_edge"
            expected = theirs.size[edge]
        else:
            expected = getattr(theirs, one.name)
        value = getattr(ours, one.name)
        assert (list(value) if isinstance(value, tuple) else value) == (
            list(expected) if isinstance(expected, (list, tuple)) else expected
        ), one.name


@pytest.mark.parametrize("found", IMAGES)
def test_image_settings_equal_transformers(tmp_path: Path, found: dict[str, Any]) -> None:
    write(tmp_path, "preprocessor_config.json", {**found, "processor_class": "Qwen2VLProcessor"})
    ours = settings.load(tmp_path)
    assert ours is not None
    assert_equal(ours.image, Qwen2VLImageProcessorPil.from_pretrained(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("extra", [{}, {"fps": 1.5, "max_frames": 9}, {"num_frames": 6}])
def test_video_settings_equal_transformers(
    tmp_path: Path, family: str, extra: dict[str, Any]
) -> None:
    image, video = FAMILIES[family]
    write(tmp_path, "preprocessor_config.json", {**image, "processor_class": family, **extra})
    if video:
        write(tmp_path, "video_preprocessor_config.json", {**video, **extra})
    ours, theirs = settings.load(tmp_path), video_class(family).from_pretrained(tmp_path)
    assert ours is not None
    assert_equal(ours.video, theirs)
    for name in ("fps", "num_frames", "min_frames", "max_frames", "do_sample_frames"):
        assert getattr(ours.video, name) == getattr(theirs, name), name
    assert ours.video.max_video_tokens == theirs.max_video_tokens


def test_the_nested_file_of_new_releases_gives_the_same(case: Case, tmp_path: Path) -> None:
    case.theirs.save_pretrained(tmp_path)
    assert settings.load(tmp_path) == case.settings


def test_a_text_model_has_no_vision(tmp_path: Path) -> None:
    assert settings.load(tmp_path) is None


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"processor_class": "LlavaProcessor"}, "processor_class is 'LlavaProcessor'.*Qwen2VL"),
        ({}, "processor_class is None"),
        ({"image_processor_type": "CLIPImageProcessor"}, "is 'CLIPImageProcessor'"),
        ({"video_processor_type": "Other"}, "video_processor_type is 'Other'"),
        ({"do_resize": False}, "do_resize=False, which is not supported"),
        ({"do_center_crop": True}, "crops or pads"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"image_mean": [0.5]}, "3 numbers each"),
    ],
)
def test_other_processors_are_refused(tmp_path: Path, found: dict[str, Any], message: str) -> None:
    known = {"processor_class": "Qwen2VLProcessor"} if found else {"patch_size": 14}
    write(tmp_path, "preprocessor_config.json", {**known, **found})
    with pytest.raises(ValueError, match=message):
        settings.load(tmp_path)


def test_a_broken_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json cannot be read"):
        settings.load(tmp_path)


@pytest.mark.parametrize("found", IMAGES)
def test_tables_of_bytes_equal_transformers(found: dict[str, Any]) -> None:
    ours = settings.image_settings(found)
    theirs = Qwen2VLImageProcessorPil(**found)
    values = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    if theirs.do_rescale:
        values = theirs.rescale(values, theirs.rescale_factor)
    if theirs.do_normalize:
        values = theirs.normalize(values, theirs.image_mean, theirs.image_std)
    assert np.array_equal(patches.image_table(ours), values[:, 0])
    assert patches.image_table(ours).dtype == np.float32


def test_each_setting_changes_the_digest() -> None:
    base = settings.image_settings({})
    others = [settings.image_settings(one) for one in IMAGES[1:]]
    assert len({one.digest for one in (base, *others)}) == len(IMAGES)


@pytest.mark.parametrize("size", [(1, 201), (989, 4), (1, 100000)])
def test_extreme_ratios_are_refused(size: tuple[int, int]) -> None:
    message = f"{size[1]} × {size[0]} pixels: one side may be at most 200 times"
    with pytest.raises(ValueError, match=message):
        patches.image_size(*size, settings.image_settings({}))
