"""Untrusted text on a terminal, which a model or a server must not control."""

from __future__ import annotations

from typing import TextIO

# The controls C0, DEL and C1 without newline and tab. Terminals act on some of them: they write to
# the clipboard (OSC 52), move the cursor and overwrite earlier output. Each is replaced separately,
# so a stream can be cut anywhere.
_PICTURES = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: "\u2421",
    **dict.fromkeys(range(0x80, 0xA0), "\ufffd"),
}


def printable(text: str) -> str:
    """The text with visible characters in place of control characters except newline and tab."""
    return text if text.isprintable() else text.translate(_PICTURES)


def write(text: str, to: TextIO) -> None:
    """Write untrusted text at once: unchanged, or `printable` on a terminal."""
    to.write(printable(text) if to.isatty() else text)
    to.flush()
