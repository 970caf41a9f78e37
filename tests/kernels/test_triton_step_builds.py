"""The step's Triton kernels compile for the GPUs we support; in a subprocess, since others ask for the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
WIDE = ("table_ptr", "out_table_ptr", "out_seq_len_ptr", "out_q_start_ptr")
FLOAT = ("sampling_ptr", "out_temperature_ptr")
CONSTANTS = {"BLOCKS": 640, "BLOCK_SIZE": 64, "PIECE": 1024, "FIELDS": 4, "ROWS": 128}


def compile_all() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from nanovllm.kernels import triton_step

    kernels: list[Any] = [
        triton_step.decode_inputs_kernel, triton_step.sampling_inputs_kernel, triton_step.advance_kernel,
    ]  # fmt: skip
    for capability in (80, 90):
        for kernel in kernels:
            constants = {**CONSTANTS, "PDL": capability >= 90}
            signature = {
                name: "constexpr" if name in constants else "*i32" if name in WIDE else "*fp32" if name in FLOAT
                else "*i64" if name.endswith("_ptr") else "i32" for name in kernel.arg_names
            }  # fmt: skip
            constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            options = {"num_warps": 4, "launch_pdl": capability >= 90}
            print(compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.name)


def test_kernels_compile() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    done = subprocess.run(
        [sys.executable, __file__], env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split().count("advance_kernel") == 2


if __name__ == "__main__":
    compile_all()
