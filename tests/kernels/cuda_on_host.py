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
_IGNORED = re.compile(
    r'asm volatile\("(griddepcontrol|fence|setmaxnreg|prefetch|cp\.async\.(commit|wait))'
    r'[^;]*;"( ::[^\n]*)?\);'
)


def host_source(function: nvrtc.Function) -> str:
    """The kernel's source with the functions of cuda_on_host.hpp in the places of its own."""
    head, *functions = HOST.read_text().split("\n// in place of ")
    last, _, end = functions[-1].partition("// the end\n")
    text = nvrtc.source_of(function)
    for one in (*functions[:-1], last):
        name, _, body = one.partition("\n")
        start = re.search(rf"^__device__ __forceinline__ \w+ {name}\(", text, re.MULTILINE)
        if start is None:  # of another kernel
            continue
        whole = re.compile(r"[^\n]*\}$|.*?^\}$", re.MULTILINE | re.DOTALL)
        found = whole.match(text, start.start())
        assert found is not None
        text = text[: start.start()] + body + text[found.end() :]
    declared = r"extern __shared__ (?:__align__\(16\) )?u8 (\w+)\[\];"
    text = re.sub(declared, r"u8* const \1 = dynamic_shared;", text)
    text = _IGNORED.sub("", text)  # the assembler refuses other instructions that are compiled
    constants = "".join(f"#define {name} {value}\n" for name, value in function.constants)
    return f"{constants}#define KERNEL {function.source}\n{head}{text}{end}"


def run(
    function: nvrtc.Function, arguments: bytes, num_programs: int, folder: Path, num_rows: int = 1
) -> None:
    """Run a kernel whose only argument is the struct `arguments`, with a map of its codes, if it
    has one, as `copy_box` there reads it; so many programs for each of `num_rows` rows of the grid.
    """
    source = folder / f"{abs(hash(function))}.cpp"
    source.write_text(host_source(function))
    # fibers jump between stacks, which glibc's checks take for a mistake
    options = ("-std=c++20", "-O1", "-shared", "-fPIC", "-w", "-U_FORTIFY_SOURCE")
    library = source.with_suffix(".so")
    assert COMPILER is not None
    subprocess.run([COMPILER, *options, str(source), "-o", str(library)], check=True)
    library_run = ctypes.CDLL(str(library)).run
    status = library_run(arguments, len(arguments), num_programs, num_rows)
    assert status != 1, "the struct has another size"
    assert status == 0, "a thread waits for ever"
