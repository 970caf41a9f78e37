"""FFmpeg's libraries through PyAV, for files that anybody may have made: the caller names the
container and the decoders, and no file opens another one."""

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
    context = stream.codec_context  # None: no decoder of FFmpeg's fits
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
    """The file as one of these containers; no guess of FFmpeg's, which would also read playlists,
    whose entries name other files and addresses.

    PyAV's errors, which have names of files in them, become a ValueError about `what`.
    """
    # no protocol: a file inside the file is not opened. Other decoders would run to find out what
    # the file has.
    options = {"protocol_whitelist": "none", "codec_whitelist": ",".join(decoders)}
    try:
        with av.open(io.BytesIO(data), format=container, options=options) as found:
            yield found
    except MemoryError:  # some of PyAV's errors are this too
        raise
    except av.FFmpegError:
        raise ValueError(f"the {what} cannot be decoded: it is corrupt or truncated") from None
