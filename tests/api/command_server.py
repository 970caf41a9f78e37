"""`nanovllm serve` in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextmanager
def command_server(*words: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The URL and the process of a server on any free port. It may end earlier than this."""
    command = [sys.executable, "-m", "nanovllm", "serve", *words, "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    try:
        for line in process.stderr:
            lines.append(line)
            if match := re.search(r"is served at (http://\S+)", line):
                # a full pipe would block the server at its next line of log
                threading.Thread(target=process.stderr.read, daemon=True).start()
                yield match[1], process
                return
        raise AssertionError("".join(lines))
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
