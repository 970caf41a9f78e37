"""Encoded pictures: formats, rotation, damage and limits."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nanovllm.media import pictures
from tests.media.vision_cases import picture

MOST = 1 << 24


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG that says how large it is and has no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        whole = name + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF", "JPEG"])
def test_formats_are_read(kind: str) -> None:
    image = picture(33, 21)
    data = encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    found = pictures.decode(data, MOST)
    assert np.array_equal(found, np.array(Image.open(io.BytesIO(data)).convert("RGB")))
    if kind in ("PNG", "WEBP", "BMP"):
        assert np.array_equal(found, np.array(image))


@pytest.mark.parametrize("kind", ["TIFF", "EPS", "PPM", "ICO", "PDF"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(
        ValueError, match="not a picture in one of the formats PNG, JPEG, WEBP, GIF, BMP"
    ):
        pictures.decode(encoded(picture(16, 16), kind), MOST)


@pytest.mark.parametrize(
    "data", [b"", b"\x89PNG", b"<svg xmlns='http://www.w3.org/2000/svg'/>", bytes(100), b"GIF89a"]
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a picture"):
        pictures.decode(data, MOST)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_pictures_are_refused(kind: str, share: float) -> None:
    data = encoded(picture(99, 77), kind)
    with pytest.raises(ValueError, match=r"corrupt or truncated|not a picture") as caught:
        pictures.decode(data[: int(len(data) * share)], MOST)
    assert "0x" not in str(caught.value)


def test_corrupt_pixels_are_refused() -> None:
    data = bytearray(encoded(picture(99, 77), "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ValueError, match="corrupt or truncated"):
        pictures.decode(bytes(data), MOST)


@pytest.mark.parametrize("size", [(8000, 8000), (40000, 40000)])
def test_the_pixel_limit_holds_before_decoding(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def load(self: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(ValueError, match="pixels") as caught:
        pictures.decode(bomb(*size), MOST)
    assert str(MOST) in str(caught.value)


def test_a_picture_at_the_limit_is_read() -> None:
    data = encoded(picture(19, 11), "PNG")
    assert pictures.decode(data, 19 * 11).shape == (11, 19, 3)
    with pytest.raises(ValueError, match="19 × 11 pixels: at most 208 are allowed"):
        pictures.decode(data, 19 * 11 - 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int) -> None:
    image = picture(40, 24)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "PNG", exif=exif)
    turned = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2), 8: lambda a: np.rot90(a),
    }[orientation](np.array(image))  # fmt: skip
    assert np.array_equal(pictures.decode(data, MOST), turned)
    assert np.array_equal(pictures.of_image(Image.open(io.BytesIO(data)), MOST), turned)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_its_first_frame(kind: str) -> None:
    frames = [picture(30, 20, seed=i) for i in range(3)]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
    first = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(pictures.decode(data, MOST), np.array(first))
    if kind != "GIF":
        assert np.array_equal(np.array(first), np.array(frames[0]))


def test_transparent_pixels_are_white() -> None:
    clear = Image.new("RGBA", (5, 6), (10, 20, 30, 0))
    assert (pictures.decode(encoded(clear, "PNG"), MOST) == 255).all()
    assert (pictures.of_array(np.array(clear), MOST) == 255).all()


@pytest.mark.parametrize(("mode", "plain"), [("La", "LA"), ("RGBa", "RGBA")])
def test_premultiplied_modes_are_read_as_their_plain_ones(mode: str, plain: str) -> None:
    image = Image.new(plain, (5, 6), tuple([100] * (len(plain) - 1) + [128])).convert(mode)
    expected = pictures.of_image(image.convert(plain), MOST)
    assert np.array_equal(pictures.of_image(image, MOST), expected)


def test_grey_of_16_bits_keeps_its_high_byte() -> None:
    values = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    found = pictures.decode(encoded(Image.fromarray(values), "PNG"), MOST)
    assert np.array_equal(found, np.repeat((values >> 8)[..., None], 3, axis=2))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_range_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"mode '{mode}', which has no fixed range"):
        pictures.of_image(Image.new(mode, (4, 4)), MOST)


def test_cmyk_files_are_read() -> None:
    data = encoded(picture(32, 24).convert("CMYK"), "JPEG")
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(pictures.decode(data, MOST), expected)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "dtype float32: it must be uint8"),
        (np.zeros((4, 4, 3), np.uint16), "dtype uint16: it must be uint8"),
        (np.zeros((5, 5, 2), np.uint8), r"shape \[5, 5, 2\]"),
        (np.zeros((2, 5, 5, 3), np.uint8), r"shape \[2, 5, 5, 3\]"),
        (np.zeros((0, 5, 3), np.uint8), "0 pixels"),
        (np.zeros((5000, 5000), np.uint8), "5000 × 5000 pixels: at most"),
    ],
)
def test_wrong_arrays_are_refused(array: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pictures.of_array(array, MOST)


def test_an_array_without_channels_is_grey() -> None:
    array = np.arange(20, dtype=np.uint8).reshape(4, 5)
    assert np.array_equal(pictures.of_array(array, MOST), np.repeat(array[..., None], 3, axis=2))


def test_pixels_do_not_follow_the_image() -> None:
    image = picture(8, 8)
    before = pictures.of_image(image, MOST).copy()
    found = pictures.of_image(image, MOST)
    image.paste((0, 0, 0), (0, 0, 8, 8))
    assert np.array_equal(found, before)
