"""Files of sound: formats, rates, channels, damage, limits."""

from __future__ import annotations

import base64
import io
import sys
from typing import Any

import av
import numpy as np
import pytest

from nanovllm.media import mm_inputs, sounds
from nanovllm.media.decoders import Decoder
from nanovllm.media.memory import Memory
from nanovllm.media.options import MediaOptions
from tests.media.sound_cases import sound_file, tone, write
from tests.media.test_media_clips import PLAYLIST, video_file
from tests.media.vision_cases import picture
from tests.models.omni_cases import RATE, clip, wav

LONGEST = 2.0
FACTS = RATE, LONGEST
# container, codec, and how much one sample may differ
LOSSLESS = [
    ("wav", "pcm_u8", 2**-7), ("wav", "pcm_s16le", 2**-15), ("wav", "pcm_s24le", 2**-22),
    ("wav", "pcm_s32le", 2**-22), ("wav", "pcm_f32le", 0), ("wav", "pcm_f64le", 0),
    ("wav", "pcm_alaw", 2**-5), ("wav", "pcm_mulaw", 2**-5), ("flac", "flac", 2**-15),
    ("ogg", "flac", 2**-15), ("ipod", "alac", 2**-15), ("matroska", "pcm_s16le", 2**-15),
    ("avi", "pcm_s16le", 2**-15),
]  # fmt: skip
LOSSY = [
    ("mp3", "libmp3lame", {}), ("ipod", "aac", {}), ("mp4", "aac", {}),
    ("ogg", "libopus", {}), ("webm", "libopus", {}), ("ogg", "vorbis", {"strict": "-2"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "codec", "most"), LOSSLESS)
@pytest.mark.parametrize("num", [1, 989, 8001])
def test_lossless_files_have_the_samples(kind: str, codec: str, most: float, num: int) -> None:
    samples = clip(num)
    found = sounds.of_file(sound_file(kind, codec, samples[None], RATE), *FACTS)
    assert found.dtype == np.float32 and found.shape == (num,)
    np.testing.assert_allclose(found, samples, rtol=0, atol=most)


@pytest.mark.parametrize(("kind", "codec", "options"), LOSSY)
def test_lossy_files_have_the_sound(kind: str, codec: str, options: dict[str, str]) -> None:
    """Two channels of 48 kHz: one is silent, so the mean has half the level."""
    left = tone(48_000, 48_000)
    data = sound_file(kind, codec, np.stack((left, 0 * left)), 48_000, **options)
    found = sounds.of_file(data, *FACTS)
    assert RATE <= len(found) < RATE + 2048, "a whole number of frames"
    error = found[:RATE] - tone(RATE, RATE, level=0.15)
    assert np.abs(error[500:-500]).max() < 0.02, "no shift in time, and the whole level"


@pytest.mark.parametrize(("kind", "codec"), [("adts", "aac"), ("wav", "libmp3lame")])
def test_files_without_their_encoders_delay_are_read(kind: str, codec: str) -> None:
    data = sound_file(kind, codec, tone(32_000, RATE)[None], RATE)
    found = sounds.of_file(data, RATE, 3.0)[4096:-4096]
    assert 0.28 < np.abs(found).max() < 0.32
    spectrum = np.abs(np.fft.rfft(found * np.hanning(len(found))))
    assert spectrum.argmax() * RATE / len(found) == pytest.approx(440, abs=2)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
def test_other_rates_are_resampled(rate: int) -> None:
    samples = tone(rate, rate)
    array = sounds.of_array(samples, rate, *FACTS)
    file = sounds.of_file(sound_file("wav", "pcm_f32le", samples[None], rate), *FACTS)
    np.testing.assert_allclose(file, array, rtol=0, atol=1e-6)
    assert len(array) == RATE
    # the resampler's filter sees silence before and after
    np.testing.assert_allclose(array[200:-200], tone(RATE, RATE)[200:-200], rtol=0, atol=1e-4)


def test_what_a_lower_rate_cannot_have_is_filtered_out() -> None:
    found = sounds.of_array(tone(44_100, 44_100, hz=15_000), 44_100, *FACTS)
    assert np.abs(found[200:-200]).max() < 0.001, "and is not folded to 1,000 Hz"


@pytest.mark.parametrize("num_channels", [2, 6, 8])
def test_channels_of_files_are_mixed_to_their_mean(num_channels: int) -> None:
    channels_CN = np.stack([clip(4000, seed=i) for i in range(num_channels)])
    data = sound_file("wav", "pcm_f32le", channels_CN, RATE)
    np.testing.assert_allclose(
        sounds.of_file(data, *FACTS), channels_CN.mean(axis=0), rtol=0, atol=1e-6
    )


def test_a_tag_before_the_sound_is_skipped() -> None:
    tag = b"ID3\x04\0\0\0\0\x02\x01" + bytes(257)
    samples = clip(4000)
    for kind, codec in (("flac", "flac"), ("adts", "aac"), ("mp3", "libmp3lame")):
        data = sound_file(kind, codec, samples[None], RATE)
        assert np.array_equal(sounds.of_file(tag + data, *FACTS), sounds.of_file(data, *FACTS))


def test_a_file_that_was_written_to_a_pipe_goes_to_its_end() -> None:
    data = wav(clip(500))
    at = data.index(b"data") + 4
    piped = data[:4] + b"\xff" * 4 + data[8:at] + b"\xff" * 4 + data[at + 4 :]
    assert np.array_equal(sounds.of_file(piped, *FACTS), sounds.of_file(data, *FACTS))


def png() -> bytes:
    file = io.BytesIO()
    picture(30, 20).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "data", [b"", b"\xff", bytes(100), PLAYLIST, b"ffconcat version 1.0", png()]
)
def test_what_is_no_sound_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not audio in WAV, MP3, FLAC, Ogg, AAC, MP4"):
        sounds.of_file(data, *FACTS)


TONE = tone(16_000, RATE)[None]


@pytest.mark.parametrize(
    ("kind", "codec", "share"),
    [("wav", "pcm_s16le", 0.5), ("flac", "flac", 0.5), ("flac", "flac", 0.99), ("ipod", "aac", 0.5),
     ("adts", "aac", 0.5), ("mp3", "libmp3lame", 0.01), ("ogg", "libopus", 0.01)],
)  # fmt: skip
def test_cut_files_are_refused(kind: str, codec: str, share: float) -> None:
    data = sound_file(kind, codec, TONE, RATE)
    with pytest.raises(ValueError, match=r"corrupt or truncated|no samples") as caught:
        sounds.of_file(data[: int(len(data) * share)], *FACTS)
    assert "BytesIO" not in str(caught.value)


@pytest.mark.parametrize(("kind", "codec"), [("mp3", "libmp3lame"), ("webm", "libopus")])
def test_formats_of_streams_may_end_anywhere(kind: str, codec: str) -> None:
    data = sound_file(kind, codec, TONE, RATE)
    found = sounds.of_file(data[: len(data) // 2], *FACTS)
    assert 4000 < len(found) < 12_000


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3", "ipod"])
def test_damage_is_an_error_or_some_sound(kind: str) -> None:
    codec = {"wav": "pcm_s16le", "ogg": "libopus", "mp3": "libmp3lame", "ipod": "aac"}.get(
        kind, kind
    )
    data = sound_file(kind, codec, tone(4000, RATE)[None], RATE)
    draw = np.random.default_rng(0)
    num_read = 0
    for _ in range(40):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[draw.integers(0, len(data), 5)] = draw.integers(0, 256, 5)
        try:
            found = sounds.of_file(damaged[: draw.integers(1, len(data))].tobytes(), *FACTS)
            assert np.isfinite(found).all() and 0 < len(found) <= RATE * LONGEST
            num_read += 1
        except ValueError:
            pass
    assert num_read < 40


def unknown_codec() -> bytes:
    return sound_file("webm", "libopus", TONE, RATE).replace(b"A_OPUS", b"A_XPUS")


def header_of(rate: int) -> bytes:
    data = wav(clip(500))
    return data[:24] + rate.to_bytes(4, "little") + data[28:]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (sound_file("wav", "adpcm_ms", TONE, RATE), "encoded as adpcm_ms: the codecs mp3, aac, fl"),
        (sound_file("wav", "mp2", TONE, RATE), r"encoded as mp2.*: the codecs mp3"),
        (unknown_codec(), "encoded as something unknown: the codecs mp3"),
        (video_file("mp4", 2), "the file has no audio stream"),
        (wav(np.zeros((0,), np.float32)), "it has no samples|corrupt"),
        (sound_file("wav", "pcm_f32le", TONE * np.nan, RATE), "not all finite"),
        (sound_file("wav", "pcm_f32le", TONE * 99, RATE), "its samples reach .*between -1 and 1"),
        (header_of(500), "its sampling rate is 500 Hz: it must be between 1000 and 768000 Hz"),
        (header_of(2**31 - 1), "its sampling rate is 2147483647 Hz"),
    ],
)  # fmt: skip
def test_other_files_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sounds.of_file(data, *FACTS)


@pytest.mark.parametrize(("kind", "codec"), [("wav", "pcm_s16le"), ("mp3", "libmp3lame")])
def test_longer_files_are_refused(kind: str, codec: str) -> None:
    """What a file says of its length is checked before decoding, and its samples meanwhile."""
    data = sound_file(kind, codec, tone(36_000, RATE)[None], RATE)
    with pytest.raises(ValueError, match=r"samples \(2\.\d s\): at most 32000 \(2 s\) are allowed"):
        sounds.of_file(data, *FACTS)
    assert len(sounds.of_file(data, RATE, 2.5)) >= 36_000


def test_decoding_stops_at_the_limit() -> None:
    """An hour of silence is small."""
    data = sound_file("mp3", "libmp3lame", np.zeros((1, 3600 * 8000), np.float32), 8000, b="8k")
    with pytest.raises(ValueError, match=r"it has 16\d\d\d samples \(2\.\d s\): at most 16000"):
        sounds.of_file(data, *FACTS)


def film(codec: str = "aac", seconds: float = 1.0) -> bytes:
    """A video of two frames with a tone."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        video: Any = container.add_stream("mpeg4", rate=2)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sound: Any = container.add_stream(codec, rate=RATE, layout="mono")
        write(container, sound, tone(int(seconds * RATE), RATE)[None], RATE)
        for i in range(2):
            container.mux(video.encode(av.VideoFrame.from_image(picture(64, 48, seed=i))))
        container.mux(video.encode())
    return file.getvalue()


def test_sound_beside_pictures_is_read() -> None:
    assert RATE <= len(sounds.of_file(film(), *FACTS)) < RATE + 2048


def test_a_process_decodes_as_a_thread_does() -> None:
    decoder, memory = Decoder(MediaOptions()), Memory(1 << 30, 1)
    files = [("mp3", "libmp3lame"), ("flac", "flac"), ("wav", "pcm_s16le")]
    try:
        with memory.part(lambda: None) as part:
            for kind, codec in files:
                data = sound_file(kind, codec, tone(22_050, 22_050)[None], 22_050)
                found = decoder.sound(data, part, *FACTS)
                assert np.array_equal(found, sounds.of_file(data, *FACTS))
            process = decoder._program.process
            with pytest.raises(ValueError, match="corrupt or truncated"):
                decoder.sound(data[:-999], part, *FACTS)
            with pytest.raises(ValueError, match="not audio"):
                decoder.sound(png(), part, *FACTS)
            assert decoder.sound(data, part, *FACTS).shape == (RATE,)
            assert decoder._program.process is process
    finally:
        decoder.close()


def test_memory_for_the_longest_sound_is_asked_for() -> None:
    decoder, memory = Decoder(MediaOptions()), Memory(1, 1)
    try:
        with memory.part(lambda: None) as part:
            decoder.sound(wav(clip(999)), part, *FACTS)
            assert memory.num_shared == part.num_bytes == 2 * 4 * RATE * LONGEST
    finally:
        decoder.close()


def test_without_pyav_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    assert sounds.of_array(clip(999), RATE, *FACTS).shape == (999,)
    for call in (
        lambda: sounds.of_array(clip(999), 8000, *FACTS),
        lambda: sounds.of_file(wav(clip(999)), *FACTS),
    ):
        with pytest.raises(ValueError, match=r"need PyAV: pip install .*\[audio\]"):
            call()


@pytest.mark.parametrize("name", mm_inputs.FORMATS)
def test_parts_of_all_formats_are_taken(name: str) -> None:
    data = base64.b64encode(b"sound").decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": name}}
    (one,) = mm_inputs.from_messages([{"role": "user", "content": [part]}])[1]
    assert one.value == f"data:audio/{name};base64,{data}"
