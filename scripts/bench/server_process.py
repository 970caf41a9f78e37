"""Runs a server and other commands as processes with a time limit, for `server.py`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

END_SECONDS = 30.0  # for processes to end after a signal
MAX_ERROR_CHARS = 600
NANOVLLM = (sys.executable, "-m", "nanovllm")
NAME = "served"  # of the model in requests
ENGINE = "nanovllm.replicas.engine_program"
IS_SERVED = re.compile(r"is served at (http://\S+)")


class Limit:
    """The time limit of a case. `left` raises TimeoutError once it has passed."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._end = seconds, time.monotonic() + seconds

    def left(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"the case takes longer than {self._seconds:g} s (--case-timeout)")
        return left


def run(
    command: Sequence[str], environment: Mapping[str, str], limit: Limit, *,
    folder: Path | None = None, output: Path | None = None,
) -> str:  # fmt: skip
    """The output of a command, whose processes are killed at the limit. folder: where it runs.
    output: files of this name with the suffixes .out and .err get its output while it runs. Raises
    RuntimeError with the end of stderr, or of stdout if that is empty, if it fails, and
    TimeoutError."""
    with TemporaryDirectory() as temporary:
        place = output or Path(temporary, "output")
        files = [place.with_name(f"{place.name}.{suffix}") for suffix in ("out", "err")]
        with files[0].open("w") as out, files[1].open("w") as err:
            process = subprocess.Popen(
                command, env=environment, stdout=out, stderr=err, cwd=folder, start_new_session=True
            )
            try:
                process.wait(limit.left())
            except subprocess.TimeoutExpired:
                limit.left()  # raises
                raise
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said, errors = (file.read_text(errors="replace") for file in files)
    if process.returncode:
        end = (errors.strip() or said)[-MAX_ERROR_CHARS:]  # pytest writes what failed to stdout
        raise RuntimeError(f"exit status {process.returncode}: {end}")
    return said


def last_json(out: str) -> dict[str, Any]:
    """The last line that is a JSON object."""
    found: dict[str, Any] = json.loads([line for line in out.splitlines() if line[:1] == "{"][-1])
    return found


class Server:
    """`nanovllm serve` with these words. Its log is appended to a file."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.begun = time.monotonic()
        self.process = subprocess.Popen(
            [*NANOVLLM, "serve", *words, "--port", "0"],
            env={**environment, "NANOVLLM_LOG_LEVEL": "INFO"},  # the log has the address
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self.url = ""
        self._lines: list[str] = []
        self._is_known = threading.Event()  # set once the address is known or the server has ended
        self._reader = threading.Thread(target=self._read, args=(log,), daemon=True)
        self._reader.start()

    def _read(self, log: Path) -> None:
        assert self.process.stderr is not None
        with log.open("a", encoding="utf-8") as file:
            for line in self.process.stderr:
                file.write(line)
                self._lines.append(line)
                if found := IS_SERVED.search(line):
                    self.url = found[1]
                    self._is_known.set()
        self._is_known.set()

    def wait(self, limit: Limit) -> None:
        """Wait for the server's address. Raises RuntimeError if it ends before."""
        self._is_known.wait(limit.left())
        limit.left()
        if not self.url:
            raise RuntimeError(f"the server has ended: {''.join(self._lines)[-MAX_ERROR_CHARS:]}")

    def ask(self, limit: Limit) -> None:
        """Wait for the answer to a short request."""
        body = json.dumps({"model": NAME, "prompt": [5, 6, 7], "max_tokens": 1}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/completions", body, headers)
        with urllib.request.urlopen(request, timeout=limit.left()) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 1

    @property
    def is_running(self) -> bool:
        return bool(self.url) and self.process.poll() is None

    def pids(self) -> list[int]:
        """Of the server and all its descendants."""
        listed = _processes()
        found = [self.process.pid]
        for pid in found:  # grows in the loop
            found += [child for child, (parent, _) in listed.items() if parent == pid]
        return found

    def engine_pid(self) -> int:
        """Of the engine's process."""
        own, listed = self.pids(), _processes()
        (found,) = (pid for pid in own if pid in listed and ENGINE in listed[pid][1])
        return found

    def end(self, pid: int, number: int) -> dict[str, Any]:
        """Send a signal to one of the processes. Returns the server's exit status, the seconds
        until it has ended, and the processes that are left."""
        pids, begun = self.pids(), time.monotonic()
        os.kill(pid, number)
        status = self.process.wait(END_SECONDS)
        seconds = time.monotonic() - begun
        while (left := [one for one in pids if one in _processes()]) and (
            time.monotonic() - begun < seconds + 1
        ):
            time.sleep(0.05)
        return {"exit_status": status, "seconds": seconds, "processes_left": len(left)}

    def close(self) -> None:
        """End all processes, also those of a server that has failed."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            for pid in reversed(self.pids()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()
        self._reader.join(END_SECONDS)


def _processes() -> dict[int, tuple[int, str]]:
    """The parent and the command of each process that has not ended, by its id."""
    columns = ["ps", "-A", "-ww", "-o", "pid=,ppid=,stat=,args="]
    listed = subprocess.run(columns, capture_output=True, text=True, check=True).stdout
    found = {}
    for line in listed.splitlines():
        pid, parent, state, *command = line.split(None, 3)
        if not state.startswith("Z"):
            found[int(pid)] = int(parent), " ".join(command)
    return found
