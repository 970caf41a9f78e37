"""Every Triton kernel compiles for the GPUs we support, at its production constants, within their shared memory.

Needs no GPU: Triton brings its own assembler. The compiles run in one subprocess, because the interpreter that the
other tests ask for replaces the compiler for the whole process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
KB = 1024
# (compute capability, shared memory one program may have)
TARGETS = {"a100": (80, 163 * KB), "rtx4090": (89, 99 * KB), "h200": (90, 227 * KB)}
# name: (query heads, key-value heads, head size, block size, dtype)
MODELS = {
    "qwen3-0.6b": (16, 8, 128, 64, "bf16"),
    "qwen3-8b": (32, 8, 128, 64, "bf16"),
    "qwen2-0.5b": (14, 2, 64, 16, "fp16"),
    "head-80": (32, 32, 80, 64, "fp16"),
    "head-256": (16, 8, 256, 64, "bf16"),
    "head-256-fp32": (16, 8, 256, 48, "fp32"),
}


def _all_kernels(model: str, shared_bytes: int) -> dict[str, tuple[Any, dict[str, Any], int, int]]:
    """name: (kernel, constants, warps, stages) as the ops would launch them."""
    import triton

    from nanovllm.kernels import triton_attention_decode as decode
    from nanovllm.kernels import triton_attention_prefill as prefill
    from nanovllm.kernels import triton_norm_act as norm_act
    from nanovllm.kernels import triton_rope_store as rope_store

    num_heads, num_kv_heads, head_dim, block_size, dtype = MODELS[model]
    element_size = 4 if dtype == "fp32" else 2
    head_p = triton.next_power_of_2(head_dim)
    heads = (num_heads, num_kv_heads, head_dim, block_size)
    strides = {"Q_STRIDE_ROW": num_heads * head_dim, "Q_STRIDE_TOKEN": num_heads * head_dim, "Q_STRIDE_HEAD": head_dim}
    for cache in "KV":
        strides |= {f"{cache}_STRIDE_HEAD": head_dim, f"{cache}_STRIDE_SLOT": num_kv_heads * head_dim}
        strides |= {f"{cache}_STRIDE_BLOCK": block_size * num_kv_heads * head_dim, "UPCAST": False}
    kernels: dict[str, tuple[Any, dict[str, Any], int, int]] = {}
    for num_rows, window in ((256, 0), (1, 4096)):
        launch = decode.decode_tile(head_p * element_size, block_size, num_rows, shared_bytes)
        constants = decode.decode_constants(*heads, num_rows, window, launch) | strides
        name = f"decode rows {num_rows} window {window}"
        kernels[name] = (decode.decode_kernel, constants, launch.num_warps, launch.num_stages)
    for max_q_len, window in ((8192, 0), (16, 4096)):
        launch = prefill.prefill_tile(head_p, element_size, block_size, max_q_len, shared_bytes)
        queries, tile, num_warps, num_stages = launch
        constants = prefill.prefill_constants(*heads, 16, window, queries, tile) | strides
        kernels[f"prefill {max_q_len} window {window}"] = (prefill.prefill_kernel, constants, num_warps, num_stages)
    if model not in ("qwen3-0.6b", "head-80", "head-256-fp32"):
        return kernels
    program_heads, num_warps = rope_store.rope_store_tile(head_dim, num_heads + 2 * num_kv_heads, 256)
    rope = {"HEAD": head_dim, "HALF_P": triton.next_power_of_2(head_dim // 2), "HEADS": program_heads}
    fused = rope | {"NUM_HEADS": num_heads, "NUM_KV_HEADS": num_kv_heads, "HAS_Q_NORM": True, "HAS_K_NORM": True}
    store = {"NUM_KV_HEADS": num_kv_heads, "HEAD": head_dim, "HEAD_P": head_p, "HEADS": program_heads}
    kernels["qk_norm_rope_store"] = (rope_store.qk_norm_rope_store_kernel, fused, num_warps, 3)
    kernels["rope"] = (rope_store.rope_kernel, rope | {"NUM_HEADS": num_heads}, num_warps, 3)
    kernels["store_kv"] = (rope_store.store_kv_kernel, store, num_warps, 3)
    dim = 4096
    rows, num_warps = norm_act.norm_tile(dim)
    norm = {"DIM": dim, "DIM_P": dim, "ROWS": rows, "HAS_RESIDUAL": True}
    kernels["add_rms_norm"] = (norm_act.rms_norm_kernel, norm, num_warps, 3)
    kernels["silu_mul"] = (norm_act.silu_mul_kernel, {"FFN": 12288, "PIECE": 1024}, 4, 3)
    return kernels


FLOAT_POINTERS = ("cos_sin_ptr", "part_out_ptr", "part_lse_ptr")
INT_POINTERS = ("table_ptr", "seq_len_ptr", "q_start_ptr", "arrived_ptr")
LONG_POINTERS = ("pos_ptr", "slot_ptr")


def compile_kernel(
    kernel: Any, constants: dict[str, Any], num_warps: int, num_stages: int, capability: int, dtype: str
) -> Any:
    """The compiled kernel, its pointers and strides multiples of 16, as they are for the shapes above."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    constants["PDL"] = capability >= 90
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            special = {"*fp32": FLOAT_POINTERS, "*i32": INT_POINTERS, "*i64": LONG_POINTERS}
            signature[name] = next((kind for kind, names in special.items() if name in names), f"*{dtype}")
        else:
            signature[name] = "fp32" if name in ("eps", "scale_log2") else "i32"
        if name.endswith("_ptr") or ("_stride" in name and name != "table_stride"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "launch_pdl": capability >= 90}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_all(target: str) -> dict[str, int]:
    """Shared memory of each model's kernels on one target, in bytes."""
    capability, shared_bytes = TARGETS[target]
    shared = {}
    for model, (*_, dtype) in MODELS.items():
        if target != "h200" and not model.startswith(("qwen3-0.6b", "head-256")):
            continue  # the heads that need the most shared memory stand for the others: a compile takes half a second
        for name, (kernel, constants, num_warps, num_stages) in _all_kernels(model, shared_bytes).items():
            compiled = compile_kernel(kernel, constants, num_warps, num_stages, capability, dtype)
            shared[f"{model}: {name}"] = compiled.metadata.shared
    return shared


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_and_fit_shared_memory(target: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    done = subprocess.run(
        [sys.executable, __file__, target],
        check=False,
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    limit = TARGETS[target][1]
    too_large = {name: shared for name, shared in json.loads(done.stdout).items() if shared > limit}
    assert not too_large, f"more than {limit} bytes of shared memory: {too_large}"


if __name__ == "__main__":
    print(json.dumps(compile_all(sys.argv[1])))
