"""A rank's process, managed by its parent: start, output, heartbeats, end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanovllm import env, programs
from nanovllm.parallel.channel import ChannelClosed, channel_pair
from nanovllm.parallel.serve import BEAT_SECONDS, SETUP

# A rank hangs if it sends no heartbeat, uses no CPU time and has no major page fault for this many
# seconds; until it has connected, it may be waiting for files that it imports.
SILENT_SECONDS, SILENT_SECONDS_AT_START = 5.0, 60.0
# A process that has closed its channel has this long to end: it may run its last step.
END_SECONDS = 5.0
_LATE_SECONDS = 1.5 * BEAT_SECONDS  # after this time a heartbeat is missing
# This much CPU time is a computation. Threads that wait for the GIL wake up 200 times a second,
# which adds up to 0.02 s in some seconds.
_BUSY_SECONDS = 0.1
_LAST_LINES = 12
_PIECE_BYTES = 1 << 16


class RankProcess:
    """The process of rank `rank`, its channel, and pipes for its heartbeats and output.

    Messages and lines of its output begin with `name`.

    Linux kills the process when the thread that created it ends, so that thread must stay. The
    process inherits the file descriptors `inherited` under the same numbers.
    """

    def __init__(
        self, module: str, rank: int, size: int, name: str, inherited: Sequence[int] = ()
    ) -> None:
        self.rank, self.name = rank, name
        self.is_connected = False
        self.channel, sock = channel_pair()
        self.beats, beats = os.pipe()
        self.output, output = os.pipe()
        os.set_blocking(self.beats, False)
        os.set_blocking(self.output, False)
        options = {"rank": rank, "size": size, "channel": sock.fileno(), "beats": beats}
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        try:
            self._process = subprocess.Popen(
                programs.command(module, *arguments),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(sock.fileno(), beats, *inherited),
                env=env.for_children(),
                start_new_session=True,  # Ctrl-C in a terminal reaches only rank 0
            )
        except BaseException:
            self._close()
            raise
        finally:
            sock.close()
            os.close(beats)
            os.close(output)
        self._silent_seconds, self._cpu_seconds, self._num_faults = 0.0, 0.0, 0
        self._seconds_to_end: float | None = None  # set once its channel has closed
        self._line = b""
        self._last_lines: deque[str] = deque(maxlen=_LAST_LINES)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send_setup(self, setup: dict[str, Any], folder: Path) -> None:
        # if the process has ended, its exit code is more useful than an error here
        with contextlib.suppress(ChannelClosed):
            content = {"setup": setup, "folder": str(folder)}
            self.channel.send(SETUP, json.dumps(content).encode())

    def has_ended(self, seconds: float = 0.0) -> bool:
        """Whether the process ends within this many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode is not None

    def kill(self) -> None:
        """Kill the process and its children, unless it has ended."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Write the rest of the output and close the pipes. Call it after the process has ended."""
        self.forward_output()
        self._forward(self._line)
        self._close()

    def note_beats(self) -> bool:
        """Read the heartbeats that have arrived. False once no more can come."""
        try:
            if not os.read(self.beats, _PIECE_BYTES):
                return False
        except BlockingIOError:
            return True
        self._silent_seconds = 0.0
        return True

    def note_connected(self) -> None:
        """It has connected. Silence until then, up to SILENT_SECONDS_AT_START, does not count."""
        self.is_connected, self._silent_seconds = True, 0.0

    def note_closed(self) -> None:
        """Its channel has closed, so it is about to end."""
        self._seconds_to_end = END_SECONDS

    @property
    def is_closed(self) -> bool:
        """Whether its channel has closed."""
        return self._seconds_to_end is not None

    def is_late(self, seconds: float) -> bool:
        """Whether the process should have ended, after `seconds` more have passed."""
        if self._seconds_to_end is None:
            return False
        self._seconds_to_end -= seconds
        return self._seconds_to_end <= 0.0

    def is_hung(self, seconds: float) -> bool:
        """Whether the process hangs, after `seconds` more have passed.

        It hangs if it sends no heartbeat, uses no CPU time and has no major page fault. A missing
        heartbeat alone may be a computation, or a large library loading from a slow disk: code that
        holds the GIL stops the heartbeat thread.
        """
        self._silent_seconds += seconds
        if self._silent_seconds < _LATE_SECONDS:
            return False
        used, num_faults = self._work_done()
        if used > self._cpu_seconds + _BUSY_SECONDS or num_faults > self._num_faults:
            self._silent_seconds, self._cpu_seconds = _LATE_SECONDS, used
            self._num_faults = num_faults
        limit = SILENT_SECONDS if self.is_connected else SILENT_SECONDS_AT_START
        return self._silent_seconds >= limit

    def forward_output(self) -> bool:
        """Write complete lines to stderr, with the rank's name. False at the end of the output."""
        try:
            while piece := os.read(self.output, _PIECE_BYTES):
                *lines, self._line = (self._line + piece).split(b"\n")
                for line in lines:
                    self._forward(line)
        except BlockingIOError:
            return True
        return False

    def ending(self) -> tuple[str, str]:
        """How the process ended, and the last lines of its output."""
        self.forward_output()
        code = self._process.returncode
        if code is None:
            how = "stopped responding"
        elif code < 0:
            names = {one.value: one.name for one in signal.Signals}
            how = f"was killed by {names.get(-code, f'signal {-code}')}"
        else:
            how = f"ended with exit code {code}"
        lines = "".join(f"\n  {line}" for line in self._last_lines)
        return f"{self.name} {how}", f"; its last lines:{lines}" if lines else ""

    def _forward(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        if text:
            self._last_lines.append(text)
            with contextlib.suppress(OSError, ValueError):  # stderr may be closed
                sys.stderr.write(f"{self.name}: {text}\n")

    def _work_done(self) -> tuple[float, int]:
        """CPU seconds used by all its threads, and its number of major page faults; zeros where
        /proc is missing."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0, 0
        cpu_seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return cpu_seconds, int(fields[9])

    def _close(self) -> None:
        self.channel.close()
        os.close(self.beats)
        os.close(self.output)
