"""The program of a worker process, which answers each task with a line, and of a fork server."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence

import torch

from nanovllm import env, log
from nanovllm.compile.trace import trace
from nanovllm.config import EngineConfig
from nanovllm.platforms import preload
from nanovllm.startup.compile_farm.builder import Builder
from nanovllm.startup.compile_farm.worker_handle import ANSWER
from nanovllm.startup.resolve import select_platform
from nanovllm.startup.store_folder import open_store


def main() -> None:
    """Arguments: the time when the process was started, and the options as JSON. A fork server gets
    three pipe ends more for each worker that it may fork."""
    config = EngineConfig(**json.loads(sys.argv[2]))
    pipes = [[int(end) for end in ends.split(",")] for ends in sys.argv[3:]]
    if pipes and not fork_workers(config, pipes):
        return
    try:
        answer_tasks(float(sys.argv[1]), config)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0)  # an orderly end of torch and the device's libraries would take a second


def fork_workers(config: EngineConfig, pipes: Sequence[Sequence[int]]) -> bool:
    """Import everything, then fork the number of workers given on stdin; none if stdin ends first.

    `pipes` has the ends for stdin, stdout and stderr of each worker. Returns True in a worker, and
    False in the server, after all workers have ended.
    """
    preload.import_compilers()
    # the first trace fills tables that later ones share
    trace(lambda x: x + 1, {"x": torch.zeros(2, 2)}, varying=("x",))
    with contextlib.suppress(OSError, ValueError):  # the main process reports a store that fails
        open_store(config, must_keep=True)
        preload.build_driver()
    gc.freeze()  # a collection would write to every object, and so copy all memory in every worker
    # not from sys.stdin, which reads ahead: the workers use it too
    wanted = pipes[: int(os.read(0, 16) or 0)]
    for ends in wanted:
        if os.fork() == 0:
            for target, end in enumerate(ends):
                os.dup2(end, target)
            _close(pipes)
            return True
    _close(pipes)
    # stderr is the first worker's pipe: from here on only that worker holds it
    os.dup2(os.open(os.devnull, os.O_RDWR), 2)
    for _ in wanted:
        os.wait()
    return False


def _close(pipes: Sequence[Sequence[int]]) -> None:
    for end in (end for ends in pipes for end in ends):
        os.close(end)


def answer_tasks(started: float, config: EngineConfig) -> None:
    """Write seconds since the time `started` by stage, then an answer to each line on stdin."""
    seconds = {"imports": time.time() - started}
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # all other output goes to stderr
    log.configure()
    lap = time.perf_counter()
    platform = select_platform(config)
    store = open_store(config)
    # This does not create a device context. Workers that only dry-run and compile do not need
    # one, and destroying fourteen contexts takes two seconds.
    platform.prepare(store.folder / "cpp", env.read().cxx)
    seconds["device"] = time.perf_counter() - lap
    print(ANSWER + json.dumps(seconds), file=out, flush=True)
    builder = Builder(config, platform)
    for line in sys.stdin:
        print(ANSWER + json.dumps(builder.do(*json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
