"""Builds a C++ file of ours into a library, once per source, flags, compiler and instruction set, and loads it.

No part of torch's compiler stack is imported: a start that finds its library costs a hash and a `dlopen`.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from nanovllm.kernels.code_files import digest, make_private, write_whole

logger = logging.getLogger(__name__)

# What Inductor compiles its own C++ with, in its order. No fast-math: NaN and −inf have a meaning here.
FLAGS = (  # noqa: SIM905 (a command line, to be read as one)
    "-O3 -DNDEBUG -fno-trapping-math -funsafe-math-optimizations -ffinite-math-only -fno-signed-zeros "
    "-fno-finite-math-only -fno-unsafe-math-optimizations -fmath-errno -fexcess-precision=fast -fno-tree-loop-vectorize "
    "-ffp-contract=fast -shared -fPIC -std=c++20"
).split()
COMPILERS = ("g++", "clang++", "c++")

# Instruction sets among the flags of /proc/cpuinfo: those that a compiler may use, not what the kernel works around.
_INSTRUCTIONS = (
    "sse",
    "ssse",
    "avx",
    "amx",
    "fma",
    "bmi",
    "f16c",
    "popcnt",
    "abm",
    "asimd",
    "sve",
    "sme",
    "bf16",
    "i8mm",
)


@dataclass(frozen=True)
class Settings:
    """Where libraries are kept (None: ~/.cache/nanovllm/cpp), the compiler asked for, and whether one may be run."""

    folder: Path | None = None
    compiler: str | None = None
    may_compile: bool = True


class _State:
    settings = Settings()
    compiled: ClassVar[list[str]] = []


def configure(folder: Path | None, compiler: str | None, may_compile: bool) -> None:
    """For libraries that are not loaded yet; a library is loaded once per process."""
    _State.settings = replace(
        _State.settings, folder=folder, compiler=compiler, may_compile=may_compile
    )


def compiled() -> list[str]:
    """Names of the libraries that this process has compiled."""
    return list(_State.compiled)


@functools.cache
def instruction_set() -> str:
    """The machine's instruction set as far as compilers use it: what `-march=native` stands for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = (
            next(line for line in lines if line.startswith(("flags", "Features")))
            .partition(":")[2]
            .split()
        )
    except (OSError, StopIteration):
        flags = [torch.backends.cpu.get_cpu_capability()]
    else:
        flags = sorted({flag for flag in flags if flag.startswith(_INSTRUCTIONS)})
    return f"{platform.machine()} {' '.join(flags)}"


def load(source: Path) -> ctypes.CDLL:
    """The library of a C++ file. Raises RuntimeError without a compiler, when it fails, or when it may not run."""
    settings = _State.settings
    folder = settings.folder or Path.home() / ".cache" / "nanovllm" / "cpp"
    text = source.read_bytes()
    flags = [*FLAGS, *_native(), *_openmp()]
    # not the compiler that happens to be found: a machine without one can use what another has compiled
    asked = Path(settings.compiler).name if settings.compiler else ""
    key = digest(repr((digest(text), flags, asked, instruction_set())).encode())[:32]
    try:
        make_private(folder)
    except OSError as error:
        logger.warning("compiled C++ is not kept: %s", error)
        folder = Path(tempfile.mkdtemp(prefix="nanovllm-cpp-"))
    library, recorded = folder / f"{source.stem}-{key}.so", folder / f"{source.stem}-{key}.sha256"
    if not _is_whole(library, recorded):
        if not settings.may_compile:
            raise RuntimeError(
                f"{source.name} has no compiled library in {folder}, and compiling is not allowed"
            )
        compiler = _compiler(settings.compiler)
        if compiler is None:
            names = settings.compiler or ", ".join(COMPILERS)
            raise RuntimeError(
                f"{source.name} cannot be compiled: no C++ compiler is found ({names})"
            )
        content = _compile(compiler, [*flags, str(source)], folder)
        # the digest comes last: a library without one is not trusted
        write_whole(library, content)
        write_whole(recorded, digest(content).encode())
        _State.compiled.append(source.stem)
    return ctypes.CDLL(str(library))


def _is_whole(library: Path, recorded: Path) -> bool:
    try:
        expected, content = recorded.read_text(), library.read_bytes()
    except (OSError, UnicodeDecodeError):
        return False
    if digest(content) != expected:
        logger.warning("%s is damaged and compiled again", library)
        return False
    return True


def _compile(compiler: str, arguments: list[str], folder: Path) -> bytes:
    with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as scratch:
        out = Path(scratch) / "library.so"
        done = subprocess.run(
            [compiler, *arguments, "-o", str(out)], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(
                f"{compiler} failed ({done.returncode}): {done.stderr.strip()[:2000]}"
            )
        return out.read_bytes()


def _compiler(asked: str | None) -> str | None:
    """The path of the compiler asked for, or of the first there is."""
    return next(
        (path for name in ((asked,) if asked else COMPILERS) if (path := shutil.which(name))), None
    )


def _native() -> list[str]:
    # clang on an ARM Mac knows -mcpu only
    return ["-mcpu=native"] if platform.machine() in ("arm64",) else ["-march=native"]


def _openmp() -> list[str]:
    return [] if platform.system() == "Darwin" else ["-fopenmp"]
