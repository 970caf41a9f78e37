"""Builds the CPU kernels: `python -m tests.kernels.cpu_libraries`.

`make test` runs it beside the linter, on a core that has nothing to do. In an empty store, each
worker of the tests would otherwise build them, since they all begin at once.
"""

from __future__ import annotations

from pathlib import Path

from nanovllm import env
from nanovllm.kernels.cpu import build, experts, ggml, library, packed, step


def build_all() -> Path:
    """The folder of the built kernels."""
    folder = env.read().store_folder(None) / "cpp"
    before = build._LibraryState.settings
    build.configure(folder, env.read().cxx, may_compile=True)
    for load in (library.load, step.load, experts._load, packed._load, ggml._load):
        # not what this process has loaded, perhaps from a store of one test
        load.__wrapped__()
    build._LibraryState.settings = before
    return folder


if __name__ == "__main__":
    build_all()
