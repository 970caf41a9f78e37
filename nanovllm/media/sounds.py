"""Arrays of samples and WAV files to one channel of float32 samples.

WAV files are read here: the standard library's `wave` reads neither floats nor, before Python 3.12,
the extensible form of the header.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from nanovllm.media.pictures import as_array

Samples = np.ndarray[Any, np.dtype[np.float32]]

MAX_CHANNELS = 8
# Floats of this level are no samples between -1 and 1, not even loud ones that exceed them.
MAX_LEVEL = 8.0
PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE  # format tags
MAX_PARTS = 1000  # of a file
UNKNOWN_SIZE = 0xFFFFFFFF  # of files that were written to a pipe: the samples go to the end
# numpy's dtype of a sample, by format tag and bits; those of 24 bits are made of three bytes
DTYPES = {
    (PCM, 8): "u1", (PCM, 16): "<i2", (PCM, 24): "u1", (PCM, 32): "<i4", (FLOAT, 32): "<f4",
    (FLOAT, 64): "<f8",
}  # fmt: skip
LEVELS = {"u1": 1 << 7, "i2": 1 << 15, "i4": 1 << 31}  # full scale of integers


def of_array(value: Any, rate: Any, wanted_rate: int, max_seconds: float) -> Samples:
    """The samples of an array [N], [channels, N] or [N, channels]; the mean of its channels.

    Floats have a full scale of 1, integers that of their type: uint8, int16 or int32. Raises
    ValueError for other types, shapes and rates, for too many samples and for what is no sound.
    """
    try:
        array = as_array(value)
    except TypeError:  # of a type that NumPy does not have
        raise ValueError("the samples cannot be read: give an array of floats") from None
    if isinstance(rate, bool) or not isinstance(rate, (int, np.integer)):
        raise ValueError(f"the sampling rate is {rate!r}: it must be a whole number of Hz")
    if array.ndim == 2 and array.shape[0] > array.shape[1]:
        array = array.T
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or not 1 <= array.shape[0] <= MAX_CHANNELS:
        raise ValueError(
            f"the samples have shape {list(np.shape(value))}: it must be [samples] or [channels, "
            f"samples] with at most {MAX_CHANNELS} channels"
        )
    _check(int(rate), array.shape[1], wanted_rate, max_seconds)
    return _mono(_floats(array))


def of_wav(data: bytes, wanted_rate: int, max_seconds: float) -> Samples:
    """The samples of a WAV file. Raises ValueError as `of_array` does, and for damaged files."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise ValueError("the data are no WAV file: other formats of sound are not read")
    parts = dict(_parts(data))
    if b"fmt " not in parts or b"data" not in parts:
        raise ValueError("the WAV file has no header or no samples: it is corrupt or truncated")
    header = _header(data[slice(*parts[b"fmt "])])
    begin, end = parts[b"data"]
    num = (end - begin) // header.step
    _check(header.rate, num, wanted_rate, max_seconds)
    dtype = DTYPES[header.tag, header.bits]
    raw = np.frombuffer(data[begin : begin + num * header.step], dtype)
    if header.bits == 24:
        raw = _of_24_bits(raw)
    return _mono(_floats(raw.reshape(num, header.channels).T))


class _Header(NamedTuple):
    """`step` is the bytes of one sample of all channels."""

    tag: int
    channels: int
    rate: int
    step: int
    bits: int


def _header(part: bytes) -> _Header:
    if len(part) < 16:
        raise ValueError("the WAV file has no whole header: it is corrupt or truncated")
    tag, channels, rate, _, step, bits = struct.unpack("<HHIIHH", part[:16])
    if tag == EXTENSIBLE and len(part) >= 26:
        (tag,) = struct.unpack("<H", part[24:26])
    if (tag, bits) not in DTYPES:
        raise ValueError(
            f"the WAV file has format {tag} with {bits} bits: integers of 8, 16, 24 or 32 bits and "
            "floats of 32 or 64 bits are read"
        )
    if not 1 <= channels <= MAX_CHANNELS or step != channels * bits // 8:
        raise ValueError(
            f"the WAV file has {channels} channels in {step} bytes: at most {MAX_CHANNELS} "
            "channels are read"
        )
    return _Header(tag, channels, rate, step, bits)


def _parts(data: bytes) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """The names of a file's parts, and where their content begins and ends."""
    at, num = 12, 0
    while at + 8 <= len(data):
        num += 1
        if num > MAX_PARTS:
            raise ValueError(f"the WAV file has more than {MAX_PARTS} parts")
        name, (size,) = data[at : at + 4], struct.unpack("<I", data[at + 4 : at + 8])
        begin, left = at + 8, len(data) - at - 8
        if name == b"data" and size == UNKNOWN_SIZE:
            size = left
        if size > left:
            raise ValueError(
                f"the WAV file says that a part has {size} bytes, but {left} are left: it is "
                "corrupt or truncated"
            )
        yield name, (begin, begin + size)
        at = begin + size + size % 2


def _check(rate: int, num: int, wanted_rate: int, max_seconds: float) -> None:
    if rate != wanted_rate:
        raise ValueError(
            f"its sampling rate is {rate} Hz, but the model hears {wanted_rate} Hz: resample it"
        )
    if not num:
        raise ValueError("it has no samples")
    if num > max_seconds * rate:
        most = int(max_seconds * rate)
        raise ValueError(
            f"it has {num} samples ({num / rate:.1f} s): at most {most} ({max_seconds:g} s) are "
            "allowed"
        )


def _of_24_bits(raw: np.ndarray) -> np.ndarray:
    """Integers of 32 bits whose upper three bytes are given."""
    whole = np.zeros((len(raw) // 3, 4), np.uint8)
    whole[:, 1:] = raw.reshape(-1, 3)
    return whole.reshape(-1).view("<i4")


def _floats(array: np.ndarray) -> Samples:
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # becomes infinite
            floats = array.astype(np.float32)
        peak = float(np.abs(floats).max())
        if not np.isfinite(peak):
            raise ValueError("its samples are not all finite numbers")
        if peak > MAX_LEVEL:
            raise ValueError(f"its samples reach {peak:g}: floats must lie between -1 and 1")
        return floats
    level = LEVELS.get(array.dtype.str[1:])
    if level is None:
        raise ValueError(
            f"its samples are of type {array.dtype}: they must be floats, or integers of the types "
            "uint8, int16 or int32"
        )
    offset = level if array.dtype.kind == "u" else 0
    return ((array.astype(np.float64) - offset) / level).astype(np.float32)


def _mono(channels_CN: np.ndarray) -> Samples:
    if len(channels_CN) == 1:
        return np.ascontiguousarray(channels_CN[0])
    return np.ascontiguousarray(channels_CN.mean(axis=0, dtype=np.float32))
