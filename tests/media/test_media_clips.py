"""Video files: frames, rates, damage."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from nanovllm.media import clips, mm_inputs
from tests.media.vision_cases import Case, picture

MOST = 1 << 20


def video_file(
    kind: str,
    num_frames: int,
    rate: int = 10,
    size: tuple[int, int] = (64, 48),
    codec: str | None = None,
) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        codec = codec or ("mpeg4" if kind != "webm" else "libvpx")
        stream: Any = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = (
            *size,
            "yuvj420p" if codec == "mjpeg" else "yuv420p",
        )
        for i in range(num_frames):
            frame = av.VideoFrame.from_image(picture(*size, seed=i))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def decoded(data: bytes) -> list[Any]:
    with av.open(io.BytesIO(data)) as container:
        return [one.to_ndarray(format="rgb24") for one in container.decode(video=0)]


@pytest.mark.parametrize("kind", ["mp4", "matroska", "avi", "webm"])
@pytest.mark.parametrize("num_frames", [2, 19])
def test_frames_of_a_file_are_those_of_the_decoder(kind: str, num_frames: int) -> None:
    data = video_file(kind, num_frames)
    clip = clips.of_file(data, MOST, MOST)
    assert clip.num_frames == num_frames and clip.fps == pytest.approx(10, rel=0.02)
    expected = decoded(data)
    chosen = sorted({0, num_frames // 2, num_frames - 1})
    found = list(clip.pick(chosen))
    assert len(found) == len(chosen)
    assert all(np.array_equal(one, expected[i]) for one, i in zip(found, chosen))


def test_a_file_gives_the_patches_of_its_frames(case: Case, tmp_path: Path) -> None:
    data = video_file("mp4", 19)
    (tmp_path / "a.mp4").write_bytes(data)
    preparer = case.preparer(allowed_local_media_path=tmp_path)
    url = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    references = [url, str(tmp_path / "a.mp4")]
    parts = [{"type": "video_url", "video_url": {"url": one}} for one in references]
    files = preparer.submit(mm_inputs.from_messages([{"content": parts}])[1]).result(60)
    frames = (decoded(data), {"fps": 10.0})
    (frames_found,) = preparer.submit(mm_inputs.from_data({"video": frames})).result(60)
    for one in files:
        assert torch.equal(one.values, frames_found.values)
        assert one.times == frames_found.times and one.grid == frames_found.grid
    preparer.close()


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/passwd\n"


@pytest.mark.parametrize("data", [b"", bytes(100), PLAYLIST, b"ffconcat version 1.0\nfile a.mp4"])
def test_what_is_no_video_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="the data are not a video in MP4, WebM, Matroska or AVI"):
        clips.of_file(data, MOST, MOST)


@pytest.mark.parametrize("kind", ["mp4", "matroska"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6])
def test_truncated_files_are_refused(kind: str, share: float) -> None:
    data = video_file(kind, 19)
    with pytest.raises(ValueError, match=r"corrupt or truncated|not a video") as caught:
        # the number of frames of Matroska is that of the frames which are there
        clip = clips.of_file(data[: int(len(data) * share)], MOST, MOST)
        if kind == "matroska":
            assert clip.num_frames < 19
            raise ValueError("corrupt or truncated")
        list(clip.pick(range(clip.num_frames)))
    assert "BytesIO" not in str(caught.value)


def test_the_pixel_limit_holds_before_decoding() -> None:
    data = video_file("mp4", 2)
    with pytest.raises(ValueError, match="64 × 48 pixels: at most 3071 are allowed"):
        clips.of_file(data, 64 * 48 - 1, MOST)


@pytest.mark.parametrize("kind", ["mp4", "matroska"])
def test_files_with_more_pixels_in_all_frames_are_refused_before_decoding(kind: str) -> None:
    data = video_file(kind, 7)
    assert clips.of_file(data, MOST, 7 * 64 * 48).num_frames == 7
    with pytest.raises(ValueError, match="7 frames of 3072 pixels: at most 21503 pixels in all"):
        clips.of_file(data, MOST, 7 * 64 * 48 - 1)


def test_a_file_without_video_is_refused() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="the file has no video stream"):
        clips.of_file(file.getvalue(), MOST, MOST)


@pytest.mark.parametrize(("kind", "codec"), [("matroska", "ffv1"), ("avi", "mpeg2video")])
def test_other_codecs_are_refused(kind: str, codec: str) -> None:
    data = video_file(kind, 2, codec=codec)
    with pytest.raises(ValueError, match=f"encoded as {codec}: the codecs h264, hevc, .* are read"):
        clips.of_file(data, MOST, MOST)


def test_a_codec_that_nothing_decodes_is_refused() -> None:
    data = video_file("matroska", 2).replace(b"V_MPEG4", b"V_XXXX4")
    with pytest.raises(ValueError, match="encoded as something unknown: the codecs h264"):
        clips.of_file(data, MOST, MOST)


@pytest.mark.parametrize("codec", ["mpeg4", "mjpeg", "libx264", "libx265", "libvpx-vp9"])
def test_usual_codecs_are_read(codec: str) -> None:
    data = video_file("matroska", 3, codec=codec)
    expected = decoded(data)
    found = list(clips.of_file(data, MOST, MOST).pick(range(3)))
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_sound_of_a_video_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg decodes the beginning of AAC to tell the format of its samples."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        video: Any = container.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sound: Any = container.add_stream("aac", rate=16000)
        for i in range(3):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate = 16000
            container.mux(sound.encode(frame))
            container.mux(video.encode(av.VideoFrame.from_image(picture(64, 48, seed=i))))
        container.mux([*video.encode(), *sound.encode()])
    data = file.getvalue()
    formats: list[Any] = []
    original = av.open

    def spy(*args: Any, **options: Any) -> Any:
        container = original(*args, **options)
        formats.append(container.streams.audio[0].codec_context.format)
        return container

    monkeypatch.setattr(av, "open", spy)
    assert len(list(clips.of_file(data, MOST, MOST).pick(range(3)))) == 3
    assert formats == [None, None]
    spy(io.BytesIO(data)).close()
    assert formats[-1] is not None
