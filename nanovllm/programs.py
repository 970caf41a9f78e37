"""Starts the programs of this package: their import path, and no core dumps.

`python -m` and `python -c` put the working directory first in `sys.path`, before the standard
library. It may be the folder of an untrusted checkpoint that contains a file safetensors.py.
Python's option -P prevents this, from Python 3.11 on; `launch.py` does it on all versions.
`env.for_children` keeps the same folder out of the variables that list folders.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from nanovllm import env

# exit statuses of a shell's command that a signal has ended
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM

_LAUNCHER = str(Path(__file__).absolute().with_name("launch.py"))


class DoesNotStart(RuntimeError):
    """A process for the input of requests does not start. The request is not the cause. The message
    contains no paths."""


def command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module as `python -m` does, but imports nothing from the working
    directory. Use it with the variables of `env.for_children`."""
    return [sys.executable, _LAUNCHER, module, *arguments]


def start_confined(
    module: str, *arguments: str, pass_fds: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """Start a process that handles untrusted input (`confined.py`), with only the variables that it
    needs.

    Requests go to its `stdin`. Answers come from `stdout`, a pipe whose number is the last argument
    of the process: it is separate from the output of libraries when Python starts. Standard output
    and error of the process are dropped, since they would quote the input.
    """
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen(
            command(module, *arguments, str(writing)),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            pass_fds=(writing, *pass_fds),
            env=env.for_strangers(),
            start_new_session=True,  # Ctrl-C in a terminal ends only its parent
        )
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    process.stdout = os.fdopen(reading, "rb", 0)
    return process


def begin() -> None:
    """The first call of each program: disables core dumps, which would hold keys, prompts and
    weights, unless NANOVLLM_CORE_DUMPS is 1. The hard limit does not change."""
    if env.may_dump_core():
        return
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows; a lower limit
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


@contextlib.contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Inside the context, SIGTERM raises SystemExit with the status TERMINATED in the main thread,
    so that the same cleanup runs as after Ctrl-C. An ignored signal stays ignored."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, exit_at_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def exit_at_sigterm(number: int, frame: object) -> None:
    """The handler of SIGTERM within `sigterm_as_exit`."""
    raise SystemExit(TERMINATED)


def folder_of(module: str) -> str | None:
    """The full path of the folder in which this process finds a module or its package."""
    try:
        found = importlib.util.find_spec(module.partition(".")[0])
    except ValueError:  # `__main__` has none
        return None
    if found is None:
        return None
    places = found.submodule_search_locations
    place = next(iter(places), None) if places is not None else found.origin
    return place and str(Path(os.path.abspath(place)).parent)


def find_again(folder: str | None) -> None:
    """Let this process import modules from `folder`, after all other folders."""
    if folder is not None and folder not in sys.path:
        sys.path.append(folder)
