"""Builds of the CPU kernels for fewer instructions than this machine has.

A library of another instruction set stays in the folder of libraries, as the others do.
"""

from __future__ import annotations

import ctypes
import platform
from types import ModuleType

from nanovllm.kernels.cpu import build
from nanovllm.kernels.cpu import library as cpu_library

# Options that keep a compiler from instruction sets, and with them the lanes of the kernels.
OPTIONS = {"native": ""}
if platform.machine() == "x86_64":
    OPTIONS |= {
        "no VNNI": "-mno-avx512vnni -mno-avxvnni",
        "no AVX-512": "-mno-avx512f -mno-avxvnni",
        "no AVX": "-mno-avx",
    }

_libraries: dict[tuple[str, str], ctypes.CDLL] = {}


def library(module: ModuleType, name: str) -> ctypes.CDLL:
    """The library of a module of `kernels/cpu`, built with the options of a name."""
    key = module.__name__, name
    if key not in _libraries:
        before = build._LibraryState.settings
        cpu_library.load()
        compiler = f"{before.compiler or 'g++'} {OPTIONS[name]}".strip()
        build.configure(before.folder, compiler, True)
        try:
            _libraries[key] = module._load.__wrapped__()
        finally:
            build._LibraryState.settings = before
    return _libraries[key]
