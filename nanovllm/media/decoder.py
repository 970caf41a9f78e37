"""The program of a process that decodes untrusted images, videos and audio.

A decoder may crash, run for minutes or take all memory. This ends only this process, and the
process that serves requests can kill it at any time (`decoders.py`).

Requests and answers go through `confined.py`. A file, and then the pixels of each picture or frame
or the samples, are at the start of a shared file in memory, whose descriptor is the argument.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from nanovllm import confined
from nanovllm.media import clips, pictures, sounds
from nanovllm.media.memory import BYTES_PER_PIXEL
from nanovllm.media.pictures import Pixels

PAGE_BYTES = 4096
# Memory of libraries for any image: arenas of malloc, stacks of the decoders' threads
LIBRARY_BYTES = 768 << 20
KEPT_BYTES = 32 << 20  # of memory for the next image: new pages take time
_PR_SET_PDEATHSIG = 1  # from Linux's prctl.h
PYAV = {"video": clips.pyav, "audio": sounds.pyav}  # kinds that may need it
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h


def write_all(fd: int, data: Any) -> None:
    """Write bytes at the start of a file. Linux writes at most 2 GiB at a time."""
    view, at = memoryview(data).cast("B"), 0
    while at < len(view):
        at += os.pwrite(fd, view[at:], at)


def read_all(fd: int, num_bytes: int) -> bytes:
    """The bytes at the start of a file; fewer if it is shorter."""
    found = os.pread(fd, num_bytes, 0)
    while len(found) < num_bytes and (more := os.pread(fd, num_bytes - len(found), len(found))):
        found += more
    return found


class _Decoding:
    """Answers requests, one at a time."""

    def __init__(self, shared: int) -> None:
        self._shared = shared
        self._own_bytes = _size_bytes()
        self._allowed_bytes, self._has_av = 0, False

    def run(self) -> None:
        confined.answer({})  # the libraries are imported
        while (request := confined.request()) is not None:
            try:
                self._answer(request)
            except ValueError as error:
                confined.answer({"error": str(error)})
            except MemoryError:
                confined.answer({"has_no_memory": True})

    def _answer(self, request: dict[str, Any]) -> None:
        kind = request["kind"]
        if kind in PYAV and not self._has_av:
            PYAV[kind]()
            self._own_bytes, self._has_av = _size_bytes(), True
        self._allow(request["memory_bytes"])
        data = read_all(self._shared, request["num_bytes"])
        if kind == "image":
            self._share(pictures.decode(data, request["max_pixels"], self._reserve_pixels))
        elif kind == "audio":
            limits = request["rate"], request["max_seconds"]
            samples = sounds.of_file(data, *limits, self._reserve)
            write_all(self._shared, samples)
            confined.answer({"num_samples": len(samples)})
        else:
            limits = request["max_pixels"], request["max_video_pixels"]
            clip = clips.of_file(data, *limits, self._reserve_pixels)
            confined.answer({"num_frames": clip.num_frames, "fps": clip.fps})
            for pixels in clip.pick(_wanted()):
                self._share(pixels)

    def _reserve_pixels(self, num_pixels: int) -> None:
        self._reserve(num_pixels * BYTES_PER_PIXEL)

    def _reserve(self, num_bytes: int) -> None:
        """Request memory for decoding from the other process."""
        if num_bytes > self._allowed_bytes:
            confined.answer({"needs_bytes": num_bytes})
            reply = confined.request()
            if reply is None:
                raise ValueError("the request was cancelled")
            self._allow(reply["memory_bytes"])

    def _allow(self, num_bytes: int) -> None:
        """Set how much memory this process may take in addition to its memory at the start."""
        if num_bytes == self._allowed_bytes or sys.platform != "linux":
            return
        import resource

        most = self._own_bytes + LIBRARY_BYTES + num_bytes
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        with contextlib.suppress(ValueError, OSError):  # a lower limit is already set
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        self._allowed_bytes = num_bytes

    def _share(self, pixels: Pixels) -> None:
        write_all(self._shared, pixels)
        confined.answer({"height": pixels.shape[0], "width": pixels.shape[1]})


def _wanted() -> Iterator[int]:
    """The indices of the frames that the other side asks for, until it ends."""
    while (request := confined.request()) is not None and request["frame"] is not None:
        yield request["frame"]


def _size_bytes() -> int:
    """The size of this process's address space; 0 if it cannot be read."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * PAGE_BYTES
    except OSError:
        return 0


def _protect() -> None:
    """End this process with its parent, and before its parent if memory runs out. A crash leaves no
    core dump with users' data."""
    if sys.platform != "linux":
        return
    import resource

    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
        with contextlib.suppress(AttributeError):  # another C library than glibc
            libc.mallopt(option, KEPT_BYTES)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def main() -> None:
    _protect()
    with contextlib.suppress(BrokenPipeError):
        _Decoding(int(sys.argv[1])).run()


if __name__ == "__main__":
    main()
