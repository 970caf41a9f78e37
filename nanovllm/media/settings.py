"""The settings of a checkpoint's image, video and audio processors, from its JSON files.

These are the files and defaults of transformers' `Qwen2VLImageProcessor`, `Qwen2VLVideoProcessor`
and `Qwen3VLVideoProcessor`. They are implemented here: transformers' video processors need
torchvision, whose builds fit only some builds of torch, and results would depend on it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
HALVED: dict[str, Any] = {"image_mean": HALF, "image_std": HALF}
BILINEAR, BICUBIC = 2, 3
IMAGE_TYPES = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")
VIDEO_TYPES = {"Qwen2VLVideoProcessor": False, "Qwen3VLVideoProcessor": True}
# transformers' classes of whole processors, and whether frames have times in the prompt
OMNI = "Qwen2_5OmniProcessor"
GEMMA3 = "Gemma3Processor"
PROCESSORS = {
    "Qwen2VLProcessor": False, "Qwen2_5_VLProcessor": False, "Qwen3VLProcessor": True, OMNI: False,
}  # fmt: skip
# special tokens by the fields of `Placeholders`, where they are not those of its defaults
TOKENS: dict[str, dict[str, str]] = {
    OMNI: {
        "image_token": "<|IMAGE|>", "video_token": "<|VIDEO|>", "audio_token": "<|AUDIO|>",
        "start_token": "<|vision_bos|>", "end_token": "<|vision_eos|>",
    },
    GEMMA3: {
        "image_token": "<start_of_image>", "video_token": "", "run_token": "<image_soft_token>",
        "image_text": "\n\n<start_of_image><image_soft_token><end_of_image>\n\n",
    },
}  # fmt: skip
# the special tokens of Gemma 4 by their names in tokenizer_config.json, which may have others
GEMMA4 = "Gemma4Processor"
GEMMA4_TOKENS = {
    "boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>",
}  # fmt: skip
GEMMA4_TYPES = ("Gemma4ImageProcessor", "Gemma4ImageProcessorPil")
GEMMA3_TYPES = ("Gemma3ImageProcessor", "Gemma3ImageProcessorFast", "Gemma3ImageProcessorPil")
AUDIO_TYPE = "WhisperFeatureExtractor"
# the files with settings among those that transformers reads
FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


@dataclass(frozen=True)
class PatchSettings:
    """How an image becomes patches.

    patch_size: pixels of a patch's side. merge_size: patches of a merged patch's side; a merged
    patch is one token. temporal_patch_size: frames of a patch.
    min_pixels, max_pixels: the range of pixels after resizing. fixed_size: (height, width) of all
    images after resizing, whatever their shape was; None if these keep their shape. max_tokens:
    the most tokens of an image, which is resized to nearly as many; 0 for a range of pixels.
    """

    patch_size: int
    min_pixels: int
    max_pixels: int
    temporal_patch_size: int = 2
    merge_size: int = 2
    resample: int = BICUBIC
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    fixed_size: tuple[int, int] | None = None
    max_tokens: int = 0

    def __post_init__(self) -> None:
        if type(self.max_tokens) is not int or self.max_tokens < 0:
            raise ValueError(f"the processor's max_soft_tokens is {self.max_tokens!r}")
        for name in ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"the processor's {name} is {value!r}: it must be at least 1")
        if len(self.image_mean) != 3 or len(self.image_std) != 3:
            raise ValueError("the processor's image_mean and image_std must have 3 numbers each")

    @property
    def factor(self) -> int:
        """Pixels of a token's side."""
        return self.patch_size * self.merge_size

    @cached_property
    def digest(self) -> bytes:
        return hashlib.sha256(repr(self).encode()).digest()


@dataclass(frozen=True)
class VideoSettings(PatchSettings):
    """How frames become patches.

    over_time: the range of pixels is for all frames together (Qwen3), not for each.
    default_fps: frames a second of videos that come without it. The others are fields of
    transformers' video processors.
    """

    over_time: bool = False
    default_fps: float = 24.0
    do_sample_frames: bool = False
    fps: float | None = None
    num_frames: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 128000


@dataclass(frozen=True)
class AudioSettings:
    """How samples become mel features: fields of transformers' feature extractor of Whisper.

    feature_size: mel bins. hop_length: samples between two frames. n_fft: samples of a window.
    chunk_length: seconds of the longest clip.
    """

    sampling_rate: int = 16000
    feature_size: int = 80
    hop_length: int = 160
    n_fft: int = 400
    chunk_length: int = 30

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if type(value) is not int or value < 1:
                raise ValueError(
                    f"the feature extractor's {one.name} is {value!r}: it must be at least 1"
                )

    @property
    def max_samples(self) -> int:
        return self.chunk_length * self.sampling_rate

    @cached_property
    def digest(self) -> bytes:
        return hashlib.sha256(repr(self).encode()).digest()


@dataclass(frozen=True)
class VisionSettings:
    """A checkpoint's settings for images, and for videos and audio if its model takes them.

    with_times: its prompts have the times of frames. tokens: its special tokens, by the fields of
    `Placeholders`, where they are not the defaults.
    """

    image: PatchSettings
    video: VideoSettings | None
    with_times: bool
    audio: AudioSettings | None = None
    tokens: Mapping[str, str] = field(default_factory=dict)


def load(folder: Path) -> VisionSettings | None:
    """The settings of a checkpoint; None if it has no image processor. Raises ValueError for a
    processor that is not supported."""
    whole, image_file, video_file = (_json(folder / name) for name in FILES)
    image = whole.get("image_processor") or image_file
    if not image:
        return None
    video = whole.get("video_processor") or video_file or image
    name = whole.get("processor_class") or image.get("processor_class")
    _check("processor_class", name, (*PROCESSORS, GEMMA3, GEMMA4))
    if name == GEMMA4:
        tokens = _gemma4_tokens(_json(folder / "tokenizer_config.json"))
        return VisionSettings(gemma4_settings(image), None, False, tokens=tokens)
    if name == GEMMA3:
        settings = gemma3_settings(whole, image, _json(folder / "config.json"))
        return VisionSettings(settings, None, False, tokens=TOKENS[GEMMA3])
    _check("image_processor_type", image.get("image_processor_type", IMAGE_TYPES[0]), IMAGE_TYPES)
    with_times = PROCESSORS[str(name)]
    default = "Qwen3VLVideoProcessor" if with_times else "Qwen2VLVideoProcessor"
    video_type = video.get("video_processor_type", default)
    _check("video_processor_type", video_type, tuple(VIDEO_TYPES))
    tokens = TOKENS.get(str(name), {})
    audio = None
    if "audio_token" in tokens:
        audio = audio_settings(whole.get("feature_extractor") or image_file)
        # transformers' processor has a separate size and rate for videos
        others = {key: value for key, value in video.items() if not key.endswith("_pixels")}
        video = {**others, "size": None, "default_fps": 2.0}
    over_time = VIDEO_TYPES[video_type]
    return VisionSettings(
        image_settings(image), video_settings(video, over_time=over_time), with_times, audio, tokens
    )


def image_settings(given: Mapping[str, Any]) -> PatchSettings:
    """The settings in the fields of an image processor, with the defaults of Qwen2-VL's."""
    low, high = _pixel_range(given, 56 * 56, 28 * 28 * 1280)
    _check_steps(given)
    return PatchSettings(**{"patch_size": 14, **_fields(PatchSettings, given, low, high)})


def gemma3_settings(
    whole: Mapping[str, Any], given: Mapping[str, Any], config: Mapping[str, Any]
) -> PatchSettings:
    """The settings in the fields of Gemma-3's processor and image processor, with their defaults.
    Patches and tokens are those of the model's config. Raises ValueError for other steps."""
    _check("image_processor_type", given.get("image_processor_type", GEMMA3_TYPES[0]), GEMMA3_TYPES)
    if given.get("do_pan_and_scan"):
        raise ValueError("the processor has do_pan_and_scan=True, which is not supported")
    _check_steps(given)
    size = {"height": 224, "width": 224, **(given.get("size") or {})}
    vision, num_tokens = config.get("vision_config") or {}, config.get("mm_tokens_per_image", 256)
    patch_size, side = vision.get("patch_size", 16), math.isqrt(num_tokens)
    if whole.get("image_seq_length", given.get("image_seq_length", num_tokens)) != num_tokens:
        raise ValueError(
            f"the processor's image_seq_length is {whole.get('image_seq_length')}: it must be the "
            f"model's mm_tokens_per_image, {num_tokens}"
        )
    if set(size) != {"height", "width"} or size["height"] != size["width"]:
        raise ValueError(f"the processor's size is {size}: it must be a square")
    if size["height"] % (patch_size * side):
        raise ValueError(
            f"the processor's images have {size['height']} pixels on a side: it must be a multiple "
            f"of {patch_size * side}, for {num_tokens} tokens"
        )
    defaults = {"resample": BILINEAR, "image_mean": HALF, "image_std": HALF}
    found = _fields(PatchSettings, given, 1, size["height"] * size["width"])
    own = {
        "patch_size": patch_size,
        "merge_size": size["height"] // (patch_size * side),
        "temporal_patch_size": 1,
        "fixed_size": (size["height"], size["width"]),
    }
    return PatchSettings(**{**defaults, **found, **own})


def gemma4_settings(given: Mapping[str, Any]) -> PatchSettings:
    """The settings in the fields of Gemma 4's image processor, with its defaults. The 2 · (x − 0.5)
    of its model is done here. Raises ValueError for other steps."""
    _check("image_processor_type", given.get("image_processor_type", GEMMA4_TYPES[0]), GEMMA4_TYPES)
    _check_steps(given)
    same = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    changed = [name for name, value in same.items() if list(given.get(name) or value) != value]
    if given.get("do_normalize") and changed:
        raise ValueError(
            f"the processor has {changed[0]}={given[changed[0]]}, which is not supported: only "
            f"{same[changed[0]]} is"
        )
    found = _fields(PatchSettings, given, 1, 1 << 62)
    own = {
        "merge_size": given.get("pooling_kernel_size", 3),
        "max_tokens": given.get("max_soft_tokens", 280),
        "temporal_patch_size": 1,
        "do_normalize": True,
        **HALVED,
    }
    return PatchSettings(**{"patch_size": 16, **found, **own})


def _gemma4_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens around and for images, by the fields of `Placeholders`."""
    others = config.get("extra_special_tokens")
    known = {**(others if isinstance(others, Mapping) else {}), **config}
    begin, end, image = (str(known.get(one) or GEMMA4_TOKENS[one]) for one in GEMMA4_TOKENS)
    return {
        "image_token": image, "video_token": "", "run_token": image,
        "image_text": begin + image + end,
    }  # fmt: skip


def video_settings(given: Mapping[str, Any], *, over_time: bool) -> VideoSettings:
    """The settings in the fields of a video processor, with the defaults of Qwen2-VL's or, with
    `over_time`, of Qwen3-VL's."""
    side = 32 if over_time else 28
    # Qwen3-VL's has no old names
    named = {"size": given.get("size")} if over_time else given
    low, high = _pixel_range(named, 128 * side * side, 768 * side * side)
    defaults: dict[str, Any] = {"patch_size": 14}
    if over_time:
        defaults = {
            "patch_size": 16, "image_mean": HALF, "image_std": HALF, "do_sample_frames": True,
            "fps": 2, "max_video_tokens": 768,
        }  # fmt: skip
    _check_steps(given)
    found = _fields(VideoSettings, given, low, high)
    return VideoSettings(**{**defaults, **found, "over_time": over_time})


def audio_settings(given: Mapping[str, Any]) -> AudioSettings:
    """The settings in the fields of a feature extractor. Raises ValueError for another extractor,
    and for unsupported steps."""
    _check("feature_extractor_type", given.get("feature_extractor_type", AUDIO_TYPE), (AUDIO_TYPE,))
    for name, expected in (("padding_side", "right"), ("padding_value", 0.0), ("dither", 0.0)):
        if given.get(name, expected) != expected:
            raise ValueError(
                f"the feature extractor has {name}={given[name]!r}: only {expected!r} is supported"
            )
    known = {one.name for one in fields(AudioSettings)}
    return AudioSettings(**{key: value for key, value in given.items() if key in known})


def _pixel_range(given: Mapping[str, Any], low: int, high: int) -> tuple[int, int]:
    """(min_pixels, max_pixels). Old files have these names, newer ones `size`; the old names win,
    as in transformers."""
    size = {"shortest_edge": low, "longest_edge": high, **(given.get("size") or {})}
    names = (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
    low, high = (size[new] if given.get(old) is None else given[old] for old, new in names)
    return low, high


def _fields(kind: type, given: Mapping[str, Any], low: int, high: int) -> dict[str, Any]:
    known = {one.name for one in fields(kind)}
    found = {name: given[name] for name in known & given.keys() if given[name] is not None}
    for name in ("image_mean", "image_std"):
        if name in found:
            value = found[name]
            found[name] = tuple(value) if isinstance(value, (list, tuple)) else (value,) * 3
    return {**found, "min_pixels": low, "max_pixels": high}


def _check_steps(given: Mapping[str, Any]) -> None:
    for name in ("do_resize", "do_convert_rgb"):
        if given.get(name) is False:
            raise ValueError(f"the processor has {name}=False, which is not supported")
    if given.get("do_center_crop") or given.get("do_pad"):
        raise ValueError("the processor crops or pads pictures, which is not supported")


def _check(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(
            f"the checkpoint's {name} is {value!r}, which is not supported: use one of "
            f"{', '.join(known)}"
        )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}
