"""Images to patches: sizes, resizing, normalization, order. The results equal transformers'.

T frames | H, W pixels of a frame | C = 3 colours | P patches of an item | D values of a patch
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from nanovllm.media.pictures import Pixels, pillow
from nanovllm.media.settings import PatchSettings, VideoSettings

Floats = npt.NDArray[np.float32]
Grid = tuple[int, int, int]  # patches over time, height and width
STEP_PIXELS = 1 << 16  # looked up at a time, so that NumPy's copies stay in CPU caches
MAX_RATIO = 200  # of an image's sides, as in transformers


def image_size(height: int, width: int, settings: PatchSettings) -> tuple[int, int]:
    """(height, width) after resizing: multiples of `factor` within the range of pixels.

    The same as `smart_resize` in transformers/models/qwen2_vl/image_processing_qwen2_vl.py, unless
    all images have one size.
    """
    if settings.fixed_size is not None:
        return settings.fixed_size
    if settings.max_tokens:
        return _of_tokens(height, width, settings.factor, settings.max_tokens)
    return _fitted(
        height, width, settings.factor, (settings.min_pixels, settings.max_pixels), (1, 1)
    )


def _of_tokens(height: int, width: int, side: int, num: int) -> tuple[int, int]:
    """(height, width): the largest multiples of `side`, in about the same shape, of up to `num`
    tokens of this side. As `get_aspect_ratio_preserving_size` of transformers' Gemma 4."""
    factor = math.sqrt(num * side**2 / (height * width))
    rows, columns = (math.floor(factor * length / side) for length in (height, width))
    if not rows:
        rows, columns = 1, min(width // height, num)
    elif not columns:
        rows, columns = min(height // width, num), 1
    return rows * side, columns * side


def video_size(
    num_frames: int, height: int, width: int, settings: VideoSettings
) -> tuple[int, int]:
    """(height, width) of all frames after resizing, as `resize` in transformers'
    models/qwen2_vl and models/qwen3_vl/video_processing_*.py gives them."""
    factor, over = settings.factor, settings.temporal_patch_size
    low, high = settings.min_pixels, settings.max_pixels
    least = int(low * 1.05)
    if not settings.over_time:
        if settings.cap_pixels_per_frame:
            total = int(settings.max_video_tokens * factor * factor * 0.9)
            high = max(min(high, total * over // num_frames), least)
        return _fitted(height, width, factor, (low, high), (1, 1))
    if settings.cap_pixels_per_frame:
        most = settings.max_video_tokens * factor * factor
        high = max(min(most, high // num_frames), least) * num_frames
    if num_frames < over:
        raise ValueError(f"the video has {num_frames} frames: this model needs at least {over}")
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    rounded = round(num_frames / over) * over
    return _fitted(height, width, factor, (low, high), (num_frames, rounded))


def _fitted(
    height: int, width: int, factor: int, pixels: tuple[int, int], frames: tuple[int, int]
) -> tuple[int, int]:
    """Sides within a range of pixels. `frames` are the frame count and the count rounded to whole
    patches."""
    if max(height, width) > MAX_RATIO * min(height, width):
        raise ValueError(
            f"the picture is {width} × {height} pixels: one side may be at most {MAX_RATIO} times "
            "as long as the other"
        )
    (low, high), (num, rounded) = pixels, frames
    new_height, new_width = (round(side / factor) * factor for side in (height, width))
    if rounded * new_height * new_width > high:
        shrink = math.sqrt(num * height * width / high)
        return _sides(height / shrink, width / shrink, factor, math.floor)
    if rounded * new_height * new_width < low:
        grow = math.sqrt(low / (num * height * width))
        new_height, new_width = (
            math.ceil(side * grow / factor) * factor for side in (height, width)
        )
    return new_height, new_width


def _sides(height: float, width: float, factor: int, to_int: Any) -> tuple[int, int]:
    return max(factor, to_int(height / factor) * factor), max(
        factor, to_int(width / factor) * factor
    )


def grid_of(num_frames: int, height: int, width: int, settings: PatchSettings) -> Grid:
    """The patches of frames that have been resized to `height` × `width`."""
    over_time = -(-num_frames // settings.temporal_patch_size)
    return over_time, height // settings.patch_size, width // settings.patch_size


def num_tokens(grid: Grid, settings: PatchSettings) -> int:
    return math.prod(grid) // settings.merge_size**2


def resized(picture_HWC: Pixels, height: int, width: int, resample: int) -> Pixels:
    """Resize an image with Pillow, which releases the GIL."""
    if picture_HWC.shape[:2] == (height, width):
        return picture_HWC
    image = pillow().fromarray(picture_HWC)
    return np.asarray(image.resize((width, height), resample=resample))


def image_patches(picture_HWC: Pixels, settings: PatchSettings) -> Floats:
    """[P, D] of one resized image, which stands for all frames of a patch."""
    frames = [picture_HWC] * settings.temporal_patch_size
    return _patches(frames, settings, image_table(settings))


def video_patches(frames_T: Sequence[Pixels], settings: VideoSettings) -> Floats:
    """[P, D] of resized frames. The last one is repeated to whole patches over time."""
    missing = -len(frames_T) % settings.temporal_patch_size
    frames = [*frames_T, *[frames_T[-1]] * missing]
    return _patches(frames, settings, video_table(settings))


def _patches(frames: Sequence[Pixels], settings: PatchSettings, table_CV: Floats) -> Floats:
    """Patches in the order of merged patches, each with its values in the order C, time, H, W.

    A byte has 256 values, so normalization is a look-up: exact, and faster than arithmetic.
    """
    height, width, _ = frames[0].shape
    side, merge, over = settings.patch_size, settings.merge_size, settings.temporal_patch_size
    grid = grid_of(len(frames), height, width, settings)
    rows, columns = grid[1] // merge, grid[2] // merge
    shape = (grid[0], rows, columns, merge, merge, 3, over, side, side)
    out = np.empty(shape, np.float32)
    for i, frame in enumerate(frames):
        into = out[i // over, ..., i % over, :, :]
        if i % over and frame is frames[i - 1]:
            into[:] = out[i // over, ..., i % over - 1, :, :]
            continue
        split = frame.reshape(rows, merge, side, columns, merge, side, 3)
        step = max(1, STEP_PIXELS // (merge * side * width))
        for r in range(0, rows, step):
            for c in range(3):
                values = np.take(table_CV[c], split[r : r + step, ..., c], mode="clip")
                into[r : r + step, ..., c, :, :] = values.transpose(0, 3, 1, 4, 2, 5)
    return out.reshape(math.prod(grid), -1)


@lru_cache(maxsize=8)
def image_table(settings: PatchSettings) -> Floats:
    """[C, 256]: the value of each byte, with the roundings of `rescale` and `normalize` in
    transformers/image_transforms.py."""
    ramp = np.arange(256)
    values = ramp.astype(np.float32)
    if settings.do_rescale:
        values = (ramp.astype(np.float64) * settings.rescale_factor).astype(np.float32)
    if not settings.do_normalize:
        return np.stack([values] * 3)
    mean, std = (np.array(one, np.float32)[:, None] for one in _mean_std(settings))
    return (values - mean) / std


@lru_cache(maxsize=8)
def video_table(settings: VideoSettings) -> Floats:
    """[C, 256]: the value of each byte, as in `rescale_and_normalize` of transformers' tensor
    backend, which fuses the two steps."""
    values = np.arange(256, dtype=np.float32)
    if not settings.do_normalize:
        scale = np.float32(settings.rescale_factor if settings.do_rescale else 1.0)
        return np.stack([values * scale] * 3)
    mean, std = (np.array(one, np.float32)[:, None] for one in _mean_std(settings))
    if settings.do_rescale:
        whole = np.float32(1.0 / settings.rescale_factor)
        mean, std = mean * whole, std * whole
    return (values - mean) / std


def _mean_std(settings: PatchSettings) -> Iterable[Sequence[float]]:
    return settings.image_mean, settings.image_std
