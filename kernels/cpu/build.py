"""Compiles a C++ file of ours into a shared library and loads it with ctypes.

A library is compiled once for each source, flags, compiler and instruction set, and kept on disk.
No part of torch's compiler stack is imported: a start that finds its library pays for one hash and
one `dlopen`.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from nanovllm.kernels.code_files import BUILDING, digest, read_whole, temporary_folder, write_whole
from nanovllm.kernels.private_files import PRIVATE, UnsafeParent, make_private

logger = logging.getLogger(__name__)

# The flags of Inductor's own C++, in its order. No fast-math: NaN and −inf have a meaning here.
FLAGS = (  # noqa: SIM905 (a command line reads best as one)
    "-O3 -DNDEBUG -fno-trapping-math -funsafe-math-optimizations -ffinite-math-only "
    "-fno-signed-zeros -fno-finite-math-only -fno-unsafe-math-optimizations -fmath-errno "
    "-fexcess-precision=fast -fno-tree-loop-vectorize -ffp-contract=fast -shared -fPIC -std=c++20"
).split()
COMPILERS = ("g++", "clang++", "c++")
NO_SPACE = "No space left on device"

# The flags of /proc/cpuinfo that name instruction sets; the others describe bugs and features that
# compilers do not use.
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


# Letter of a field's kind in the module struct → C++ condition that a type is of this kind.
_KINDS = {
    "P": "std::is_pointer_v<{}>",
    "q": "std::is_same_v<{}, int64_t>",
    "d": "std::is_same_v<{}, double>",
}


class ArgumentStruct:
    """A C struct that holds the arguments of a kernel: pointers, then integers, then floats.

    The fields are names separated by spaces, in the struct's order. `pack` takes their values in
    this order and returns the bytes of the struct: ctypes passes these faster than thirty single
    arguments. `load` has the compiler check that the C++ struct has the same fields.
    """

    def __init__(self, name: str, *, pointers: str, integers: str, floats: str = "") -> None:
        fields = {"P": pointers.split(), "q": integers.split(), "d": floats.split()}
        self.name = name
        self.fields = [(kind, field) for kind, names in fields.items() for field in names]
        self.layout = "@" + "".join(kind for kind, _ in self.fields)
        self.pack = struct.Struct(self.layout).pack

    def checks(self) -> str:
        """C++ assertions that the struct has these fields, with their kinds, offsets and size."""
        size = struct.calcsize(self.layout)
        lines = [f'static_assert(sizeof({self.name}) == {size}, "Python packs {size} bytes");']
        for i, (kind, field) in enumerate(self.fields):
            offset = struct.calcsize(f"{self.layout[: i + 1]}0{kind}")  # "0" aligns, adds no field
            is_kind = _KINDS[kind].format(f"decltype({self.name}::{field})")
            lines.append(
                f"static_assert({is_kind} && offsetof({self.name}, {field}) == {offset}, "
                f'"Python packs {self.name}::{field} as {kind} at byte {offset}");'
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class LibraryOptions:
    """Where libraries are kept, which compiler is used, and whether one may run.

    `folder` None is ~/.cache/nanovllm/cpp. `compiler` is a program, perhaps with options, as the
    variable CXX has it; None is the first of COMPILERS.
    """

    folder: Path | None = None
    compiler: str | None = None
    may_compile: bool = True


class _LibraryState:
    settings = LibraryOptions()
    compiled: ClassVar[list[str]] = []
    loaded: ClassVar[list[ctypes.CDLL]] = []


def configure(folder: Path | None, compiler: str | None, may_compile: bool) -> None:
    """Settings for libraries that are not loaded yet; a process loads a library once."""
    _LibraryState.settings = replace(
        _LibraryState.settings, folder=folder, compiler=compiler, may_compile=may_compile
    )


def compiled() -> list[str]:
    """Names of the libraries that this process has compiled."""
    return list(_LibraryState.compiled)


def loaded() -> list[ctypes.CDLL]:
    """The libraries that this process has loaded."""
    return list(_LibraryState.loaded)


@functools.cache
def instruction_set() -> str:
    """The machine's instruction sets that compilers use: the meaning of `-march=native`."""
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


def load(source: Path, structs: Sequence[ArgumentStruct] = ()) -> ctypes.CDLL:
    """The library of a C++ file, whose argument structs must be those of `structs`.

    Raises RuntimeError if there is no compiler, if the compiler fails (also because a struct has
    other fields than Python packs), or if no library is found and compiling is not allowed.
    """
    settings = _LibraryState.settings
    folder = settings.folder or Path.home() / ".cache" / "nanovllm" / "cpp"
    text = "\n".join(
        [
            _with_headers(source),
            "#include <cstddef>\n#include <type_traits>",
            *(arguments.checks() for arguments in structs),
        ]
    ).encode()
    flags = [*FLAGS, *_native(), "-pthread"]
    # The compiler that was asked for, not the one that is found: a machine without a compiler can
    # then use a library that another machine has compiled.
    program, *options = _words(settings.compiler) if settings.compiler else [""]
    asked = " ".join([Path(program).name, *options])
    key = digest(repr((digest(text), flags, asked, instruction_set())).encode())[:32]
    try:
        make_private(folder)
    except (OSError, UnsafeParent) as error:
        if isinstance(error, UnsafeParent) and settings.folder is not None:
            raise
        logger.warning("compiled C++ is kept for this process only: %s", error)
        folder = temporary_folder()
    library, recorded = folder / f"{source.stem}-{key}.so", folder / f"{source.stem}-{key}.sha256"
    if read_whole(library, recorded) is None:
        if not settings.may_compile:
            raise RuntimeError(
                f"{source.name} has no usable library in {folder}, and compiling is not allowed"
            )
        content = _compile(_command(settings.compiler, source.name), flags, text, folder)
        # The digest is written last: a library without one is not used.
        write_whole(library, content)
        write_whole(recorded, digest(content).encode())
        _LibraryState.compiled.append(source.stem)
    found = ctypes.CDLL(str(library))  # no other user can change the private folder meanwhile
    _LibraryState.loaded.append(found)
    return found


def _with_headers(source: Path) -> str:
    """The text of a C++ file, with our headers in place of the lines that include them.

    The compiler reads this text from its standard input. The library's key covers all of it.
    """
    lines = [f'#line 1 "{source.name}"']
    for number, line in enumerate(source.read_text().splitlines(), 1):
        included = re.fullmatch(r'#include "([^"]+)"', line)
        if included is None:
            lines.append(line)
            continue
        header = source.with_name(included[1])
        lines += [f'#line 1 "{header.name}"', header.read_text()]
        lines.append(f'#line {number + 1} "{source.name}"')
    return "\n".join(lines)


def _compile(compiler: list[str], flags: list[str], text: bytes, folder: Path) -> bytes:
    with tempfile.TemporaryDirectory(dir=folder, prefix=BUILDING) as scratch:
        out = Path(scratch) / "library.so"
        # a compiler that is killed leaves its temporary files
        command = ["env", f"TMPDIR={scratch}", *compiler]
        command += [*flags, "-x", "c++", "-", "-o", str(out)]
        done = subprocess.run(command, input=text, capture_output=True)
        if done.returncode:
            errors = done.stderr.decode(errors="replace").strip()
            raise RuntimeError(
                f"{shlex.join(compiler)} failed ({done.returncode}): {_cause(errors)}\n"
                f"{errors[:2000]}"
            )
        return out.read_bytes()


def _cause(errors: str) -> str:
    """The line of a compiler's messages that names the cause of its failure."""
    lines = errors.splitlines() or ["it printed no message"]
    for sign in (NO_SPACE, "error:"):
        for line in lines:
            if sign in line:
                return line.strip()
    return lines[0]


def _command(asked: str | None, source: str) -> list[str]:
    """The path and the options of the compiler asked for, or of the first that is installed.

    Raises RuntimeError if there is none.
    """
    for program, *options in [_words(asked)] if asked else [[name] for name in COMPILERS]:
        if path := installed(program):
            return [path, *options]
    names = asked or ", ".join(COMPILERS)
    raise RuntimeError(f"{source} cannot be compiled: no C++ compiler is found ({names})")


def script_of_compiler() -> Path | None:
    """A program that runs the compiler asked for with its options; None if it has no options.

    Inductor takes the name of a program only. Raises OSError.
    """
    settings = _LibraryState.settings
    words = _words(settings.compiler) if settings.compiler else []
    if len(words) < 2 or settings.folder is None:
        return None
    content = f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n'.encode()
    script = settings.folder / f"cxx-{digest(content)[:16]}"
    write_whole(script, content, mode=PRIVATE)
    return script


def installed(program: str) -> str | None:
    """The full path of a program that is named, or of the first in PATH; None if there is none.

    Relative and empty elements of PATH count for nothing: they would be folders below the working
    directory, which may be another user's.
    """
    if os.path.dirname(program):
        return shutil.which(os.path.abspath(program))
    return shutil.which(program, path=os.pathsep.join(filter(os.path.isabs, os.get_exec_path())))


def _words(asked: str) -> list[str]:
    """A compiler's program and options; the path of a program may contain spaces."""
    return [asked] if installed(asked) else shlex.split(asked)


def _native() -> list[str]:
    # clang on an ARM Mac accepts -mcpu only
    return ["-mcpu=native"] if platform.machine() in ("arm64",) else ["-march=native"]
