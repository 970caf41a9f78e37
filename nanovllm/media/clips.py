"""Videos as frames: lists of images, arrays, and files through PyAV.

The checkpoint's video processor chooses the frames: `sampled`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from nanovllm.media import libav, pictures
from nanovllm.media.pictures import Pixels
from nanovllm.media.settings import VideoSettings

# A container can select any of FFmpeg's decoders; only these are widely used and well tested.
CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg")
_DECODERS = (*CODECS, "libvpx", "libvpx-vp9", "libdav1d", "libaom-av1")  # FFmpeg's names
NUM_THREADS = 4  # of one video's decoder
# The container by its first bytes
CONTAINERS = ((4, b"ftyp", "mp4"), (0, b"\x1a\x45\xdf\xa3", "matroska"), (8, b"AVI ", "avi"))


@dataclass(frozen=True)
class Clip:
    """A video whose frames have not been read.

    num_frames, fps: of the whole video; fps is None if unknown.
    pick: yields the frames with these ascending indices. It takes an index after it has yielded the
        previous frame.
    indices: the frames already sampled by the caller, of `total_frames`; None for all.
    """

    num_frames: int
    fps: float | None
    pick: Callable[[Iterable[int]], Iterator[Pixels]]
    indices: Sequence[int] | None = None
    total_frames: int | None = None
    sample: bool | None = None


def of_frames(
    frames: Sequence[Any], read: Callable[[Any], Pixels], metadata: dict[str, Any]
) -> Clip:
    """A clip of single images, which `read` turns into bytes. See METADATA in given.py."""
    indices = metadata.get("frames_indices")
    total = metadata.get("total_num_frames")
    if indices is not None:
        indices = [int(one) for one in indices]
        if len(indices) != len(frames):
            raise ValueError(f"{len(indices)} frames_indices do not fit {len(frames)} frames")
    if (total is not None or metadata.get("do_sample_frames") is False) and indices is None:
        indices = range(len(frames))
    if total is not None and (type(total) is not int or total <= max(indices or [0])):
        raise ValueError(f"total_num_frames is {total!r}: it must be above all frames_indices")
    sample = metadata.get("do_sample_frames")
    if sample and indices is not None:
        raise ValueError("do_sample_frames=True does not go with frames that are already sampled")

    def pick(chosen: Iterable[int]) -> Iterator[Pixels]:
        for i in chosen:
            yield read(frames[i])

    return Clip(len(frames), metadata.get("fps"), pick, indices, total, sample)


def of_file(
    data: bytes,
    max_pixels: int,
    max_video_pixels: int,
    reserve: Callable[[int], object] = lambda num_pixels: None,
) -> Clip:
    """A clip of an encoded file: MP4, WebM, Matroska or AVI. Calls `reserve` with the pixels of a
    frame before decoding.

    Frames between the chosen ones must be decoded too, and a small file can have very many. So
    `max_video_pixels` limits the pixels of all frames.
    """
    kinds = [kind for at, magic, kind in CONTAINERS if data[at : at + len(magic)] == magic]
    if not kinds:
        raise ValueError("the data are not a video in MP4, WebM, Matroska or AVI")
    opened = partial(libav.opened, pyav(), data, kinds[0], _DECODERS, "video")
    with opened() as container:
        stream = _video_stream(container)
        pictures.check_pixels(stream.width, stream.height, max_pixels)
        rate, num_frames = stream.average_rate, stream.frames
        stream_pixels = stream.width * stream.height
        if not num_frames:  # Matroska does not store it
            num_frames = sum(packet.size > 0 for packet in container.demux(stream))

    def pick(chosen: Iterable[int]) -> Iterator[Pixels]:
        with opened() as container:
            yield from _frames(container, chosen, stream_pixels)

    if num_frames < 1:
        raise ValueError("the video has no frames")
    if num_frames * stream_pixels > max_video_pixels:
        raise ValueError(
            f"the video has {num_frames} frames of {stream_pixels} pixels: at most "
            f"{max_video_pixels} pixels in all are allowed"
        )
    reserve(stream_pixels)
    return Clip(num_frames, float(rate) if rate else None, pick)


def _frames(container: Any, chosen: Iterable[int], num_pixels: int) -> Iterator[Pixels]:
    stream = _video_stream(container)
    stream.codec_context.thread_count = min(NUM_THREADS, os.cpu_count() or 1)
    frames = enumerate(container.decode(stream))
    for wanted in chosen:
        for i, frame in frames:
            if frame.width * frame.height > num_pixels:
                raise ValueError("the video has frames that are larger than declared")
            if i == wanted:
                yield np.ascontiguousarray(frame.to_ndarray(format="rgb24"))
                break
        else:
            raise ValueError("the video has fewer frames than declared: it is corrupt or truncated")


def _video_stream(container: Any) -> Any:
    if not container.streams.video:
        raise ValueError("the file has no video stream")
    stream = container.streams.video[0]
    libav.checked(stream, _DECODERS, CODECS, "video")
    return stream


def pyav() -> Any:
    """The module av. Raises ValueError if PyAV is not installed."""
    return libav.pyav("video files", "video")


def sampled(clip: Clip, settings: VideoSettings) -> Sequence[int]:
    """The indices of the frames that the checkpoint's video processor chooses."""
    if clip.indices is not None:
        return range(clip.num_frames)  # all frames
    if not (settings.do_sample_frames if clip.sample is None else clip.sample):
        return range(clip.num_frames)
    if settings.over_time:
        return _evenly(clip, settings)
    return _by_steps(clip, settings)


def _evenly(clip: Clip, settings: VideoSettings) -> Sequence[int]:
    """`sample_frames` of transformers' Qwen3VLVideoProcessor: from the first to the last frame."""
    total, num = clip.num_frames, settings.num_frames
    if num is None:
        num = int(total / (clip.fps or settings.default_fps) * (settings.fps or 2))
        num = min(max(num, settings.min_frames), settings.max_frames, total)
    chosen = np.linspace(0, total - 1, num).round().astype(int)
    return [int(one) for one in chosen]


def _by_steps(clip: Clip, settings: VideoSettings) -> Sequence[int]:
    """`sample_frames` of transformers' Qwen2VLVideoProcessor: whole patches over time."""
    total, over, num = clip.num_frames, settings.temporal_patch_size, settings.num_frames
    if num is not None:
        num = round(num / over) * over
    elif settings.fps is not None:
        if clip.fps is None:
            raise ValueError("the frames have no fps, which this model's sampling needs")
        most = min(settings.max_frames, total) // over * over
        wanted = total / clip.fps * settings.fps
        num = int(min(max(wanted, settings.min_frames), most, total) // over * over)
    else:
        return range(total)
    if not 0 < num <= total:
        raise ValueError(
            f"the video has {total} frames: this model's sampling needs {max(num, over)}"
        )
    # transformers counts in float32 here
    steps = np.arange(num, dtype=np.float64) * (total / num)
    return [int(one) for one in steps.astype(np.float32)]


def times(clip: Clip, chosen: Sequence[int], settings: VideoSettings) -> list[float]:
    """The times of the chosen frames, in seconds."""
    numbers = chosen if clip.indices is None else [clip.indices[i] for i in chosen]
    return [one / (clip.fps or settings.default_fps) for one in numbers]


def sampled_fps(clip: Clip, chosen: Sequence[int], settings: VideoSettings) -> float:
    """Frames per second among the chosen ones."""
    total = clip.total_frames or (clip.num_frames if clip.indices is None else None)
    if total is None or clip.fps is None:
        return clip.fps or settings.default_fps
    return len(chosen) / total * clip.fps
