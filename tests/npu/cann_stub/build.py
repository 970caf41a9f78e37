"""Build libraries with CANN's names, so that torch_npu loads unmodified without an NPU.

    python build.py WHEEL OUT

WHEEL is the folder in which torch_npu is installed, OUT the folder for the libraries. The script
reads the needed functions from the wheel: the undefined symbols of its libraries, and the names
that it looks up at run time. `runtime.c` has the functions whose results matter; all others
return 0. Needs a C compiler and nm (binutils).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

RUNTIME = Path(__file__).with_name("runtime.c")
# the libraries that torch_npu links to; the first contains all symbols
LINKED = (
    "libascendcl", "libhccl", "libacl_op_compiler", "libge_runner", "libgraph",
    "libacl_tdt_channel", "libfmk_parser", "libascend_protobuf", "libnnopbase",
)  # fmt: skip
OPERATORS = "libopapi"  # loaded at run time: one function for each operator
SYSTEM = (
    "libc.so.6",
    "libm.so.6",
    "libstdc++.so.6",
    "libgcc_s.so.1",
    "libdl.so.2",
    "libpthread.so.0",
    "librt.so.1",
)
NOT_CANN = re.compile(r"_?Py|_ITM|__gmon|_ZTH|__cxa_finalize")
LOOKED_UP = re.compile(r"(?:acl(?!nn|grph)|Hccl)[A-Z]\w+|acl(?:rt|mdl|prof|tdt|op)[A-Z]\w*")


def symbols(libraries: Iterable[Path], kind: str) -> set[str]:
    """Names of dynamic symbols: kind "--undefined-only" or "--defined-only"."""
    found: set[str] = set()
    for library in libraries:
        listed = subprocess.run(
            ["nm", "-D", kind, str(library)], capture_output=True, text=True, check=True
        ).stdout
        found |= {line.split()[-1].split("@")[0] for line in listed.splitlines() if line.strip()}
    return found


def strings(library: Path) -> set[str]:
    """The printable words of a file, like strings(1); they include all names of functions."""
    return {
        word
        for text in re.findall(rb"[ -~]{6,}", library.read_bytes())
        for word in text.decode().split()
    }


def system_libraries() -> list[Path]:
    """The C and C++ libraries that this process has loaded or the loader would load."""
    mapped = {
        Path(line.split()[-1])
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "/" in line
    }
    folders = {
        path.parent for path in mapped if path.name.startswith(("libc.so", "libc-", "ld-linux"))
    }
    candidates = {folder / name for folder in folders for name in SYSTEM}
    return [
        path
        for path in candidates | {path for path in mapped if path.name.startswith("ld-linux")}
        if path.is_file()
    ]


def needed(wheel: Path) -> tuple[list[str], list[str]]:
    """(functions of the runtime, functions of the operator library) that torch_npu needs."""
    root = wheel / "torch_npu"
    own = [*root.glob("_C*.so"), *root.glob("lib/lib*.so"), *root.glob("dynamo/torchair/core/*.so")]
    own = [path for path in own if "atb" not in path.name]  # loaded on demand; not used here
    given = symbols(
        [*own, *Path(torch.__file__).parent.glob("lib/*.so*"), *system_libraries()],
        "--defined-only",
    )
    undefined = {
        name for name in symbols(own, "--undefined-only") - given if not NOT_CANN.match(name)
    }
    looked_up = strings(root / "lib" / "libtorch_npu.so")
    runtime = undefined | {name for name in looked_up - given if LOOKED_UP.fullmatch(name)}
    return sorted(runtime), sorted(
        name for name in looked_up if re.fullmatch(r"aclnn[A-Z][A-Za-z0-9]*", name)
    )


def build(source: str, out: Path, name: str) -> None:
    path = out / f"{name}.c"
    path.write_text(source)
    compiler = os.environ.get("CC", "cc")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-w", "-o", str(out / f"{name}.so"), str(path)],
        check=True,
    )


def main(wheel: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    runtime, operators = needed(wheel)
    by_hand = RUNTIME.read_text()
    defined = set(re.findall(r"^[\w *]*?\b(\w+)\([^;{]*\)\s*\{", by_hand, re.MULTILINE))
    # C++ symbols are not valid C names, so an asm label sets the symbol of each function
    generated = [
        f'long stub_{index}(void) asm("{name}"); long stub_{index}(void) {{ return 0; }}'
        for index, name in enumerate(name for name in runtime if name not in defined)
    ]
    first, *others = LINKED
    build("\n".join([by_hand, *generated, ""]), out, first)
    for name in others:
        link = out / f"{name}.so"
        link.unlink(missing_ok=True)
        link.symlink_to(f"{first}.so")
    build("".join(f"int {name}(void) {{ return 0; }}\n" for name in operators), out, OPERATORS)
    print(f"CANN stub: {len(generated)} functions generated, {len(operators)} operators")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
