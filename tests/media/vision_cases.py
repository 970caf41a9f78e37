"""transformers' processors for tiny vision checkpoints, and ours for the same settings.

transformers' video processors work with torchvision. Here they get Pillow's resizing and plain
normalization in its place, so that they run without it and differ from ours in nothing else.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import json
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from nanovllm.media import settings
from nanovllm.media.options import MediaOptions
from nanovllm.media.placeholders import Placeholders
from nanovllm.media.prepare import Preparer
from nanovllm.media.settings import VisionSettings
from nanovllm.tokenizer import Tokenizer
from tests.engines import save_tokenizer

SPECIAL = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
CLIP = {"image_mean": list(settings.CLIP_MEAN), "image_std": list(settings.CLIP_STD)}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
QWEN2 = {
    "min_pixels": 3136, "max_pixels": 40000, "patch_size": 14, "temporal_patch_size": 2,
    "merge_size": 2, **CLIP, "image_processor_type": "Qwen2VLImageProcessor",
}  # fmt: skip
# preprocessor_config.json and video_preprocessor_config.json, small
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Qwen2VLProcessor": (QWEN2, {}),
    "Qwen2_5_VLProcessor": (QWEN2, {}),
    "Qwen3VLProcessor": (
        {
            "size": {"shortest_edge": 4096, "longest_edge": 65536}, "patch_size": 16,
            "temporal_patch_size": 2, "merge_size": 2, **HALF,
            "image_processor_type": "Qwen2VLImageProcessorFast",
        },
        {
            "size": {"shortest_edge": 4096, "longest_edge": 131072}, "patch_size": 16,
            "temporal_patch_size": 2, "merge_size": 2, **HALF,
            "video_processor_type": "Qwen3VLVideoProcessor",
        },
    ),
}  # fmt: skip


@dataclass
class Case:
    """A family: `theirs` is transformers' processor, the others are ours."""

    folder: Path
    theirs: Any
    settings: VisionSettings
    placeholders: Placeholders

    def preparer(self, **changes: Any) -> Preparer:
        return Preparer(self.settings, MediaOptions(**{"num_media_workers": 2, **changes}))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with edges and colours, of any size."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(1, height // 3), max(1, width // 3), 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)
    noise = rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8))


def make_case(family: str, folder: Path) -> Case:
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.processing_utils import ProcessorMixin

    image, video = FAMILIES[family]
    save_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**image, "processor_class": family})
    )
    if video:
        (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    parts = (
        Qwen2VLImageProcessorPil.from_pretrained(folder),
        tokenizer,
        video_class(family).from_pretrained(folder),
    )
    # without torchvision, it does not know the classes of video processors
    with mock.patch.object(ProcessorMixin, "check_argument_for_proper_class"):
        theirs = getattr(transformers, family)(*parts)
    found = settings.load(folder)
    assert found is not None
    ours = Placeholders(Tokenizer(lambda: tokenizer), found.with_times)
    return Case(folder, theirs, found, ours)


def video_class(family: str) -> Any:
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    if family == "Qwen3VLProcessor":
        return Qwen3VLVideoProcessor
    with _importable("torchvision.transforms.v2.functional"):
        from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

        return Qwen2VLVideoProcessor


@contextlib.contextmanager
def _importable(name: str) -> Iterator[None]:
    """Empty modules in the place of a missing package, while another module imports it."""
    parts = name.split(".")
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    missing = [one for one in names if one not in sys.modules]
    for one in missing:
        module = types.ModuleType(one)
        module.__spec__ = importlib.machinery.ModuleSpec(one, None)
        sys.modules[one] = module
        parent, _, child = one.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    try:
        yield
    finally:
        for one in missing:
            del sys.modules[one]


def _resize(frames: torch.Tensor, size: tuple[int, int], **_: Any) -> torch.Tensor:
    """[…, C, H, W] by Pillow's bicubic filter."""
    flat = frames.reshape(-1, *frames.shape[-3:]).permute(0, 2, 3, 1).numpy()
    done = [Image.fromarray(one).resize(size[::-1], Image.Resampling.BICUBIC) for one in flat]
    stacked = torch.from_numpy(np.stack([np.asarray(one) for one in done]))
    return stacked.permute(0, 3, 1, 2).reshape(*frames.shape[:-2], *size).contiguous()


def _normalize(frames: torch.Tensor, mean: Any, std: Any, **_: Any) -> torch.Tensor:
    mean, std = (torch.as_tensor(one)[:, None, None] for one in (mean, std))
    return (frames - mean) / std


@pytest.fixture
def without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import image_processing_backends as backends
    from transformers import video_processing_utils as videos

    functional = SimpleNamespace(
        resize=_resize,
        normalize=_normalize,
        grayscale_to_rgb=lambda frames: frames,
        InterpolationMode=SimpleNamespace(LANCZOS=object()),
    )
    for module in (backends, videos):
        monkeypatch.setattr(module, "tvF", functional, raising=False)
    same = {one: one for one in Image.Resampling}
    monkeypatch.setattr(backends, "pil_torch_interpolation_mapping", same)


@pytest.fixture(scope="session", params=list(FAMILIES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Every family in turn."""
    return make_case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case("Qwen3VLProcessor", tmp_path_factory.mktemp("qwen3_vl"))
