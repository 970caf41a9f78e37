"""The kernels that store and read an fp8 cache compile for the GPUs that convert it, as the ops would launch them: within
shared memory, and what runs in a decode step without spills, with conversions of two elements and no loads of single bytes.

Needs no GPU. The compiles run in one subprocess for each target, without the interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.builds import TARGETS, AbsentDevice

REPOSITORY = Path(__file__).parents[2]
NAMES = ("rtx4090", "h200")
# name: (query heads, key-value heads, head size, block size, dtype)
MODELS = {
    "qwen3-0.6b": (16, 8, 128, 128, "bf16"),
    "blocks of 64": (32, 8, 128, 64, "bf16"),
    "qwen2-0.5b": (14, 2, 64, 16, "fp16"),
    "head-256": (16, 8, 256, 128, "bf16"),
    "fp32": (16, 8, 128, 128, "fp32"),
}
POINTERS = {
    "*fp8e4nv": ("k_ptr", "v_ptr"),
    "*fp32": ("cos_sin_ptr", "part_out_ptr", "part_lse_ptr", "k_scale_ptr", "v_scale_ptr"),
    "*i32": ("table_ptr", "seq_len_ptr", "q_start_ptr", "arrived_ptr"),
    "*i64": ("pos_ptr", "slot_ptr"),
}


def _kernels(model: str, shared_bytes: int) -> dict[str, tuple[Any, dict[str, Any], int, int]]:
    """name: (kernel, constants, warps, stages)."""
    import triton

    from nanovllm.kernels.triton import attention_decode as decode
    from nanovllm.kernels.triton import attention_prefill as prefill
    from nanovllm.kernels.triton import rope_store

    num_heads, num_kv_heads, head_dim, block_size, dtype = MODELS[model]
    element_size = 4 if dtype == "fp32" else 2
    head_p = triton.next_power_of_2(head_dim)
    heads = (num_heads, num_kv_heads, head_dim, block_size)
    strides = {
        "Q_STRIDE_ROW": num_heads * head_dim,
        "Q_STRIDE_TOKEN": num_heads * head_dim,
        "Q_STRIDE_HEAD": head_dim,
    }
    for cache in "KV":
        strides |= {
            f"{cache}_STRIDE_HEAD": head_dim,
            f"{cache}_STRIDE_SLOT": num_kv_heads * head_dim,
        }
        strides |= {f"{cache}_STRIDE_BLOCK": block_size * num_kv_heads * head_dim, "UPCAST": False}
    kernels: dict[str, tuple[Any, dict[str, Any], int, int]] = {}
    for num_rows, window in ((256, 0), (1, 4096)):
        is_fp8 = element_size == 2
        head_bytes = head_p * (1 if is_fp8 else element_size)
        cut = decode.decode_tile(head_bytes, block_size, num_rows, shared_bytes, is_fp8)
        constants = decode.decode_constants(*heads, num_rows, window, cut) | strides
        kernels[f"decode {num_rows}"] = (
            decode.decode_kernel,
            constants,
            cut.num_warps,
            cut.num_stages,
        )
    queries, tile, num_warps, num_stages = prefill.prefill_tile(
        head_p, element_size, block_size, 8192, shared_bytes
    )
    constants = prefill.prefill_constants(*heads, 16, 0, queries, tile) | strides
    kernels["prefill"] = (prefill.prefill_kernel, constants, num_warps, num_stages)
    if model != "qwen3-0.6b":
        return kernels
    program_heads, num_warps = rope_store.rope_store_tile(
        head_dim, num_heads + 2 * num_kv_heads, 256
    )
    shape = {"NUM_KV_HEADS": num_kv_heads, "HEAD": head_dim, "HEADS": program_heads}
    fused = shape | {
        "HALF_P": head_p // 2,
        "NUM_HEADS": num_heads,
        "HAS_Q_NORM": True,
        "HAS_K_NORM": True,
    }
    fused["ONE_TOKEN"] = False
    kernels["qk_norm_rope_store"] = (rope_store.qk_norm_rope_store_kernel, fused, num_warps, 3)
    kernels["store_kv"] = (rope_store.store_kv_kernel, shape | {"HEAD_P": head_p}, num_warps, 3)
    return kernels


def _compiled(
    kernel: Any,
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int,
    capability: int,
    dtype: str,
) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    constants["PDL"] = capability >= 90
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = next(
                (kind for kind, names in POINTERS.items() if name in names), f"*{dtype}"
            )
        else:
            signature[name] = "fp32" if name in ("eps", "scale_log2") else "i32"
        if name.endswith("_ptr") or ("_stride" in name and name != "table_stride"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "launch_pdl": capability >= 90}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _machine_code(cubin: bytes) -> Counter[str]:
    """How often each instruction occurs."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Counter(
        re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+ )?([A-Z][\w.]*)", text, re.MULTILINE)
    )


def compile_all(target: str) -> dict[str, dict[str, int]]:
    """Of every kernel: bytes of shared memory, spills, loads of single bytes, conversions of two fp8 at once."""
    from triton.runtime import driver

    capability, shared_bytes = int(TARGETS[target].arch), TARGETS[target].shared_bytes
    driver.set_active(AbsentDevice(TARGETS[target]))  # type: ignore[arg-type]
    found = {}
    for model, (*_, dtype) in MODELS.items():
        for name, (kernel, constants, num_warps, num_stages) in _kernels(
            model, shared_bytes
        ).items():
            compiled = _compiled(kernel, constants, num_warps, num_stages, capability, dtype)
            code = _machine_code(compiled.asm["cubin"])
            found[f"{model}: {name}"] = {
                "shared": compiled.metadata.shared,
                "spills": sum(num for name, num in code.items() if name.startswith(("STL", "LDL"))),
                "byte loads": sum(num for name, num in code.items() if name.startswith("LDS.U8")),
                "conversions": code["F2FP.F16.E4M3.UNPACK_B"],
            }
    return found


@pytest.mark.parametrize("target", NAMES)
def test_kernels_for_an_fp8_cache_compile_into_cheap_conversions(target: str) -> None:
    unset = ("TRITON_INTERPRET", "TRITON_STORE_BINARY_ONLY")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment["PYTHONPATH"] = str(REPOSITORY)
    command = [sys.executable, __file__, target]
    done = subprocess.run(
        command,
        check=False,
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 3 * len(MODELS) + 2
    limit = TARGETS[target].shared_bytes
    for name, one in found.items():
        assert one["shared"] <= limit, (name, one)
        if "prefill" not in name and not name.startswith("fp32"):
            assert not one["spills"] and not one["byte loads"], (name, one)
        if "decode" in name and not name.startswith("fp32"):
            assert one["conversions"], (name, one)


if __name__ == "__main__":
    print(json.dumps(compile_all(sys.argv[1])))
