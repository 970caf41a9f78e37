"""The bytes behind a reference: a data URL, a local path, a file URL or a remote URL."""

from __future__ import annotations

import base64
import binascii
import os
import stat
import urllib.parse
from pathlib import Path

from nanovllm.media.fetch import fetch
from nanovllm.media.options import MediaOptions

# Opening does not block on a pipe or follow a link, and the descriptor is not inherited.
FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
FOLDER_FLAGS = FILE_FLAGS | os.O_DIRECTORY
_SPACE = " \t\r\n"
_WITHOUT_SPACE = str.maketrans("", "", _SPACE)
_FROM_URLS = str.maketrans("-_", "+/")


def read(reference: str, kind: str, options: MediaOptions) -> bytes:
    """The encoded bytes of an "image", "video" or "audio". Errors do not contain the reference."""
    scheme = reference[:8].lower()
    if scheme.startswith("data:"):
        return _data_url(reference, kind, options.max_item_bytes)
    if scheme.startswith(("http:", "https:")):
        if not options.allowed_media_domains:
            raise ValueError("remote URLs are refused: allowed_media_domains is empty")
        return fetch(
            reference, options.allowed_media_domains, options.max_item_bytes,
            options.media_timeout_s,
        )  # fmt: skip
    if scheme.startswith("file:"):
        return _local(_file_path(reference), options)
    if "://" in reference:
        raise ValueError("the URL is neither data, file nor https")
    return _local(reference, options)


def _data_url(url: str, kind: str, max_bytes: int) -> bytes:
    head, comma, text = url[len("data:") :].partition(",")
    kind_given, *parameters = (one.strip().lower() for one in head.split(";"))
    if not comma or "base64" not in parameters:
        raise ValueError(f"the data URL must have the form data:{kind}/…;base64,…")
    if not kind_given.startswith(f"{kind}/"):
        raise ValueError(f"the data URL is of type {kind_given[:40]!r}: it must be {kind}/…")
    try:
        data = base64.b64decode(_plain(text), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("the data URL is not base64") from None
    if len(data) > max_bytes:
        raise ValueError(f"the data URL has more than {max_bytes} bytes")
    return data


def _plain(text: str) -> str:
    """Base64 in Python's form. Clients also omit the padding, break lines, percent-encode
    characters, or use the URL-safe alphabet (RFC 4648, section 5)."""
    if "%" in text:
        text = urllib.parse.unquote(text)
    if "-" in text or "_" in text:
        text = text.translate(_FROM_URLS)
    if len(text) % 4 or any(sign in text for sign in _SPACE):
        text = text.translate(_WITHOUT_SPACE)
        if not text.endswith("="):
            text += "=" * (-len(text) % 4)
    return text


def _file_path(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ValueError("the file URL names a host: only local files are read")
    return urllib.parse.unquote(parts.path)


def _local(path: str, options: MediaOptions) -> bytes:
    """The file at a path, which must lie below the allowed folder after symlinks."""
    if options.allowed_local_media_path is None:
        raise ValueError("local paths are refused: allowed_local_media_path is not set")
    try:
        inside = Path(path).resolve().relative_to(options.local_folder)
    except (ValueError, OSError, RuntimeError):  # not a path; outside; a loop of links
        raise ValueError("the path is not below allowed_local_media_path") from None
    try:
        return _read_below(options.local_folder, inside, options.max_item_bytes)
    except OSError:
        raise ValueError("the local file cannot be read") from None


def _read_below(folder: Path, inside: Path, max_bytes: int) -> bytes:
    """Opens folder by folder without following links, which may appear after `resolve`."""
    handle = os.open(folder, FOLDER_FLAGS)
    try:
        for i, name in enumerate(inside.parts):
            is_last = i == len(inside.parts) - 1
            below = os.open(name, FILE_FLAGS if is_last else FOLDER_FLAGS, dir_fd=handle)
            os.close(handle)
            handle = below
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("the path is not a file")
        with open(handle, "rb", closefd=False) as file:
            data = file.read(max_bytes + 1)
    finally:
        os.close(handle)
    if len(data) > max_bytes:
        raise ValueError(f"the local file has more than {max_bytes} bytes")
    return data
