"""All environment variables that this package reads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


@dataclass(frozen=True)
class Environment:
    """NANOVLLM_LOG_LEVEL, NANOVLLM_DUMP_GRAPHS (a folder for graphs), NANOVLLM_STRICT (1: a compile
    after warm-up is an error), NANOVLLM_CACHE (a folder, default ~/.cache/nanovllm) and CXX (a C++
    compiler)."""

    log_level: str
    dump_graphs: Path | None
    strict: bool
    cache: Path
    cxx: str | None = None

    def store_folder(self, given: str | os.PathLike[str] | None) -> Path:
        """The folder for compiled code: `given` by an option, or NANOVLLM_CACHE."""
        return Path(given).expanduser().absolute() if given else self.cache


def read() -> Environment:
    """Read the environment. Raises ValueError for a value that is not allowed."""
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
    """Set a library's variable unless the user has set it.

    A value that an earlier call set, and `also_over`, count as not set.
    """
    if os.environ.get(name) in (None, also_over, _given.get(name)):
        os.environ[name] = _given[name] = value


def for_children() -> dict[str, str]:
    """The environment for child processes: they import this package from the same place."""
    root = str(Path(__file__).parents[1])
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
