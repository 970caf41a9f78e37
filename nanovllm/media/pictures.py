"""Images as RGB bytes [H, W, 3], from encoded files, PIL images and arrays.

The conversions are those of transformers' processors: transparent images are composed over white,
all other modes use Pillow's `convert("RGB")`. The rotation in EXIF is applied. Of an animation the
first frame is used, as in Pillow and transformers: phones write photos as files of several frames.
16-bit grey keeps its high byte, as Pillow does for 16-bit colour; transformers would clip it.
"""

from __future__ import annotations

import contextlib
import io
import re
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt

from nanovllm import extras

Pixels = npt.NDArray[np.uint8]

# No SVG, no format that is a program (EPS), none with many codecs inside (TIFF)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N")
WITHOUT_RANGE = ("I", "F")
PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}  # the only conversions that Pillow has
CHANNELS = (1, 3, 4)
ORIENTATION = 0x0112  # the tag of EXIF
# Each scan of a progressive JPEG covers all pixels; usual files have about ten.
MAX_SCANS = 100
_JPEG, _SCAN, _END = b"\xff\xd8", 0xDA, 0xD9
# The next marker of a JPEG: within a scan, 0xff is followed by zero or a restart number.
_MARKER = re.compile(rb"\xff([^\x00\xff\x01\xd0-\xd7])")
# Pillow reads a file into an image on first use, and one image can be in several prompts.
_loading = threading.Lock()


def pillow() -> Any:
    """The module PIL.Image. Raises ValueError if Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError:
        raise ValueError(f"pictures need Pillow: {extras.install('vision')}") from None
    return Image


def decode(
    data: bytes, max_pixels: int, reserve: Callable[[int], object] = lambda num_pixels: None
) -> Pixels:
    """An encoded image as RGB. Calls `reserve` with its pixels before decoding.

    Raises ValueError for other formats, for corrupt or truncated data, and before decoding for more
    than `max_pixels` pixels or MAX_SCANS scans.
    """
    image_module = pillow()
    try:
        image = image_module.open(io.BytesIO(data), formats=FORMATS)
    except image_module.DecompressionBombError:
        raise ValueError(f"the picture has more than {max_pixels} pixels") from None
    except MemoryError:  # not an error of the data
        raise
    except Exception:  # readers raise many kinds of errors, some with addresses of objects
        raise ValueError(
            f"the data are not a picture in one of the formats {', '.join(FORMATS)}"
        ) from None
    width, height = image.size
    check_pixels(width, height, max_pixels)
    if data.startswith(_JPEG) and num_scans(data) > MAX_SCANS:
        raise ValueError(f"the picture has more than {MAX_SCANS} scans")
    reserve(width * height)
    return _checked_rgb(image, contextlib.nullcontext())


def num_scans(jpeg: bytes) -> int:
    """The scans of a JPEG, counted up to one more than MAX_SCANS."""
    num, at = 0, len(_JPEG)
    while num <= MAX_SCANS and (marker := _MARKER.search(jpeg, at)):
        kind, at = marker[1][0], marker.end()
        if kind == _END:
            break
        num += kind == _SCAN
        at += int.from_bytes(jpeg[at : at + 2], "big")
    return num


def of_image(image: Any, max_pixels: int) -> Pixels:
    """A PIL image as RGB, rotated by its EXIF data."""
    width, height = image.size
    check_pixels(width, height, max_pixels)
    return _checked_rgb(image, _loading)


def of_array(given: Any, max_pixels: int) -> Pixels:
    """An array of bytes [H, W], [H, W, C] or [C, H, W] as RGB; C is 1, 3 or 4.

    If both the first and the last size can be C, the first is used, as in transformers.
    """
    array = as_array(given)
    if array.dtype != np.uint8:
        raise ValueError(f"the picture has dtype {array.dtype}: it must be uint8, 0 … 255")
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or not {array.shape[0], array.shape[2]} & set(CHANNELS):
        raise ValueError(
            f"the picture has shape {list(array.shape)}: it must be [H, W], [H, W, C] or "
            f"[C, H, W] with C one of {', '.join(map(str, CHANNELS))}"
        )
    if array.shape[0] in CHANNELS:
        array = np.moveaxis(array, 0, 2)
    check_pixels(array.shape[1], array.shape[0], max_pixels)
    if array.shape[2] == 4:
        alpha = array[..., 3:] / 255
        array = np.round(alpha * array[..., :3] + (1 - alpha) * 255).astype(np.uint8)
    if array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    return np.ascontiguousarray(array)


def as_array(given: Any) -> npt.NDArray[Any]:
    """A NumPy array of an array or tensor on any device."""
    if hasattr(given, "detach"):
        given = given.detach().cpu()
    return np.asarray(given)


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"the picture is {width} × {height} pixels: it must have at least one")
    if width * height > max_pixels:
        raise ValueError(
            f"the picture is {width} × {height} pixels: at most {max_pixels} are allowed"
        )


def _checked_rgb(image: Any, lock: AbstractContextManager[Any]) -> Pixels:
    if image.mode in WITHOUT_RANGE:
        raise ValueError(
            f"the picture has mode {image.mode!r}, which has no fixed range: convert it to 'RGB'"
        )
    try:
        with lock:
            image.load()
        return _rgb(image)
    except MemoryError:
        raise
    except Exception:  # see `decode`
        raise ValueError("the picture cannot be decoded: it is corrupt or truncated") from None


def _rgb(image: Any) -> Pixels:
    from PIL import ImageOps

    if image.getexif().get(ORIENTATION, 1) != 1:  # Pillow copies even images that need no rotation
        image = ImageOps.exif_transpose(image)
    image = image.convert(PREMULTIPLIED[image.mode]) if image.mode in PREMULTIPLIED else image
    if image.mode in GREY_16:
        high = (np.asarray(image) >> 8).astype(np.uint8)
        return np.ascontiguousarray(np.repeat(high[..., None], 3, axis=2))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = pillow().new("RGBA", image.size, (255, 255, 255, 255))
        image = pillow().alpha_composite(white, image)
    # PIL's images can share memory with their arrays, which must not change afterwards
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
