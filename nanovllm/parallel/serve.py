"""A rank's side: connects to rank 0 and handles messages until rank 0 closes the channel.

Does not import torch, so that a rank can connect before slow imports.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanovllm import env, programs
from nanovllm.parallel.channel import Channel, ChannelClosed
from nanovllm.parallel.errors import RankFailed

BEAT_SECONDS = 1.0

# A message from rank 0 has the name of a handler; NAME?NUMBER requests a reply. The first is SETUP.
# A rank sends CONNECTED once, then ANSWER and ERROR, followed by the number if there is one.
ASKS = "?"
SETUP, CONNECTED, ANSWER, ERROR = "setup", "connected", "answer", "error"

_PR_SET_PDEATHSIG = 1  # from Linux's prctl.h

Handler = Callable[[bytes], "bytes | None"]


class RankConnection(NamedTuple):
    """A rank's data from its start.

    setup: from `WorkerGroup.start`.
    folder: a private folder of all ranks, removed by rank 0 at the end.
    """

    rank: int
    size: int
    setup: dict[str, Any]
    channel: Channel
    folder: Path


def connect(argv: Sequence[str]) -> RankConnection:
    """Connect to rank 0; `argv` are the arguments of the process, as passed by `WorkerGroup.start`.

    Starts a heartbeat thread; the process now ends when rank 0's process ends. It ignores SIGINT:
    rank 0 ends it after Ctrl-C. Its temporary files, and those of compilers that it runs, are in
    the ranks' folder, because both may be killed.
    """
    parser = argparse.ArgumentParser()
    for name in ("rank", "size", "channel", "beats"):
        parser.add_argument(f"--{name}", type=int, required=True)
    given = parser.parse_args(argv)
    programs.begin()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()
    for fd in (given.channel, given.beats):
        os.set_inheritable(fd, False)
    channel = Channel(socket.socket(fileno=given.channel))
    try:
        name, payload = channel.receive()
        channel.send(CONNECTED)
    except ChannelClosed:
        os._exit(1)  # rank 0 has ended
    assert name == SETUP, name
    start = json.loads(payload)
    env.keep_temporary_files(Path(start["folder"]))
    threading.Thread(target=_beat, args=(given.beats,), name="heartbeat", daemon=True).start()
    return RankConnection(given.rank, given.size, start["setup"], channel, Path(start["folder"]))


def serve(channel: Channel, handlers: Mapping[str, Handler]) -> None:
    """Call the handler named by each message, in order, until rank 0 closes the channel.

    The result of a handler called by `WorkerGroup.call` is the reply. Errors of handlers are sent
    to rank 0; the traceback goes to stderr unless the error is a ValueError, which is a user's
    mistake.
    """
    with contextlib.suppress(ChannelClosed):
        while True:
            name, payload = channel.receive()
            name, _, number = name.partition(ASKS)
            try:
                answer = handlers[name](payload)
            except Exception as error:
                if not isinstance(error, ValueError):
                    traceback.print_exc()
                channel.send(ERROR + number, error_bytes(error))
            else:
                if number:
                    channel.send(ANSWER + number, answer or b"")


def error_bytes(error: Exception) -> bytes:
    """The payload of an ERROR."""
    is_mistake = isinstance(error, ValueError)
    kind, text = type(error).__name__, str(error)
    if isinstance(error, RankFailed):  # of ranks that this process has started
        kind, text = error.what, error.details.removeprefix("; ")
    return json.dumps([kind, text, is_mistake]).encode()


def _beat(fd: int) -> None:
    """Write a byte to the pipe `fd` every second; exit when its other end is closed.

    Writing does not wait for a reader, so a stopped or slow parent does no harm.
    """
    os.set_blocking(fd, False)
    poll = select.poll()
    poll.register(fd, 0)  # only errors: the other end is closed
    while not poll.poll(1000 * BEAT_SECONDS):
        with contextlib.suppress(OSError):  # the pipe is full; if it is closed, the loop ends
            os.write(fd, b".")
    os._exit(1)


def _end_with_parent() -> None:
    """Make Linux kill this process when its parent ends, even if this process is stopped.

    Elsewhere, or if the parent has already ended, the heartbeat detects it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
