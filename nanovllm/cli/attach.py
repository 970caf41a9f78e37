"""Attached files: images, and texts that are put before a message."""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MAX_BYTES = 64 << 20
Part = Mapping[str, Any]


def read(name: str) -> Part:
    """A file as a part of a message. Raises OSError, and ValueError for a file that is too large or
    neither an image nor text."""
    path = Path(name).expanduser()
    if not path.exists():
        raise ValueError(f"there is no file {name!r}")
    if not path.is_file():
        raise ValueError(f"{name!r} is not a file")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{name!r} has {size:,} bytes: at most {MAX_BYTES:,} can be attached")
    data = path.read_bytes()
    kind = mimetypes.guess_type(path.name)[0] or ""
    if kind.startswith("image/") and kind != "image/svg+xml":
        url = f"data:{kind};base64,{base64.b64encode(data).decode()}"
        return {"type": "image_url", "image_url": {"url": url}}
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{name!r} is neither an image nor text in UTF-8") from None
    if "\0" in text:
        raise ValueError(f"{name!r} is neither an image nor text in UTF-8")
    return {"type": "text", "text": f"{path.name}:\n\n{text.rstrip()}\n\n"}


def content(text: str, parts: Sequence[Part]) -> str | list[Part]:
    """The content of a message: a text, or a list of parts if there are images."""
    parts = [*parts, {"type": "text", "text": text}]
    if any(part["type"] != "text" for part in parts):
        return parts
    return "".join(part["text"] for part in parts)
