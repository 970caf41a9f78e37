"""The environment variables that this package reads, all of them here, each once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


@dataclass(frozen=True)
class Environment:
    """NANOVLLM_LOG_LEVEL, NANOVLLM_DUMP_GRAPHS (a folder), NANOVLLM_STRICT (1: a compile after warm-up is an error),
    NANOVLLM_CACHE (a folder, default ~/.cache/nanovllm); CXX, as everywhere the C++ compiler."""

    log_level: str
    dump_graphs: Path | None
    strict: bool
    cache: Path
    cxx: str | None = None


def read() -> Environment:
    level = os.environ.get("NANOVLLM_LOG_LEVEL", "INFO").upper()
    if level not in LOG_LEVELS:
        raise ValueError(f"NANOVLLM_LOG_LEVEL is {level!r}: use one of {', '.join(LOG_LEVELS)}")
    strict = os.environ.get("NANOVLLM_STRICT", "0")
    if strict not in ("0", "1"):
        raise ValueError(f"NANOVLLM_STRICT is {strict!r}: use 0 or 1")
    dump = os.environ.get("NANOVLLM_DUMP_GRAPHS")
    cache = os.environ.get("NANOVLLM_CACHE") or os.path.join(
        os.path.expanduser("~"), ".cache", "nanovllm"
    )
    return Environment(
        level, Path(dump) if dump else None, strict == "1", Path(cache), os.environ.get("CXX")
    )


_given: dict[str, str] = {}


def set_default(name: str, value: str, *, also_over: str | None = None) -> None:
    """Give a library its setting unless the user already has. What an earlier call gave, and `also_over`, count as unset."""
    if os.environ.get(name) in (None, also_over, _given.get(name)):
        os.environ[name] = _given[name] = value


def for_children() -> dict[str, str]:
    """The environment for processes of our own: they find this package where this one did, whatever the folder."""
    root = str(Path(__file__).parents[1])
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
