"""The main process's handle of a worker: start, pipes and end. Does not import torch."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from nanovllm import env, programs
from nanovllm.checks import to_options
from nanovllm.config import EngineConfig

# The prefix of every answer, which is JSON: some libraries print to stdout on import (torch_npu).
ANSWER = "nanovllm: "


class WorkerProcess:
    """A worker and the three pipes to it: requests in, answers and its log out, all in lines.

    `parent` is the process to wait for: the worker itself, or the fork server that forked it.
    """

    def __init__(
        self, parent: subprocess.Popen[bytes], stdin: int, stdout: int, stderr: int
    ) -> None:
        """Takes over this side's ends of the pipes."""
        self.parent = parent
        self.stdin = os.fdopen(stdin, "w")
        self.stdout, self.stderr = os.fdopen(stdout), os.fdopen(stderr)

    def call(self, request: object) -> Any:
        """Send a request and return its answer. Raises BrokenPipeError if the worker has ended."""
        self.stdin.write(json.dumps(request) + "\n")
        self.stdin.flush()
        return self.next_answer()

    def next_answer(self) -> Any:
        """Wait for the next answer. Raises BrokenPipeError if the worker has ended."""
        line = next((line for line in self.stdout if line.startswith(ANSWER)), None)
        if line is None:
            raise BrokenPipeError
        return json.loads(line.removeprefix(ANSWER))

    def dismiss(self) -> None:
        """Send no more requests: the worker ends once it has answered the last one."""
        with contextlib.suppress(BrokenPipeError):  # it has already ended
            self.stdin.close()


def spawn(config: EngineConfig) -> WorkerProcess:
    """Start one worker that imports everything itself."""
    stdin, stdout, stderr = (os.pipe() for _ in range(3))
    theirs = stdin[0], stdout[1], stderr[1]
    process = subprocess.Popen(
        worker_command(config),
        stdin=theirs[0],
        stdout=theirs[1],
        stderr=theirs[2],
        env=env.for_children(),
    )
    for end in theirs:
        os.close(end)
    return WorkerProcess(process, stdin[1], stdout[0], stderr[0])


def worker_command(config: EngineConfig) -> list[str]:
    """The command that runs worker.py: the time now and the options as JSON."""
    options = json.dumps(to_options(config))
    module = "nanovllm.startup.compile_farm.worker"
    return programs.command(module, str(time.time()), options)


def end_all(workers: Sequence[WorkerProcess], seconds: float = 0) -> None:
    """Dismiss workers, wait up to `seconds` for each parent, and kill the rest."""
    for worker in workers:
        worker.dismiss()
    for parent in {worker.parent for worker in workers}:
        end_parent(parent, seconds)


def end_parent(parent: subprocess.Popen[bytes], seconds: float = 0) -> None:
    """Wait up to `seconds` for a worker or fork server, then kill it and all that it forked."""
    try:
        parent.wait(seconds)  # a fork server waits for its workers
    except subprocess.TimeoutExpired:
        if os.name == "posix" and os.getpgid(parent.pid) == parent.pid:
            os.killpg(parent.pid, signal.SIGKILL)
        else:
            parent.kill()
        parent.wait()
