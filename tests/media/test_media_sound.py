"""Sound becomes transformers' mel features; damaged, foreign and oversized sound is refused."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm.media import mels, mm_inputs, settings, sounds
from nanovllm.media.options import MediaOptions
from nanovllm.media.placeholders import Placeholders
from nanovllm.media.prepare import Prepared, Preparer
from nanovllm.models.audio import layout
from nanovllm.tokenizer import Tokenizer
from tests.media.vision_cases import picture
from tests.models import omni_cases
from tests.models.omni_cases import PICTURE, RATE, SOUND, as_16_bits, clip, wav

LONGEST = 2.0
FACTS = RATE, LONGEST


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' processor and its folder."""
    folder = tmp_path_factory.mktemp("omni")
    return omni_cases.save_processor(folder), folder


@pytest.fixture(scope="module")
def found(theirs: Any) -> settings.VisionSettings:
    made = settings.load(theirs[1])
    assert made is not None
    return made


@pytest.fixture
def preparer(found: settings.VisionSettings) -> Any:
    made = Preparer(found, MediaOptions(num_media_workers=2))
    yield made
    made.close()


def run(preparer: Preparer, **data: Any) -> list[Prepared]:
    return preparer.submit(mm_inputs.from_data(data)).result(60)


@pytest.mark.parametrize("num_samples", [321, 400, 480, 4000, 4001, 15999, 31900, 32000])
def test_features_are_those_of_transformers(
    theirs: Any, preparer: Preparer, num_samples: int
) -> None:
    sound = clip(num_samples)
    expected = theirs[0](text=[SOUND], audio=[sound], return_tensors="pt")
    mask = expected["feature_attention_mask"][0].bool()
    (ours,) = run(preparer, audio=(sound, RATE))
    assert ours.grid == (int(mask.sum()),)
    wanted_FM = expected["input_features"][0][:, mask].T
    torch.testing.assert_close(ours.values, wanted_FM, rtol=0, atol=1e-5)
    assert ours.values.dtype == torch.float32
    assert ours.num_tokens == layout.num_tokens(ours.grid[0])


def test_silence_has_features(theirs: Any, preparer: Preparer) -> None:
    expected = theirs[0](text=[SOUND], audio=[np.zeros(5000, np.float32)], return_tensors="pt")
    (ours,) = run(preparer, audio=(np.zeros(5000, np.float32), RATE))
    mask = expected["feature_attention_mask"][0].bool()
    assert torch.equal(ours.values, expected["input_features"][0][:, mask].T)


@pytest.mark.parametrize(
    "text", [SOUND, f"a{SOUND}b{SOUND}", f"{PICTURE}{SOUND}", f"{SOUND}{PICTURE} and {SOUND}"]
)
def test_token_ids_equal_transformers(
    theirs: Any, found: settings.VisionSettings, preparer: Preparer, text: str
) -> None:
    clips = [clip(1500 * (i + 1), seed=i) for i in range(text.count("<|AUDIO|>"))]
    images = [picture(60, 50 + 40 * i) for i in range(text.count("<|IMAGE|>"))]
    expected = theirs[0](text=[text], audio=clips, images=images or None, return_tensors="pt")
    items = run(preparer, audio=[(one, RATE) for one in clips], image=images)
    tokenizer = Tokenizer(lambda: theirs[0].tokenizer)
    placeholders = Placeholders(tokenizer, found.with_times, **found.tokens)
    expanded = placeholders.of_text(text, items)
    assert expanded.token_ids == expected["input_ids"][0].tolist()
    short = theirs[0].tokenizer(text)["input_ids"]
    assert placeholders.of_ids(short, items) == expanded
    for item, ((start, num),) in zip(items, expanded.spans):
        token = {"audio": "<|AUDIO|>", "image": "<|IMAGE|>"}[item.kind]
        assert expanded.token_ids[start : start + num] == [omni_cases.IDS[token]] * item.num_tokens


def test_all_forms_of_one_sound_have_one_digest(preparer: Preparer) -> None:
    whole = as_16_bits(clip(4000))
    floats = (whole / 32768).astype(np.float32)
    url = f"data:audio/x-wav;base64,{base64.b64encode(wav(clip(4000))).decode()}"
    forms: list[Any] = [
        (whole, RATE), (floats, RATE), (floats.astype(np.float64), RATE), (floats[None], RATE),
        (torch.from_numpy(floats), np.int64(RATE)), (np.stack((floats, floats)), RATE),
        (np.stack((floats, floats), axis=1), RATE), url,
    ]  # fmt: skip
    found = run(preparer, audio=forms)
    assert len({one.digest for one in found}) == 1
    louder = run(preparer, audio=[(floats * np.float32(0.5), RATE), (floats[:-1], RATE)])
    assert len({one.digest for one in (*found, *louder)}) == 3


def test_a_file_is_read_below_the_allowed_folder_only(
    found: settings.VisionSettings, tmp_path: Path
) -> None:
    (tmp_path / "a.wav").write_bytes(wav(clip(4000)))
    preparer = Preparer(found, MediaOptions(allowed_local_media_path=tmp_path))
    try:
        (ours,) = run(preparer, audio=str(tmp_path / "a.wav"))
        (other,) = run(preparer, audio=(as_16_bits(clip(4000)), RATE))
        with pytest.raises(ValueError, match=r"^audio 1: the path is not below"):
            run(preparer, audio="/etc/passwd")
    finally:
        preparer.close()
    assert ours.digest == other.digest


def test_channels_are_mixed_to_their_mean() -> None:
    left, right = clip(1000, seed=1), clip(1000, seed=2)
    both = np.stack((left, right))
    expected = (left + right) / 2
    for array in (both, both.T):
        np.testing.assert_allclose(sounds.of_array(array, RATE, *FACTS), expected, atol=1e-7)


@pytest.mark.parametrize(
    ("array", "rate", "message"),
    [
        (clip(999), 999, "its sampling rate is 999 Hz: it must be between 1000 and 768000 Hz"),
        (clip(999), 768001, "its sampling rate is 768001 Hz"),
        (clip(999), -16000, "its sampling rate is -16000 Hz"),
        (clip(2001), 1000, r"it has 2001 samples \(2\.0 s\): at most 2000 \(2 s\)"),
        (clip(999), 16000.0, r"the sampling rate is 16000\.0: it must be a whole number"),
        (clip(999), True, "the sampling rate is True"),
        (clip(999), None, "the sampling rate is None"),
        (clip(32001), RATE, r"it has 32001 samples .*at most 32000 \(2 s\)"),
        (np.zeros(0, np.float32), RATE, "it has no samples"),
        (np.zeros((9, 999), np.float32), RATE, r"shape \[9, 999\]: .* at most 8 channels"),
        (np.zeros((1, 2, 999), np.float32), RATE, r"shape \[1, 2, 999\]"),
        (np.array(0.5, np.float32), RATE, r"shape \[\]"),
        (clip(999) * np.float32(32768), RATE, "floats must lie between -1 and 1"),
        (np.full(999, np.nan, np.float32), RATE, "not all finite"),
        (np.full(999, 1e300), RATE, "not all finite"),
        (np.zeros(999, np.int64), RATE, "of type int64"),
        (np.zeros(999, np.bool_), RATE, "of type bool"),
        (np.zeros(999, np.complex64), RATE, "of type complex64"),
        (np.array(["a"] * 999), RATE, "of type <U1"),
        (torch.zeros(999, dtype=torch.bfloat16), RATE, "the samples cannot be read"),
    ],
)
def test_wrong_samples_are_refused(array: Any, rate: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sounds.of_array(array, rate, *FACTS)


def test_sound_a_little_louder_than_full_scale_is_kept() -> None:
    samples = clip(999) * np.float32(5)
    assert np.abs(samples).max() > 1
    assert np.array_equal(sounds.of_array(samples, RATE, *FACTS), samples)


def test_a_clip_without_a_token_is_refused(preparer: Preparer) -> None:
    with pytest.raises(ValueError, match="audio 1: it has 320 samples: at least 321 are needed"):
        run(preparer, audio=(clip(320), RATE))


def test_the_limits_of_the_options_hold(found: settings.VisionSettings) -> None:
    options = MediaOptions(max_audios=1, max_audio_s=0.5, max_item_bytes=2000)
    preparer = Preparer(found, options)
    file = f"data:audio/wav;base64,{base64.b64encode(wav(clip(1001))).decode()}"
    try:
        with pytest.raises(ValueError, match="2 audios: at most 1 are allowed"):
            run(preparer, audio=[(clip(500), RATE)] * 2)
        with pytest.raises(
            ValueError, match=r"audio 1: it has 8001 samples .*at most 8000 \(0\.5 s\)"
        ):
            run(preparer, audio=(clip(8001), RATE))
        with pytest.raises(ValueError, match="audio 1: the data URL has more than 2000 bytes"):
            run(preparer, audio=file)
    finally:
        preparer.close()


def test_a_picture_is_no_sound_even_if_it_was_seen(preparer: Preparer) -> None:
    file = io.BytesIO()
    picture(30, 20).save(file, "PNG")
    encoded = base64.b64encode(file.getvalue()).decode()
    run(preparer, image=f"data:image/png;base64,{encoded}")
    with pytest.raises(ValueError, match="audio 1: the data are not audio"):
        run(preparer, audio=f"data:audio/wav;base64,{encoded}")
    with pytest.raises(ValueError, match="the data URL is of type 'image/png'"):
        run(preparer, audio=f"data:image/png;base64,{encoded}")


def test_sound_that_was_seen_is_not_prepared_again(preparer: Preparer) -> None:
    (first,), (second,) = (run(preparer, audio=(clip(4000), RATE)) for _ in range(2))
    assert first is second


@pytest.mark.parametrize(
    ("message", "part"),
    [
        ("must have the keys 'data' and 'format'", {"input_audio": {"data": "AAAA"}}),
        ("the format 'midi': use one of wav, mp3",
         {"input_audio": {"data": "AAAA", "format": "midi"}}),
        ("data of type int: give base64", {"input_audio": {"data": 1, "format": "wav"}}),
        ("has the option 'id'", {"input_audio": {"data": "AAAA", "format": "wav"}, "id": 1}),
        ("is of type list", {"audio": [0.1, 0.2]}),
        ("is of type tuple", {"audio": ([0.1, 0.2], RATE)}),
        ("is of type ndarray", {"audio": clip(99)}),
        ("is empty", {"audio": None}),
        ("a URL of type int", {"audio_url": {"url": 1}}),
    ],
)  # fmt: skip
def test_wrong_parts_are_refused(message: str, part: dict[str, Any]) -> None:
    message_part = {"type": next(iter(part)), **part}
    with pytest.raises(ValueError, match=f"^audio 1 .*{message}"):
        mm_inputs.from_messages([{"role": "user", "content": [message_part]}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_extractor_type": "SeamlessFeatureExtractor"}, "use one of WhisperFeatureE"),
        ({"padding_side": "left"}, "padding_side='left': only 'right' is supported"),
        ({"dither": 0.1}, "dither=0.1"),
        ({"hop_length": 0}, "hop_length is 0: it must be at least 1"),
        ({"sampling_rate": "16000"}, "sampling_rate is '16000'"),
    ],
)
def test_extractors_that_are_not_computed_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        settings.audio_settings({**omni_cases.PROCESSOR, **changes})


def test_the_settings_of_the_release_are_read() -> None:
    release = {**omni_cases.PROCESSOR, "feature_size": 128, "chunk_length": 300}
    made = settings.audio_settings(release)
    assert made == settings.AudioSettings(16000, 128, 160, 400, 300)
    assert made.max_samples == 4_800_000
    found = mels.features(clip(4000), made)
    assert found.shape == (25, 128)
