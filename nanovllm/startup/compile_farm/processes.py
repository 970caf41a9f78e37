"""Processes that compile for this one: how they are started, asked and ended. Importing this does not import torch.

On Linux they are forked from one process that has imported everything: an import is some thousands of files, which on a
slow file system take a dozen processes at once longer than compiling does. That one asks for no device, so it can begin
before torch has told whether there is any.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanovllm import env
from nanovllm.config import EngineConfig
from nanovllm.platforms import preload

ANSWER = "nanovllm: "  # before the JSON of an answer: what a process imports may print as well (torch_npu does)


class Process:
    """A process that builds buckets, and the pipes by which it is asked. Several may be forked from one, their `parent`."""

    def __init__(
        self, parent: subprocess.Popen[bytes], stdin: int, stdout: int, stderr: int
    ) -> None:
        self.parent = parent
        self.stdin, self.stdout, self.stderr = (
            os.fdopen(stdin, "w"),
            os.fdopen(stdout),
            os.fdopen(stderr),
        )

    def ask(self, request: object) -> Any:
        """Its answer to a line; raises BrokenPipeError where it has ended."""
        self.stdin.write(json.dumps(request) + "\n")
        self.stdin.flush()
        return self.next()

    def next(self) -> Any:
        """The next answer that it writes; raises BrokenPipeError where it has ended."""
        line = next((line for line in self.stdout if line.startswith(ANSWER)), None)
        if line is None:
            raise BrokenPipeError
        return json.loads(line.removeprefix(ANSWER))

    def dismiss(self) -> None:
        """It ends by itself once it has done what it was asked."""
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self.stdin.close()


class Server:
    """A process that imports what compiling needs, while it is not known yet how many are wanted, and then becomes those."""

    def __init__(self, config: EngineConfig, most: int) -> None:
        """`most` is how many can be wanted."""
        pipes = [[os.pipe() for _ in range(3)] for _ in range(most)]
        theirs = [(stdin[0], stdout[1], stderr[1]) for stdin, stdout, stderr in pipes]
        self._ours = [(stdin[1], stdout[0], stderr[0]) for stdin, stdout, stderr in pipes]
        self.process = subprocess.Popen(
            [*_command(config), *(",".join(map(str, ends)) for ends in theirs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=theirs[0][2],  # should an import fail, the first says so
            pass_fds=[end for ends in theirs for end in ends],
            env={**env.for_children(), **preload.ENVIRONMENT},
            start_new_session=True,  # so that all can be ended at once
        )
        for end in (end for ends in theirs for end in ends):
            os.close(end)

    def fork(self, count: int) -> list[Process]:
        """So many processes, or as many as there can be; they are there once it has imported everything. To be called once."""
        stdin = self.process.stdin
        assert stdin is not None
        with contextlib.suppress(
            BrokenPipeError
        ):  # it has ended, and the processes will be found so
            stdin.write(f"{count}\n".encode())
            stdin.flush()
        ours, self._ours = self._ours[:count], self._ours[count:]
        self._close()
        return [Process(self.process, *ends) for ends in ours]

    def end(self) -> None:
        """End it, and all that it has forked, now."""
        self._close()
        _end(self.process, 0)

    def _close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        for end in (end for ends in self._ours for end in ends):
            os.close(end)
        self._ours = []


def store_folder(config: EngineConfig, environment: env.Environment) -> Path:
    """Where compiled code is to be kept."""
    return (
        Path(config.compile_cache).expanduser().absolute()
        if config.compile_cache
        else environment.cache
    )


def begin(config: EngineConfig) -> Server | None:
    """The process that will fork, before anything is known of device and model, where it is likely to be wanted: there seems to
    be a GPU, and the store is empty."""
    most = preload.max_processes()
    if (
        config.enforce_eager
        or config.compile_cache_mode != "auto"
        or most < 2
        or not preload.may_have_gpu(config.device)
    ):
        return None
    entries = store_folder(config, env.read()) / "entries"
    try:
        is_empty = not entries.is_dir() or not any(entries.iterdir())
    except OSError:  # opening the store will say what is wrong with it
        is_empty = False
    return Server(config, most) if is_empty else None


def start(config: EngineConfig, count: int) -> list[Process]:
    """Processes that import what they need and wait for their first bucket."""
    if count > 1 and sys.platform == "linux":
        return Server(config, count).fork(count)
    return [_spawn(config) for _ in range(count)]


def _spawn(config: EngineConfig) -> Process:
    stdin, stdout, stderr = (os.pipe() for _ in range(3))
    theirs = stdin[0], stdout[1], stderr[1]
    process = subprocess.Popen(
        _command(config),
        stdin=theirs[0],
        stdout=theirs[1],
        stderr=theirs[2],
        env=env.for_children(),
    )
    for end in theirs:
        os.close(end)
    return Process(process, stdin[1], stdout[0], stderr[0])


def _command(config: EngineConfig) -> list[str]:
    job = json.dumps(
        {**asdict(config), "compile_cache": config.compile_cache and str(config.compile_cache)}
    )
    return [sys.executable, "-m", "nanovllm.startup.compile_farm.builder", str(time.time()), job]


def end(processes: Sequence[Process], seconds: float = 0) -> None:
    """End processes, and those that are forked from the same ones, if they do not end by themselves within `seconds`."""
    for process in processes:
        process.dismiss()
    for parent in {process.parent for process in processes}:
        _end(parent, seconds)


def _end(parent: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        parent.wait(seconds)  # it waits for its forks
    except subprocess.TimeoutExpired:
        if os.name == "posix" and os.getpgid(parent.pid) == parent.pid:
            os.killpg(parent.pid, signal.SIGKILL)
        else:
            parent.kill()
        parent.wait()
