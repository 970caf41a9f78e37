"""FFmpeg's libraries through PyAV, for untrusted files: the caller names the container and the
decoders, and no file can open another one."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

from nanovllm import extras


def pyav(what: str, extra: str) -> Any:
    """The module av. Raises ValueError if PyAV is not installed, which `what` needs."""
    try:
        import av
    except ImportError:
        raise ValueError(f"{what} need PyAV: {extras.install(extra)}") from None
    return av


def checked(stream: Any, decoders: Sequence[str], codecs: Sequence[str], what: str) -> Any:
    """A stream's codec context. Raises ValueError for other decoders; errors name the codecs."""
    context = stream.codec_context  # None: FFmpeg has no decoder for it
    name = "something unknown" if context is None else context.name
    if name not in decoders:
        raise ValueError(
            f"the {what} is encoded as {name}: the codecs {', '.join(codecs)} are read"
        )
    return context


@contextlib.contextmanager
def opened(
    av: Any, data: bytes, container: str, decoders: Sequence[str], what: str
) -> Iterator[Any]:
    """Open the file as one of these containers, without FFmpeg's detection, which would also open
    playlists with names of other files and addresses.

    PyAV's errors, which contain file names, become a ValueError about `what`.
    """
    # no protocol, so that files inside the file are not opened; and no other decoders, which would
    # run during probing
    options = {"protocol_whitelist": "none", "codec_whitelist": ",".join(decoders)}
    try:
        with av.open(io.BytesIO(data), format=container, options=options) as found:
            yield found
    except MemoryError:  # also raised by PyAV for other errors
        raise
    except av.FFmpegError:
        raise ValueError(f"the {what} cannot be decoded: it is corrupt or truncated") from None
