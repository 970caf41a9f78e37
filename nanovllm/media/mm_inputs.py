"""Parses the forms of users' images, videos and audio clips into a list of `MMInput`.

`from_data` reads vLLM's `multi_modal_data`, `from_messages` OpenAI's parts of contents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanovllm.media.options import MediaOptions

IMAGE, VIDEO, AUDIO = "image", "video", "audio"
KINDS = (IMAGE, VIDEO, AUDIO)
# metadata of a video whose frames were read elsewhere, with vLLM's names
METADATA = ("fps", "total_num_frames", "frames_indices", "do_sample_frames")
# metadata that follows from the others or is not used
UNUSED_METADATA = ("duration", "width", "height", "video_backend")
# keys of parts: OpenAI's and vLLM's of references, and those of pictures in memory
REFERENCES = {"image_url": IMAGE, "video_url": VIDEO, "audio_url": AUDIO}
VALUES = {"image": IMAGE, "image_pil": IMAGE, "video": VIDEO, "audio": AUDIO}
ENCODED = {"input_audio": AUDIO}  # base64 and its format, which is one of:
FORMATS = ("wav", "mp3", "flac", "ogg", "opus", "m4a", "mp4", "aac", "webm")
DETAILS = ("auto", "low", "high", None)
TYPES = (*REFERENCES, *VALUES, *ENCODED)


@dataclass(frozen=True)
class MMInput:
    """An image, a video or an audio clip in the user's form.

    kind: "image", "video" or "audio". name: what errors call it, such as "image 2".
    value: a reference (text), a picture, for a video a list of these or an array of frames, for
        audio a pair of an array of samples and their rate.
    metadata: facts about a video's frames, by the names in METADATA.
    """

    kind: str
    name: str
    value: Any
    metadata: Mapping[str, Any] = field(default_factory=dict)


def from_data(data: Any) -> list[MMInput]:
    """The media of a prompt's `multi_modal_data`: {"image": …, "video": …, "audio": …}, one each
    or lists."""
    names = ", ".join(map(repr, KINDS))
    if not isinstance(data, Mapping):
        raise ValueError(f"multi_modal_data must be a dict with keys of {names}")
    unknown = [key for key in data if key not in KINDS]
    if unknown:
        raise ValueError(f"multi_modal_data has the key {unknown[0]!r}: use one of {names}")
    given: list[MMInput] = []
    for kind in KINDS:
        value = data.get(kind)
        values = [] if value is None else _values(kind, value)
        given += [_given(kind, i, one) for i, one in enumerate(values, 1)]
    return given


def _values(kind: str, value: Any) -> list[Any]:
    """The single items of a value of `multi_modal_data`."""
    if kind == AUDIO:
        return value if isinstance(value, list) else [value]
    one_dims = 3 if kind == IMAGE else 4
    if kind == VIDEO and _is_with_metadata(value):
        return [value]
    if isinstance(value, (list, tuple)):
        is_one_video = kind == VIDEO and len(value) > 0 and is_picture(value[0])
        return [value] if is_one_video else list(value)
    if getattr(value, "ndim", 0) > one_dims:
        return list(value)
    return [value]


def _given(kind: str, number: int, value: Any, metadata: Any = None) -> MMInput:
    name = f"{kind} {number}"
    if kind == VIDEO and _is_with_metadata(value):
        value, metadata = value
    if kind == IMAGE and not (isinstance(value, str) or is_picture(value)):
        raise ValueError(
            f"{name} is of type {type(value).__name__}: it must be a PIL image, an array or a "
            "reference"
        )
    if kind == VIDEO:
        _check_video(name, value)
    if kind == AUDIO:
        _check_audio(name, value)
    return MMInput(kind, name, value, _checked_metadata(name, value, metadata or {}))


def _is_with_metadata(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Mapping)


def _check_audio(name: str, value: Any) -> None:
    if isinstance(value, str):
        return
    if not (isinstance(value, tuple) and len(value) == 2 and hasattr(value[0], "dtype")):
        raise ValueError(
            f"{name} is of type {type(value).__name__}: it must be a pair (array of samples, "
            "sampling rate) or a reference"
        )


def _check_video(name: str, value: Any) -> None:
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError(f"{name} has no frames")
        wrong = [one for one in value if not (isinstance(one, str) or is_picture(one))]
        if wrong:
            raise ValueError(
                f"{name} has a frame of type {type(wrong[0]).__name__}: frames are PIL images, "
                "arrays or references"
            )
    elif not (isinstance(value, str) or getattr(value, "ndim", 0) == 4):
        raise ValueError(
            f"{name} is of type {type(value).__name__}: it must be a list of frames, an array of "
            "four dimensions or a reference"
        )


def _checked_metadata(name: str, given: Any, metadata: Any) -> dict[str, Any]:
    if not isinstance(metadata, Mapping):
        raise ValueError(f"{name} has metadata of type {type(metadata).__name__}: give a dict")
    for key in metadata:
        if key not in METADATA + UNUSED_METADATA:
            raise ValueError(f"{name} has metadata {key!r}: use {', '.join(METADATA)}")
    fps = metadata.get("fps")
    if fps is not None and not (isinstance(fps, (int, float)) and 0 < fps < float("inf")):
        raise ValueError(f"{name} has fps {fps!r}: it must be a number above 0")
    found = {key: metadata[key] for key in METADATA if metadata.get(key) is not None}
    if found and isinstance(given, str):
        raise ValueError(f"{name} is a file, which has its own metadata: give none")
    return found


def is_picture(value: Any) -> bool:
    """Whether a value is a PIL image or an array of one picture."""
    if hasattr(value, "getbands") and hasattr(value, "convert"):
        return True
    return getattr(value, "ndim", 0) in (2, 3) and hasattr(value, "dtype")


def from_messages(
    messages: Sequence[Mapping[str, Any]],
) -> tuple[list[dict[str, Any]], list[MMInput]]:
    """The messages of one conversation with bare parts for media, such as {"type": "image"}, as
    chat templates expect; and the media in the order of the parts."""
    bare: list[dict[str, Any]] = []
    given: list[MMInput] = []
    counts = dict.fromkeys(KINDS, 0)
    for message in messages:
        content = message.get("content")
        if isinstance(content, str) or not isinstance(content, Sequence):
            bare.append(dict(message))
            continue
        parts: list[Any] = []
        for part in content:
            one = _of_part(part, counts)
            if one is not None:
                given.append(one)
            parts.append(part if one is None else {"type": one.kind})
        bare.append({**message, "content": parts})
    return bare, given


def _of_part(part: Any, counts: dict[str, int]) -> MMInput | None:
    """The image, video or clip of a part; None for other parts. Counts it."""
    key = part.get("type") if isinstance(part, Mapping) else None
    kind = REFERENCES.get(str(key)) or VALUES.get(str(key)) or ENCODED.get(str(key))
    if kind is None:
        return None
    counts[kind] += 1
    name = f"{kind} {counts[kind]}"
    others = {k: v for k, v in part.items() if k not in ("type", key) and v is not None}
    metadata = others.pop("video_metadata", None) if kind == VIDEO else None
    if others:
        raise ValueError(f"{name} has the option {next(iter(others))!r}, which is not supported")
    value = part.get(key)
    if value is None:
        raise ValueError(f"{name} is empty: its part has no {key!r}")
    if key in REFERENCES:
        value = _url(name, value)
    if key in ENCODED:
        value = _data_url(name, value)
    return _given(kind, counts[kind], value, metadata)


def _url(name: str, value: Any) -> str:
    """The reference in the value of image_url: a text, or {"url": text, "detail": "auto"}. As in
    vLLM, the detail has no effect: the checkpoint's settings determine the number of pixels."""
    if isinstance(value, Mapping):
        unknown = [key for key in value if key not in ("url", "detail")]
        if unknown:
            raise ValueError(f"{name} has the option {unknown[0]!r}, which is not supported")
        if value.get("detail") not in DETAILS:
            raise ValueError(f"{name} has detail {value['detail']!r}: use 'auto', 'low' or 'high'")
        value = value.get("url")
    if not isinstance(value, str):
        raise ValueError(f"{name} has a URL of type {type(value).__name__}: it must be text")
    return value


def _data_url(name: str, value: Any) -> str:
    """The data URL of the value of input_audio: {"data": base64, "format": "mp3"}. The first bytes
    of the data determine the format, not the key."""
    if not isinstance(value, Mapping) or value.keys() != {"data", "format"}:
        raise ValueError(f"{name} must have the keys 'data' and 'format'")
    if value["format"] not in FORMATS:
        raise ValueError(
            f"{name} has the format {value['format']!r}: use one of {', '.join(FORMATS)}"
        )
    if not isinstance(value["data"], str):
        raise ValueError(f"{name} has data of type {type(value['data']).__name__}: give base64")
    return f"data:audio/{value['format']};base64,{value['data']}"


def check_counts(given: Sequence[MMInput], options: MediaOptions) -> None:
    """Raises ValueError for more images, videos or clips than a prompt may have."""
    limits = {
        IMAGE: options.max_images, VIDEO: options.max_videos, AUDIO: options.max_audios
    }  # fmt: skip
    for kind, most in limits.items():
        num = sum(one.kind == kind for one in given)
        if num > most:
            raise ValueError(f"the prompt has {num} {kind}s: at most {most} are allowed")


def refuse(model: str, given: Sequence[MMInput], why: str = "accepts text only") -> None:
    """Raises ValueError if a prompt has media that a model cannot take."""
    if given:
        raise ValueError(f"the prompt has {given[0].name}, but {model!r} {why}")
