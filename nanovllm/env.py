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

from nanovllm import ray_note
from nanovllm.kernels import private_files

API_KEYS = ("NANOVLLM_API_KEY", "OPENAI_API_KEY")  # not passed on to child processes
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


@dataclass(frozen=True)
class Environment:
    """NANOVLLM_LOG_LEVEL, NANOVLLM_DUMP_GRAPHS (a folder for graphs), NANOVLLM_STRICT (1: a compile
    after warm-up is an error), NANOVLLM_CACHE (a folder), NANOVLLM_DISABLE_SVD (1: compressed
    experts are not used), NANOVLLM_DISABLE_PEER_MEMORY (1: NCCL does all sums over ranks),
    NANOVLLM_EXACT_INPUTS (1: inputs of packed weights are not quantized on CPUs) and CXX (a C++
    compiler, perhaps with options). None: not set."""

    log_level: str
    dump_graphs: Path | None
    strict: bool
    cache: Path | None
    cxx: str | None = None
    disable_svd: bool = False
    disable_peer_memory: bool = False
    exact_inputs: bool = False

    def store_folder(self, given: str | os.PathLike[str] | None) -> Path:
        """The folder for compiled code: `given` by an option, or NANOVLLM_CACHE, or the default.

        The default is ~/.cache/nanovllm, which is created here. Where that is impossible, or other
        users could replace it, it is a folder of this user among the temporary files. Raises
        ValueError for a `~` that has no meaning.
        """
        if given:
            return _absolute("compile_cache", os.fspath(given))
        if self.cache:
            return self.cache
        home = home_cache()
        return home if home and not problem_with(home) else _temporary_cache()


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
        raise ValueError(f"CXX is {cxx!r}, which is not a command: {error}") from error
    return Environment(
        level, folders["NANOVLLM_DUMP_GRAPHS"], strict, folders["NANOVLLM_CACHE"], cxx, disable_svd,
        _switch("NANOVLLM_DISABLE_PEER_MEMORY"), _switch("NANOVLLM_EXACT_INPUTS"),
    )  # fmt: skip


def _switch(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{name} is {value!r}: use 0 or 1")
    return value == "1"


def home_cache() -> Path | None:
    """~/.cache/nanovllm; None for a user without a home folder."""
    home = os.path.expanduser("~")
    return Path(home, ".cache", "nanovllm") if os.path.isabs(home) else None


def _temporary_cache() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    return Path(tempfile.gettempdir(), f"nanovllm-{user}")


def problem_with(folder: Path) -> str | None:
    """Why a folder, which is created if missing, cannot hold compiled code; None if it can.

    It must be safe from other users, and writable or already filled. Access of others to the folder
    itself is not checked here: opening it as a store raises an error then.
    """
    try:
        private_files.make_folders(folder)
        private_files.refuse_shared_parents(folder)
    except (OSError, private_files.UnsafeParent) as error:
        return str(error)
    is_usable = os.access(folder, os.W_OK) or (folder / "entries").is_dir()
    return None if is_usable else f"{folder} cannot be written"


def _absolute(name: str, text: str) -> Path:
    """The path that the option or variable `name` gives."""
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ValueError(f"{name} is {text!r}, but that home folder is unknown: use a full path")
    return Path(path).absolute()


def api_key() -> str | None:
    """The API key that our clients send to servers: OPENAI_API_KEY, as OpenAI's client does."""
    return os.environ.get("OPENAI_API_KEY") or None


def server_api_keys() -> list[str]:
    """The valid keys of a server, from NANOVLLM_API_KEY, separated by commas. Removes the variable,
    so that no child process inherits it."""
    keys = os.environ.pop("NANOVLLM_API_KEY", "").split(",")
    return [key.strip() for key in keys if key.strip()]


def ray_address() -> str | None:
    """The Ray cluster to use: RAY_ADDRESS, or the address that `ray start` has written to a file of
    this machine. None: there is none, RAY_ADDRESS is "local", or another user may have written the
    file."""
    if given := os.environ.get("RAY_ADDRESS"):
        return None if given == "local" else given
    temporary = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # as Ray does
    return ray_note.address(Path(temporary, "ray", "ray_current_cluster"))


def may_dump_core() -> bool:
    """NANOVLLM_CORE_DUMPS: 1 does not change the limit of core dumps. Raises ValueError."""
    return _switch("NANOVLLM_CORE_DUMPS")


def settings() -> dict[str, str]:
    """The variables of this package that are set, for processes on other machines, without keys."""
    return {
        name: text
        for name, text in os.environ.items()
        if name.startswith("NANOVLLM_") and name not in API_KEYS
    }


_given: dict[str, str] = {}


def set_default(name: str, value: str, *, also_over: str | None = None) -> None:
    """Set a library's variable unless the user has set it.

    A value that an earlier call set, and `also_over`, count as not set.
    """
    if os.environ.get(name) in (None, also_over, _given.get(name)):
        os.environ[name] = _given[name] = value


def limit_spinning() -> None:
    """Let OpenMP threads sleep after half a millisecond without work, unless the user has chosen
    otherwise. By default they spin for 15 ms (GCC) or 200 ms (LLVM) and take the core from other
    threads and processes. OpenMP reads this when torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        set_default("GOMP_SPINCOUNT", "10000")
        set_default("KMP_BLOCKTIME", "1")


def keep_bytecode(folder: Path) -> None:
    """Keep the bytecode of Python processes that this one starts in a folder."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder)


def hides_bars() -> bool:
    """Whether tqdm's own variable, TQDM_DISABLE, turns off progress bars."""
    return os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false", "no", "off")


def is_quiet() -> bool:
    """Whether the log has warnings and errors only."""
    return read().log_level in ("WARNING", "ERROR")


def be_quiet() -> None:
    """No progress bars, and only warnings in the log, in this process and in those it starts."""
    os.environ["TQDM_DISABLE"] = "1"
    if os.environ.get("NANOVLLM_LOG_LEVEL", "").upper() != "ERROR":
        os.environ["NANOVLLM_LOG_LEVEL"] = "WARNING"


def state_folder() -> Path | None:
    """XDG_STATE_HOME/nanovllm, by default ~/.local/state/nanovllm; None for a user without a home
    folder. A relative XDG_STATE_HOME is ignored, as the XDG specification requires."""
    given = os.environ.get("XDG_STATE_HOME", "")
    home = os.path.expanduser("~")
    if os.path.isabs(given):
        return Path(given, "nanovllm")
    return Path(home, ".local", "state", "nanovllm") if os.path.isabs(home) else None


def replace(variables: Mapping[str, str]) -> None:
    """Set variables of libraries before this process first uses these libraries."""
    os.environ.update(variables)


# Variables that list folders. An empty element means the working directory.
_SEARCHED = (
    "PYTHONPATH", "PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LIBRARY_PATH", "CPATH",
    "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "COMPILER_PATH",
)  # fmt: skip


def without_relative(variables: Mapping[str, str]) -> dict[str, str]:
    """The same variables, without relative and empty elements in those that list folders.

    Code, libraries and headers are then not taken from the working directory, which may be another
    user's. A variable without other elements is left out, since an empty one means that directory.
    """
    found = dict(variables)
    for name in _SEARCHED:
        if name in found:
            kept = [one for one in found.pop(name).split(os.pathsep) if os.path.isabs(one)]
            if kept:
                found[name] = os.pathsep.join(kept)
    return found


def drop_relative() -> None:
    """`without_relative` for this process and what it starts."""
    kept = without_relative(os.environ)
    for name in _SEARCHED:
        if name in os.environ and os.environ[name] != kept.get(name):
            os.environ.pop(name)
            if name in kept:
                os.environ[name] = kept[name]


def keep_temporary_files(folder: Path) -> None:
    """Keep temporary files of this process, and of programs that it starts, in a folder that the
    parent removes. Compilers have no other folder then (`folder_of_compilers`)."""
    global _parent_removes_files
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    _parent_removes_files = True


_parent_removes_files = False  # since `keep_temporary_files`


_folders: dict[Path, tempfile.TemporaryDirectory[str]] = {}  # by parent
_uses: list[str] = []
_temporary: dict[str, str] = {}  # TMPDIR before the first of `_uses`
_changing = threading.Lock()


@contextmanager
def folder_of_compilers(parent: Path, prefix: str) -> Iterator[None]:
    """Inside the context, programs that this process starts keep their temporary files in a folder
    in `parent`: a killed compiler leaves files behind. If the folder cannot be made, or after
    `keep_temporary_files`, nothing changes. Several threads may use it at the same time.

    The folder is removed when this process ends, since programs that were started inside the
    context, such as Inductor's workers, use it afterwards too.
    """
    tempfile.gettempdir()  # fixes the folder of this process's own temporary files
    if _parent_removes_files:
        yield
        return
    try:
        path = _folder_in(parent, prefix)
    except OSError:
        yield
        return
    _change_uses(_uses.append, path)
    try:
        yield
    finally:
        _change_uses(_uses.remove, path)


def _folder_in(parent: Path, prefix: str) -> str:
    with _changing:
        if parent not in _folders or not os.path.isdir(_folders[parent].name):
            _folders[parent] = tempfile.TemporaryDirectory(
                dir=parent, prefix=prefix, ignore_cleanup_errors=True
            )
        return _folders[parent].name


def _change_uses(change: Callable[[str], None], path: str) -> None:
    with _changing:
        if not _uses:
            _temporary.clear()
            _temporary.update({"TMPDIR": os.environ["TMPDIR"]} if "TMPDIR" in os.environ else {})
        change(path)
        os.environ.pop("TMPDIR", None)
        os.environ.update({"TMPDIR": _uses[-1]} if _uses else _temporary)


# The only variables that processes with untrusted input get; others may be secret.
_HARMLESS = ("HOME", "LANG", "LC_ALL", "LC_CTYPE", "PATH", "TMPDIR", "TZ", "LD_LIBRARY_PATH")
_HARMLESS_KINDS = ("PYTHON", "NANOVLLM_", "OMP_", "HF_HUB_OFFLINE", "GOMP_", "KMP_")


def for_strangers() -> dict[str, str]:
    """`for_children` for a process that handles untrusted grammars, templates, images or videos:
    only the variables that it needs."""
    return {
        name: text
        for name, text in for_children().items()
        if name in _HARMLESS or name.startswith(_HARMLESS_KINDS)
    }


def for_children() -> dict[str, str]:
    """The environment for child processes, without API keys: they import this package from the
    same place, and nothing from the working directory (`programs.command`)."""
    found = without_relative(os.environ)
    root = str(Path(__file__).absolute().parents[1])
    return {
        **{name: text for name, text in found.items() if name not in API_KEYS},
        "PYTHONPATH": os.pathsep.join(filter(None, [root, found.get("PYTHONPATH")])),
        "PYTHONSAFEPATH": "1",  # for what children start, from Python 3.11 on
    }
