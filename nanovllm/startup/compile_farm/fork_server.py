"""A process that imports torch and the compilers once and is then forked into workers (Linux only).

Importing reads thousands of files: on a slow file system a dozen processes that do it at once take
longer than compiling. The server does not use the device, so it can start before torch has detected
one. Importing this module does not import torch.
"""

from __future__ import annotations

import contextlib
import os
import subprocess

from nanovllm import env
from nanovllm.config import EngineConfig
from nanovllm.platforms import preload
from nanovllm.startup.compile_farm.worker_handle import WorkerProcess, end_parent, worker_command


class ForkServer:
    """The main process's handle of the server, which runs `worker.fork_workers`."""

    def __init__(self, config: EngineConfig, max_workers: int) -> None:
        """Start the server, with pipes for `max_workers` workers: they inherit pipes made now."""
        pipes = [[os.pipe() for _ in range(3)] for _ in range(max_workers)]
        theirs = [(stdin[0], stdout[1], stderr[1]) for stdin, stdout, stderr in pipes]
        self._unused = [(stdin[1], stdout[0], stderr[0]) for stdin, stdout, stderr in pipes]
        self.process = subprocess.Popen(
            [*worker_command(config), *(",".join(map(str, ends)) for ends in theirs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=theirs[0][2],  # if an import fails, the first worker's log has the error
            pass_fds=[end for ends in theirs for end in ends],
            env={**env.for_children(), **preload.ENVIRONMENT},
            start_new_session=True,  # so that the whole group can be killed
        )
        for end in (end for ends in theirs for end in ends):
            os.close(end)

    def fork(self, count: int) -> list[WorkerProcess]:
        """Fork `count` workers, at most `max_workers`, once the imports are done. Call it once."""
        stdin = self.process.stdin
        assert stdin is not None
        # if the server has ended, reading from its workers fails
        with contextlib.suppress(BrokenPipeError):
            stdin.write(f"{count}\n".encode())
            stdin.flush()
        ours, self._unused = self._unused[:count], self._unused[count:]
        self._close_pipes()
        return [WorkerProcess(self.process, *ends) for ends in ours]

    def end(self) -> None:
        """Kill the server and all processes that it has forked."""
        self._close_pipes()
        end_parent(self.process)

    def _close_pipes(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        for end in (end for ends in self._unused for end in ends):
            os.close(end)
        self._unused = []
