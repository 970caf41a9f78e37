"""Compiles every Triton kernel of `builds.py`, for GPUs that need not be present.

Triton brings the assemblers. `python compile_builds.py TARGET …` prints a line of JSON for each
target: its name, and properties of each kernel. It is a process of its own, because the
interpreter, which the other tests use, replaces the compiler. Triton is imported once and asks for
one GPU in a process: each target has a fork.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import traceback
from typing import Any

from tests.kernels.builds import (
    FLOATS,
    POINTERS,
    TARGETS,
    WHOLE,
    Build,
    Target,
    all_builds,
    converts_fast,
    is_of_hopper,
    is_of_latents,
    is_of_segments,
    is_ordered,
    is_packed,
)

MARKS = (  # instructions, by parts of their names
    "mma.", "mma.sync", "wgmma.", "mfma", "tcgen05", "ex2.approx.ftz", "cp.async", "bf16"
)  # fmt: skip


def compile_build(build: Build, target: Target) -> Any:
    """The compiled kernel; pointers and strides are multiples of 16, as for the shapes above."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel, arguments = build.kernel, build.kernel.arg_names
    constants = {name: value for name, value in build.constants.items() if name in arguments}
    constants["PDL"] = target.launches_dependent
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, param) in enumerate(zip(arguments, kernel.params, strict=True))
        # an attribute of a constant would become that of the next argument
        if name not in constants
        and not (param.do_not_specialize or param.do_not_specialize_on_alignment)
        and (name.endswith("_ptr") or "_stride" in name or name in ("vocab_size", "num_elements"))
    }
    source_class = GluonASTSource if kernel.is_gluon() else ASTSource
    signature = signature_of(build, constants, target)
    source = source_class(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options: dict[str, Any] = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    if target.backend == "cuda":
        options["launch_pdl"] = target.launches_dependent
    return compile(
        source, target=GPUTarget(target.backend, target.arch, target.warp_size), options=options
    )


def signature_of(build: Build, constants: dict[str, Any], target: Target) -> dict[str, str]:
    """The types of a kernel's arguments."""
    is_turing = build.dtype == "bf16" and target.arch == 75  # has no bf16
    dtype = "fp16" if is_turing else build.dtype
    signature = {}
    for name in build.kernel.arg_names:
        special = next((kind for kind, names in POINTERS.items() if name in names), f"*{dtype}")
        if build.types is not None:
            special = build.types.get(name, f"*{dtype}").replace("bf16", dtype)
        signature[name] = (
            "constexpr" if name in constants
            else build.out if build.out and name == "out_ptr"
            else "*fp8e4nv" if build.has_fp8_cache and name in ("k_ptr", "v_ptr")
            else descriptor_type(dtype, constants["ROWS"]) if name.endswith("_desc")
            else special if name.endswith("_ptr")
            else "fp32" if name in FLOATS
            else "i32"
        )  # fmt: skip
    return signature


def descriptor_type(dtype: str, rows: int) -> str:
    """The type of a descriptor of pieces of `rows` rows and 64 columns."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return f"tensordesc<{dtype}[{rows}, 64],{layout!r}>"


class AbsentDevice:
    """Answers what `target_info` asks during a compile, on a machine without the GPU."""

    def __init__(self, target: Target) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget(target.backend, target.arch, target.warp_size)

    def get_current_target(self) -> Any:
        return self._target


def cuobjdump(cubin: bytes, option: str) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def matrix_waits(cubin: bytes) -> int:
    """Waits for asynchronous products of matrices: many, if the assembler serialised them."""
    return cuobjdump(cubin, "-sass").count("WARPGROUP.DEPBAR")


def stack_bytes(cubin: bytes) -> int:
    """The local memory of a thread, where values are that do not fit the registers."""
    text = cuobjdump(cubin, "-res-usage")
    (usage,) = re.findall(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    return sum(map(int, usage))


def compile_all(name: str) -> dict[str, dict[str, Any]]:
    """Properties of each kernel: its shared memory in bytes, and the NVIDIA instructions it has.

    Where they matter, also the bytes of its stack, and the numbers of loads of single bytes from
    shared memory, and of conversions of two fp8 values at once.
    """
    from triton import knobs
    from triton.runtime import driver

    target = TARGETS[name]
    driver.set_active(AbsentDevice(target))  # type: ignore[arg-type]
    found = {}
    for build in all_builds(name):
        is_examined = target.backend == "cuda" and (
            converts_fast(build)
            or any(
                has(build.name)
                for has in (is_of_segments, is_of_hopper, is_packed, is_of_latents, is_ordered)
            )
        )
        # Line numbers take an eighth of the time of a compile. They may change the code a little,
        # so kernels that are examined have them, as on a GPU.
        knobs.compilation.disable_line_info = not is_examined
        compiled = compile_build(build, target)
        text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
        one = {
            "shared": compiled.metadata.shared,
            "marks": [mark for mark in MARKS if mark in text],
        }
        if is_examined:
            one |= {
                "stack bytes": stack_bytes(compiled.asm["cubin"]),
                "byte loads": len(re.findall(r"\bld\.shared\S*\.[bsu]8\b", text)),
                "conversions": text.count("cvt.rn.f16x2.e4m3x2"),
                "waits": matrix_waits(compiled.asm["cubin"]) if is_of_hopper(build.name) else 0,
            }
        found[build.name] = one
    return found


def compile_or_say_why_not(name: str) -> tuple[str, dict[str, dict[str, Any]] | str]:
    try:
        return name, compile_all(name)
    except Exception:
        return name, traceback.format_exc()


def main(names: list[str]) -> None:
    from triton.runtime.cache import triton_key

    for name in names:
        for build in all_builds(name):
            assert build.kernel  # all are imported before the forks
    triton_key()  # reads the whole compiler, once before the forks
    # The collector would go through all of torch again and again, a twelfth of the time.
    gc.freeze()
    gc.disable()
    # The GPU with the most cases comes first, so that the others fill the other process meanwhile.
    names = sorted(names, key=lambda name: name != WHOLE)
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        for done in pool.imap_unordered(compile_or_say_why_not, names, chunksize=1):
            print(json.dumps(done), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
