"""All environment variables that this package reads."""

from __future__ import annotations

import getpass
import os
import shlex
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


@dataclass(frozen=True)
class Environment:
    """NANOVLLM_LOG_LEVEL, NANOVLLM_DUMP_GRAPHS (a folder for graphs), NANOVLLM_STRICT (1: a compile
    after warm-up is an error), NANOVLLM_CACHE (a folder), NANOVLLM_DISABLE_SVD (1: compressed
    experts are not used), NANOVLLM_DISABLE_PEER_MEMORY (1: NCCL does all sums over ranks) and CXX
    (a C++ compiler, perhaps with options). None: not set."""

    log_level: str
    dump_graphs: Path | None
    strict: bool
    cache: Path | None
    cxx: str | None = None
    disable_svd: bool = False
    disable_peer_memory: bool = False

    def store_folder(self, given: str | os.PathLike[str] | None) -> Path:
        """The folder for compiled code: `given` by an option, or NANOVLLM_CACHE, or the default.

        The default is ~/.cache/nanovllm, which is created here. Where that is impossible, it is a
        folder of this user among the temporary files. Raises ValueError for a `~` that has no
        meaning.
        """
        if given:
            return _absolute("compile_cache", os.fspath(given))
        return self.cache or _usable(home_cache()) or _temporary_cache()


def read() -> Environment:
    """Read the environment. Raises ValueError for a value that is not allowed."""
    level = os.environ.get("NANOVLLM_LOG_LEVEL", "INFO").upper()
    if level not in LOG_LEVELS:
        raise ValueError(f"NANOVLLM_LOG_LEVEL is {level!r}: use one of {', '.join(LOG_LEVELS)}")
    strict, disable_svd = _switch("NANOVLLM_STRICT"), _switch("NANOVLLM_DISABLE_SVD")
    folders = {
        name: _absolute(name, os.environ[name]) if os.environ.get(name) else None
        for name in ("NANOVLLM_DUMP_GRAPHS", "NANOVLLM_CACHE")
    }
    cxx = os.environ.get("CXX", "").strip() or None
    try:
        shlex.split(cxx or "")
    except ValueError as error:
        raise ValueError(f"CXX is {cxx!r}, which is no command: {error}") from error
    return Environment(
        level, folders["NANOVLLM_DUMP_GRAPHS"], strict, folders["NANOVLLM_CACHE"], cxx, disable_svd,
        _switch("NANOVLLM_DISABLE_PEER_MEMORY"),
    )  # fmt: skip


def _switch(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{name} is {value!r}: use 0 or 1")
    return value == "1"


def home_cache() -> Path | None:
    """~/.cache/nanovllm; None for a user without a home."""
    home = os.path.expanduser("~")
    return Path(home, ".cache", "nanovllm") if os.path.isabs(home) else None


def _temporary_cache() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    return Path(tempfile.gettempdir(), f"nanovllm-{user}")


def _usable(folder: Path | None) -> Path | None:
    """The folder, made if it is missing, if it can be written or has been filled; else None."""
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) or (folder / "entries").is_dir() else None


def _absolute(name: str, text: str) -> Path:
    """The path that the option or variable `name` gives."""
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ValueError(f"{name} is {text!r}, but no such home folder is known: use a full path")
    return Path(path).absolute()


def api_key() -> str | None:
    """The key for servers that clients of ours ask: OPENAI_API_KEY, as for OpenAI's own client."""
    return os.environ.get("OPENAI_API_KEY") or None


def ray_address() -> str | None:
    """The Ray cluster to use: RAY_ADDRESS, or the one that `ray start` has noted on this machine.
    None: there is none, or RAY_ADDRESS is "local"."""
    if given := os.environ.get("RAY_ADDRESS"):
        return None if given == "local" else given
    temporary = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # as Ray does
    try:
        return Path(temporary, "ray", "ray_current_cluster").read_text().strip() or None
    except OSError:
        return None


def settings() -> dict[str, str]:
    """The variables of this package that are set, for processes on other machines."""
    return {name: text for name, text in os.environ.items() if name.startswith("NANOVLLM_")}


_given: dict[str, str] = {}


def set_default(name: str, value: str, *, also_over: str | None = None) -> None:
    """Set a library's variable unless the user has set it.

    A value that an earlier call set, and `also_over`, count as not set.
    """
    if os.environ.get(name) in (None, also_over, _given.get(name)):
        os.environ[name] = _given[name] = value


def keep_bytecode(folder: Path) -> None:
    """Have Python processes that this one starts keep bytecode in a folder."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder)


def replace(variables: Mapping[str, str]) -> None:
    """Set libraries' variables in this process, which has not used these libraries yet."""
    os.environ.update(variables)


def keep_temporary_files(folder: Path) -> None:
    """Have this process, and programs that it starts, keep their temporary files in a folder."""
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)


_folders: list[str] = []
_temporary: dict[str, str] = {}  # TMPDIR before the first of `_folders`
_changing = threading.Lock()


@contextmanager
def folder_of_compilers(parent: Path, prefix: str) -> Iterator[None]:
    """Meanwhile programs that this process starts keep their temporary files in a new folder, which
    is removed: a compiler that is killed leaves them. Where `parent` takes none, nothing changes.

    Several threads may do this at the same time.
    """
    tempfile.gettempdir()  # the place of this process's own files stays the same
    try:
        folder = tempfile.TemporaryDirectory(dir=parent, prefix=prefix, ignore_cleanup_errors=True)
    except OSError:
        yield
        return
    with folder as path:
        _change_folders(_folders.append, path)
        try:
            yield
        finally:
            _change_folders(_folders.remove, path)


def _change_folders(change: Callable[[str], None], path: str) -> None:
    with _changing:
        if not _folders:
            _temporary.clear()
            _temporary.update({"TMPDIR": os.environ["TMPDIR"]} if "TMPDIR" in os.environ else {})
        change(path)
        os.environ.pop("TMPDIR", None)
        os.environ.update({"TMPDIR": _folders[-1]} if _folders else _temporary)


def for_children() -> dict[str, str]:
    """The environment for child processes: they import this package from the same place."""
    root = str(Path(__file__).parents[1])
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
