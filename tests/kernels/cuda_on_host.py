"""Compiles a kernel in CUDA C++ for this CPU, so that its arithmetic and its indices can be tested
without a GPU: see cuda_on_host.hpp. What only a GPU shows is not: launches, and their overlap."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

from nanovllm.kernels.cuda import nvrtc

HOST = Path(__file__).with_suffix(".hpp")
COMPILER = shutil.which("g++")
# instructions about launches and orders of memory
_IGNORED = re.compile(r'asm volatile\("(griddepcontrol|fence)[^;]*;"( ::: "memory")?\);')


def host_source(function: nvrtc.Function) -> str:
    """The kernel's source with the functions of cuda_on_host.hpp in the places of its own."""
    head, *functions = HOST.read_text().split("\n// in place of ")
    last, _, end = functions[-1].partition("// the end\n")
    text = nvrtc.source_of(function)
    for one in (*functions[:-1], last):
        name, _, body = one.partition("\n")
        start = re.search(rf"^__device__ __forceinline__ \w+ {name}\(", text, re.MULTILINE)
        if start is None:  # another kernel's
            continue
        whole = re.compile(r"[^\n]*\}$|.*?^\}$", re.MULTILINE | re.DOTALL)
        found = whole.match(text, start.start())
        assert found is not None
        text = text[: start.start()] + body + text[found.end() :]
    text = re.sub(r"extern __shared__ u8 (\w+)\[\];", r"u8* const \1 = dynamic_shared;", text)
    text = _IGNORED.sub("", text)
    assert "asm" not in text, re.findall(r".*asm.*", text)
    constants = "".join(f"#define {name} {value}\n" for name, value in function.constants)
    return f"{constants}#define KERNEL {function.source}\n{head}{text}{end}"


def run(function: nvrtc.Function, arguments: bytes, num_programs: int, folder: Path) -> None:
    """Run a kernel whose only argument is the struct `arguments`, with a map of its codes as
    `copy_box` there reads it."""
    source = folder / f"{abs(hash(function))}.cpp"
    source.write_text(host_source(function))
    options = ("-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-w")
    library = source.with_suffix(".so")
    assert COMPILER is not None
    subprocess.run([COMPILER, *options, str(source), "-o", str(library)], check=True)
    status = ctypes.CDLL(str(library)).run(arguments, len(arguments), num_programs)
    assert status == 0, "the struct has another size"
