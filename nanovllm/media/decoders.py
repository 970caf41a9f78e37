"""The engine's side of the processes that decode images, videos and audio (`decoder.py`)."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from nanovllm import programs
from nanovllm.confined import Confined
from nanovllm.media import pictures, sounds
from nanovllm.media.clips import Clip
from nanovllm.media.decoder import read_all, write_all
from nanovllm.media.memory import Reservation
from nanovllm.media.options import MediaOptions
from nanovllm.media.pictures import Pixels
from nanovllm.media.sounds import Samples
from nanovllm.programs import DoesNotStart

_START_S = 30.0  # to import the libraries
_START_TRIES = 2  # something else may end a process, such as a lack of memory
_ANSWER_BYTES = 1 << 16
_KEPT_BYTES = 16 << 20  # of a shared file; memory that is in use already is faster than new one


def start(shared: int) -> subprocess.Popen[bytes]:
    """A process that runs `decoder.py` with a shared file. Linux kills it when the thread that
    calls this ends."""
    return programs.start_confined("nanovllm.media.decoder", str(shared), pass_fds=(shared,))


class Decoder:
    """A process that decodes one file at a time. It starts on first use, and again after a file has
    ended it. One thread at a time may use it."""

    def __init__(self, options: MediaOptions) -> None:
        self._options = options
        self._program = Confined(lambda: start(self._shared), _ANSWER_BYTES)
        self._shared = -1
        self._left_s = 0.0  # of the time to decode the current file
        self._has_clip = False  # the process waits for the numbers of frames

    def picture(self, data: bytes, part: Reservation) -> Pixels:
        """An encoded image as RGB, read-only.

        Raises ValueError if it cannot be read or exceeds a limit, MemoryError if it needs more
        memory than an image of its size may take, and DoesNotStart. The process is ended on a
        timeout, or if the part's `check` raises.
        """
        return self._pixels(self._begin("image", data, part))

    def sound(self, data: bytes, part: Reservation, rate: int, max_seconds: float) -> Samples:
        """The samples of a file at this rate, read-only. Raises as `picture`."""
        answer = self._begin("audio", data, part, rate=rate, max_seconds=max_seconds)
        sounds.check_length(answer["num_samples"], rate, max_seconds)
        return np.frombuffer(
            self._read(answer["num_samples"] * sounds.BYTES_PER_SAMPLE), np.float32
        )

    @contextlib.contextmanager
    def clip(self, data: bytes, part: Reservation) -> Iterator[Clip]:
        """A video file, whose frames can be read inside the context. Raises as `picture`."""
        facts = self._begin("video", data, part)
        self._has_clip = True

        def pick(chosen: Iterable[int]) -> Iterator[Pixels]:
            for index in chosen:
                yield self._pixels(self._asked({"frame": index}, part))

        try:
            yield Clip(facts["num_frames"], facts["fps"], pick)
        finally:
            if self._has_clip:
                self._program.send({"frame": None})
                self._has_clip = False

    def close(self) -> None:
        """End the process."""
        self._has_clip = False
        self._program.end()
        if self._shared >= 0:
            os.close(self._shared)
            self._shared = -1

    def _begin(self, kind: str, data: bytes, part: Reservation, **wanted: float) -> dict[str, Any]:
        """Send a file; the first answer."""
        if not self._program.is_running:
            self._start(part)
        self._left_s = self._options.decode_timeout_s
        write_all(self._shared, data)
        request = {
            "kind": kind, "num_bytes": len(data), "memory_bytes": part.num_bytes,
            "max_pixels": self._options.max_image_pixels,
            "max_video_pixels": self._options.max_video_pixels, **wanted,
        }  # fmt: skip
        return self._asked(request, part)

    def _start(self, part: Reservation) -> None:
        """Start the process; try again if it ends before it is ready."""
        deadline = time.monotonic() + _START_S
        for _ in range(_START_TRIES):
            self.close()
            try:
                self._shared = _new_shared()
                self._program.start()
                if self._program.receive(deadline, part.check) is not None:
                    return
            except OSError as error:
                self.close()
                raise DoesNotStart(
                    f"the process that decodes it does not start: {error.strerror}"
                ) from None
            except BaseException:
                self.close()
                raise
        self.close()
        raise DoesNotStart("the process that decodes it does not start")

    def _asked(self, request: dict[str, Any], part: Reservation) -> dict[str, Any]:
        """The answer to a request. Kills the process unless it can take the next one."""
        try:
            answer = self._answer(request, part)
            while "needs_bytes" in answer:
                part.grow(answer["needs_bytes"])
                answer = self._answer({"memory_bytes": part.num_bytes}, part)
            if "has_no_memory" in answer:
                raise MemoryError
        except BaseException:
            self.close()
            raise
        if "error" in answer:
            self._has_clip = False
            raise ValueError(answer["error"])
        return answer

    def _answer(self, request: dict[str, Any], part: Reservation) -> dict[str, Any]:
        self._program.send(request)
        begin = time.monotonic()
        answer = self._program.receive(begin + self._left_s, part.check)
        self._left_s -= time.monotonic() - begin
        if answer is not None:
            return dict(answer)
        if self._left_s <= 0:
            raise ValueError(
                f"it takes longer than {self._options.decode_timeout_s:g} s to decode (option "
                "decode_timeout_s)"
            )
        raise ValueError("it ended the process that decodes it: it is corrupt or too large")

    def _pixels(self, answer: dict[str, Any]) -> Pixels:
        height, width = answer["height"], answer["width"]
        pictures.check_pixels(width, height, self._options.max_image_pixels)
        data = self._read(height * width * 3)
        return np.frombuffer(data, np.uint8).reshape(height, width, 3)

    def _read(self, num_bytes: int) -> bytes:
        data = read_all(self._shared, num_bytes)
        if len(data) > _KEPT_BYTES:
            os.ftruncate(self._shared, _KEPT_BYTES)
        return data


class Decoders:
    """A decoder for each of `num_workers` threads."""

    def __init__(self, options: MediaOptions, num_workers: int) -> None:
        self._all = [Decoder(options) for _ in range(num_workers)]
        self._idle: queue.LifoQueue[Decoder] = queue.LifoQueue()  # the last one has a process
        for one in self._all:
            self._idle.put(one)

    @contextlib.contextmanager
    def one(self) -> Iterator[Decoder]:
        """A decoder for the exclusive use of this thread."""
        found = self._idle.get()
        try:
            yield found
        finally:
            self._idle.put(found)

    def close(self) -> None:
        """End the processes once no thread has a decoder."""
        for one in self._all:
            one.close()


def _new_shared() -> int:
    """An unnamed file, in memory where possible."""
    if sys.platform == "linux":
        return os.memfd_create("nanovllm-media")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
