"""Converts arrays and audio files to one channel of float32 samples at the model's rate, with
PyAV."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from nanovllm.media import clips, libav
from nanovllm.media.pictures import as_array

Samples = np.ndarray[Any, np.dtype[np.float32]]

BYTES_PER_SAMPLE = 4
MAX_CHANNELS = 8
RATES = range(1000, 768_001)  # Hz; the resampler's filter grows with the ratio of two rates
# Floats above this level are not on the scale -1 … 1, even with loud peaks.
MAX_LEVEL = 8.0
LEVELS = {"u1": 1 << 7, "i2": 1 << 15, "i4": 1 << 31}  # full scale of integers
# A container can select any of FFmpeg's decoders; only these are widely used and well tested.
CODECS = ("mp3", "aac", "flac", "vorbis", "opus", "alac", "pcm_alaw", "pcm_mulaw", "pcm_u8",
          "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_f64le")  # fmt: skip
_DECODERS = (*CODECS, "mp3float")  # FFmpeg's names
# The container by its first bytes; MP3 and AAC without one begin with a frame or an ID3 tag.
CONTAINERS = (
    *clips.CONTAINERS, (8, b"WAVE", "wav"), (0, b"fLaC", "flac"), (0, b"OggS", "ogg")
)  # fmt: skip
# Containers that declare their length. AAC may lack a few frames of silence at the end.
_MOST_MISSING = {"wav": 0, "flac": 0, "mp4": 4096}
_PIPE_BYTES = 0x7FFF_0000  # WAV files that were written to a pipe declare this size or more


def of_array(value: Any, rate: Any, wanted_rate: int, max_seconds: float) -> Samples:
    """The samples of an array [N], [channels, N] or [N, channels]: the mean of its channels, at the
    wanted rate.

    Floats have a full scale of 1, integers that of their type: uint8, int16 or int32. Raises
    ValueError for other types, shapes and rates, for too many samples and for values that are not
    audio. Resampling needs PyAV.
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
    _check_rate(int(rate))
    check_length(array.shape[1], int(rate), max_seconds)
    samples = _mono(_floats(array))
    return samples if rate == wanted_rate else _resampled(samples, int(rate), wanted_rate)


def of_file(
    data: bytes,
    wanted_rate: int,
    max_seconds: float,
    reserve: Callable[[int], object] = lambda num_bytes: None,
) -> Samples:
    """The same for a file's first audio stream: WAV, MP3, FLAC, Ogg, AAC, and audio in MP4, WebM,
    Matroska and AVI. Calls `reserve` with the bytes that it needs before decoding.

    Raises ValueError for other files and codecs, for damaged files and for too many seconds.
    """
    kind = _container(data)
    if kind is None:
        raise ValueError("the data are not audio in WAV, MP3, FLAC, Ogg, AAC, MP4 or WebM")
    if kind == "wav":
        _check_whole(data)
    with libav.opened(pyav(), data, kind, _DECODERS, "sound") as container:
        source = _source(container, kind)
        if source.num_samples is not None:
            check_length(source.num_samples, source.rate, max_seconds)
        most = math.ceil(max_seconds * wanted_rate)
        reserve(2 * BYTES_PER_SAMPLE * most)  # pieces, and the whole
        pieces = list(_pieces(container, source, kind, wanted_rate, max_seconds))
    samples = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    check_length(len(samples), wanted_rate, max_seconds)
    return samples


def check_length(num: int, rate: int, max_seconds: float) -> None:
    """Raises ValueError unless there are samples, and not too many."""
    if not num:
        raise ValueError("it has no samples")
    most = math.ceil(max_seconds * rate)
    if num > most:
        raise ValueError(
            f"it has {num} samples ({num / rate:.1f} s): at most {most} ({max_seconds:g} s) are "
            "allowed"
        )


def pyav() -> Any:
    """The module av. Raises ValueError if PyAV is not installed."""
    return libav.pyav("files of sound and other sampling rates than the model's", "audio")


class _Source(NamedTuple):
    """An audio stream. `num_samples` is None if the file does not declare it."""

    stream: Any
    rate: int
    channels: int
    num_samples: int | None


def _container(data: bytes) -> str | None:
    at = 0
    if (
        data[:3] == b"ID3" and len(data) >= 10
    ):  # a tag before the audio; its size has 7 bits per byte
        at = 10 + sum(byte << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0)))
    kinds = [kind for i, magic, kind in CONTAINERS if data[at + i : at + i + len(magic)] == magic]
    if kinds:
        return kinds[0]
    head = int.from_bytes(data[at : at + 2].ljust(2), "big")
    if head & 0xFFF6 == 0xFFF0:
        return "aac"
    return "mp3" if at or head & 0xFFE6 == 0xFFE2 else None


def _check_whole(data: bytes) -> None:
    """Refuse truncated WAV files, which FFmpeg reads as shorter ones."""
    # the declared size excludes 8 bytes of the file, but some programs include them
    num_bytes = int.from_bytes(data[4:8], "little")
    if len(data) < num_bytes < _PIPE_BYTES:
        raise ValueError(
            f"the WAV file declares {num_bytes + 8} bytes, but has {len(data)}: it is "
            "corrupt or truncated"
        )


def _source(container: Any, kind: str) -> _Source:
    if not container.streams.audio:
        raise ValueError("the file has no audio stream")
    stream = container.streams.audio[0]
    context = libav.checked(stream, _DECODERS, CODECS, "sound")
    rate, channels = context.sample_rate, context.channels
    _check_rate(rate)
    if not 1 <= channels <= MAX_CHANNELS:
        raise ValueError(f"it has {channels} channels: 1 to {MAX_CHANNELS} are read")
    num = None
    if kind in _MOST_MISSING and stream.duration is not None:
        num = round(stream.duration * stream.time_base * rate)
    return _Source(stream, rate, channels, num)


def _pieces(
    container: Any, source: _Source, kind: str, wanted_rate: int, max_seconds: float
) -> Iterator[Samples]:
    """One channel at the wanted rate, piece by piece."""
    # packed samples: PyAV crashes on the planes of eight channels
    resampler = pyav().AudioResampler(format="flt", rate=wanted_rate)
    num = 0
    for frame in container.decode(source.stream):
        if (frame.sample_rate, frame.layout.nb_channels) != (source.rate, source.channels):
            raise ValueError("its sampling rate or channels change")
        num += frame.samples
        check_length(num, source.rate, max_seconds)
        yield from map(_of_frame, resampler.resample(frame))
    if num and num + _MOST_MISSING.get(kind, 0) < (source.num_samples or 0):
        raise ValueError(
            f"it declares {source.num_samples} samples, but has {num}: it is corrupt or truncated"
        )
    if num:
        yield from map(_of_frame, resampler.resample(None))


def _of_frame(frame: Any) -> Samples:
    packed = frame.to_ndarray().reshape(-1, frame.layout.nb_channels)
    return _mono(_floats(packed.T))


def _resampled(samples: Samples, rate: int, wanted_rate: int) -> Samples:
    av = pyav()
    frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler(format="flt", rate=wanted_rate)
    found = [*resampler.resample(frame), *resampler.resample(None)]
    return np.concatenate([_of_frame(one) for one in found])


def _check_rate(rate: int) -> None:
    if rate not in RATES:
        raise ValueError(
            f"its sampling rate is {rate} Hz: it must be between {RATES[0]} and {RATES[-1]} Hz"
        )


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
