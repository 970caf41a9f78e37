"""Compiles every Triton kernel with its production constants, for GPUs that need not be present.

Triton brings the assemblers. `python builds.py TARGET` prints properties of each kernel as JSON. It
runs in a process of its own, because the interpreter, which the other tests use, replaces the
compiler.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

KB = 1024


class Target(NamedTuple):
    """A GPU, by Triton's names, and the models whose attention is compiled for it.

    A compile takes half a second, so most GPUs get few models. The largest heads need the most
    shared memory.
    """

    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int  # that one program may use
    models: tuple[str, ...]

    @property
    def has_matrix_units(self) -> bool:
        """True if Triton uses the matrix units. It does not use those of Turing."""
        return self.arch != 75

    @property
    def launches_dependent(self) -> bool:
        return self.backend == "cuda" and int(self.arch) >= 90


class Model(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str


MODELS = {
    "qwen3-0.6b": Model(16, 8, 128, 64, "bf16"),
    "qwen3-8b": Model(32, 8, 128, 64, "bf16"),
    "qwen2-0.5b": Model(14, 2, 64, 16, "fp16"),
    "head-80": Model(32, 32, 80, 64, "fp16"),
    "head-96 group-16": Model(32, 2, 96, 64, "bf16"),
    "head-256": Model(16, 8, 256, 64, "bf16"),
    "head-256-fp32": Model(16, 8, 256, 48, "fp32"),
}
THREE = ("qwen3-0.6b", "head-256", "head-256-fp32")
TARGETS = {
    "t4": Target("cuda", 75, 32, 64 * KB, THREE),
    "a100": Target("cuda", 80, 32, 163 * KB, ("head-256",)),
    "rtx3090": Target("cuda", 86, 32, 99 * KB, ("qwen3-0.6b", "head-256")),
    "rtx4090": Target("cuda", 89, 32, 99 * KB, ("qwen3-0.6b", "head-256")),
    "h200": Target("cuda", 90, 32, 227 * KB, tuple(MODELS)),
    "b200": Target("cuda", 100, 32, 227 * KB, ("qwen3-0.6b", "head-256")),
    "rtx5090": Target("cuda", 120, 32, 99 * KB, ("qwen3-0.6b", "head-256")),
    "mi300": Target("hip", "gfx942", 64, 64 * KB, THREE),
}
WHOLE = "h200"  # gets every case of the other kernels, too
WITH_RANKS = ("a100", WHOLE)  # get the kernels of sums over ranks
# Between two GPUs of this table, with the shared memory of one of them: attention alone.
BETWEEN = ("rtx3090", "rtx5090")
# Models with an fp8 cache, for GPUs that convert fp8 in hardware; all of them for WHOLE alone.
FP8_TARGETS = ("rtx4090", WHOLE)
FP8_MODELS = {
    "qwen3-0.6b": Model(16, 8, 128, 128, "bf16"),
    "blocks-of-64": Model(32, 8, 128, 64, "bf16"),
    "qwen2-0.5b": Model(14, 2, 64, 16, "fp16"),
    "head-256": Model(16, 8, 256, 128, "bf16"),
    "fp32": Model(16, 8, 128, 128, "fp32"),
}


def fp8_models(target: str) -> dict[str, Model]:
    return FP8_MODELS if target == WHOLE else dict(list(FP8_MODELS.items())[:1])


class Product(NamedTuple):
    num_outs: int
    depth: int
    norm: bool
    silu_mul: bool
    everywhere: bool = False


PRODUCTS = (
    Product(4096, 1024, True, False), Product(1024, 2048, False, False),
    Product(3072, 1024, True, True, True), Product(1024, 3072, False, False),
    Product(6144, 4096, True, False), Product(4096, 4096, False, False),
    Product(12288, 4096, True, True), Product(4096, 12288, False, False, True),
    Product(1152, 896, True, False),  # of no measured model
)  # fmt: skip

POINTERS = {
    "*fp32": {
        "cos_sin_ptr", "part_out_ptr", "part_lse_ptr", "part_ptr", "temperature_ptr", "best_ptr",
        "sampling_ptr", "out_temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr",
        "k_scale_ptr", "v_scale_ptr",
    },
    "*i32": {
        "table_ptr", "seq_len_ptr", "q_start_ptr", "arrived_ptr", "best_token_ptr",
        "segment_start_ptr",
        "out_table_ptr", "out_seq_len_ptr", "out_q_start_ptr", "few_token_ptr",
        "allowed_ptr",
    },
    "*i64": {
        "pos_ptr", "slot_ptr", "seed_ptr", "token_ptr", "row_idx_ptr", "new_token_ptr",
        "out_token_ptr", "out_pos_ptr", "out_slot_ptr", "out_seed_ptr", "rope_offset_ptr",
        "num_ptr", "num_tokens_ptr", "given_ptr", "out_row_ptr", "out_num_ptr", "out_last_ptr",
    },
}  # fmt: skip
FLOATS = {"eps", "scale_log2", "log_vocab_size"}


class Build(NamedTuple):
    name: str
    kernel: Any
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 3
    dtype: str = "bf16"
    out: str = ""  # type of out_ptr if it is not the dtype's
    has_fp8_cache: bool = False
    types: dict[str, str] | None = None  # of pointers that are not in POINTERS


def attention(
    name: str, model: Model, target: Target, has_fp8_cache: bool = False
) -> Iterator[Build]:
    """Decode and prefill, each with and without a window. With an fp8 cache prefill is once."""
    import triton

    from nanovllm.kernels.triton import attention_decode as decode
    from nanovllm.kernels.triton import attention_prefill as prefill

    num_heads, num_kv_heads, head_dim, block_size, dtype = model
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
    is_fp8 = has_fp8_cache and element_size == 2
    head_bytes = head_p * (1 if is_fp8 else element_size)
    for num_rows, window in ((256, 0), (1, 4096)):
        launch = decode.decode_tile(head_bytes, block_size, num_rows, target.shared_bytes, is_fp8)
        constants = decode.decode_constants(*heads, num_rows, window, launch) | strides
        yield Build(
            f"{name}: decode rows {num_rows} window {window}",
            decode.decode_kernel,
            constants,
            launch.num_warps,
            launch.num_stages,
            dtype,
            has_fp8_cache=has_fp8_cache,
        )
    for max_q_len, window in ((8192, 0), (16, 4096))[: 1 if has_fp8_cache else 2]:
        launch_p = prefill.prefill_tile(
            head_p, element_size, block_size, max_q_len, target.shared_bytes
        )
        queries = max(launch_p.queries, triton.next_power_of_2(num_heads // num_kv_heads))
        constants = prefill.prefill_constants(*heads, 16, window, queries, launch_p.tile) | strides
        yield Build(
            f"{name}: prefill {max_q_len} window {window}",
            prefill.prefill_kernel,
            constants,
            launch_p.num_warps,
            launch_p.num_stages,
            dtype,
            has_fp8_cache=has_fp8_cache,
        )


def stores(name: str, model: Model, has_fp8_cache: bool = False) -> Iterator[Build]:
    """The kernels that write into the cache."""
    import triton

    from nanovllm.kernels.triton import rope_store

    num_heads, num_kv_heads, head_dim, _, dtype = model
    heads, num_warps = rope_store.rope_store_tile(head_dim, num_heads + 2 * num_kv_heads, 256)
    shape = {"NUM_KV_HEADS": num_kv_heads, "HEAD": head_dim, "HEADS": heads}
    fused = shape | {
        "HALF_P": triton.next_power_of_2(head_dim // 2),
        "NUM_HEADS": num_heads,
        "HAS_Q_NORM": True,
        "HAS_K_NORM": True,
        "ONE_TOKEN": False,
    }
    store = shape | {"HEAD_P": triton.next_power_of_2(head_dim)}
    for kernel, constants in (
        (rope_store.qk_norm_rope_store_kernel, fused),
        (rope_store.store_kv_kernel, store),
    ):
        label = f"{name}: {kernel.__name__.removesuffix('_kernel')}"
        yield Build(label, kernel, constants, num_warps, dtype=dtype, has_fp8_cache=has_fp8_cache)


def pointwise(name: str, model: Model) -> Iterator[Build]:
    import triton

    from nanovllm.kernels.triton import norm_act, rope_store

    yield from stores(name, model)
    num_heads, num_kv_heads, head_dim, _, dtype = model
    heads, num_warps = rope_store.rope_store_tile(head_dim, num_heads + 2 * num_kv_heads, 256)
    rope = {
        "NUM_HEADS": num_heads,
        "HEAD": head_dim,
        "HALF_P": triton.next_power_of_2(head_dim // 2),
        "HEADS": heads,
    }
    dim = 4096
    rows, norm_warps = norm_act.norm_tile(dim)
    norm = {"DIM": dim, "DIM_P": dim, "ROWS": rows, "HAS_RESIDUAL": True}
    silu_mul = {"FFN": 12288, "PIECE": 1024}
    yield Build(f"{name}: rope", rope_store.rope_kernel, rope, num_warps, dtype=dtype)
    yield Build(f"{name}: add_rms_norm", norm_act.rms_norm_kernel, norm, norm_warps, dtype=dtype)
    yield Build(f"{name}: silu_mul", norm_act.silu_mul_kernel, silu_mul, 4, dtype=dtype)


def products(case: int, product: Product, target: Target) -> Iterator[Build]:
    """For one row, a few and many rows: the kernel that `triton.linear` selects."""
    from nanovllm.kernels.triton import linear_few as triton_linear_few
    from nanovllm.kernels.triton import linear_many as triton_linear_many

    num_outs, depth, norm, silu, _ = product
    for num_rows in (1, (2, 7, 16)[case % 3], (24, 64, 160)[case % 3]):
        weight = (2 * num_outs if silu else num_outs, depth)
        norm = norm and num_rows <= triton_linear_few.max_rows(*weight, True)
        label = f"linear {num_rows}x{num_outs}x{depth}"
        if num_rows > 1 and not target.has_matrix_units:
            continue
        if num_rows <= triton_linear_few.max_rows(*weight, norm):
            kernel, constants, num_warps = triton_linear_few.build(
                num_rows, num_outs, depth, norm, False, not silu, silu, False
            )
        elif num_rows <= triton_linear_many.max_rows(*weight):
            tile = triton_linear_many.gemm_tile(
                num_rows, num_outs, depth, silu, target.shared_bytes
            )
            kernel, num_warps = triton_linear_many.many_rows_linear_kernel, tile.num_warps
            constants = triton_linear_many.gemm_constants(
                num_rows, num_outs, depth, False, not silu, silu, tile
            )
            constants |= {"UPCAST": False}
        else:
            continue
        yield Build(label, kernel, constants, num_warps)


def gated_products(target: Target, whole: bool) -> Iterator[Build]:
    """gate_up of Qwen3-8B in every tile that fits the GPU, or in the first of them."""
    from nanovllm.kernels.triton import linear_gated as gated

    num_outs, depth = 12288, 4096
    tiles = [(rows, tile) for rows, tiles in gated.TILES.items() for tile in tiles]
    fitting = [pair for pair in tiles if gated.shared_bytes_of(pair[1]) <= target.shared_bytes]
    for num_rows, tile in fitting if whole else fitting[:1]:
        constants = gated.gated_constants(num_rows - 1, num_outs, depth, True, tile) | {
            "UPCAST": False
        }
        label = f"gated {num_rows}x{num_outs}x{depth} {tuple(tile)}"
        yield Build(label, gated.gated_linear_kernel, constants, tile.num_warps)


def steps() -> Iterator[Build]:
    """The sampler, and the kernels that compute the inputs of a decode step."""
    from nanovllm.kernels.triton import filter as triton_filter
    from nanovllm.kernels.triton import mask as triton_mask
    from nanovllm.kernels.triton import sample as triton_sample
    from nanovllm.kernels.triton import step as triton_step

    for label, is_part in (("best_of_span", False), ("best_of_span of a rank", True)):
        span = {"TILE": triton_sample.TILE, "IS_PART": is_part, "HARDWARE": True}
        yield Build(label, triton_sample.best_of_span_kernel, span, 4)
    yield Build("best_of_row", triton_sample.best_of_row_kernel, {"SPANS_P": 256}, 4, out="*i64")
    for dtype in ("fp32", "bf16"):
        tile = {"TILE": triton_filter.TILE}
        yield Build(
            f"keep_likely {dtype}",
            triton_filter.keep_likely_kernel,
            tile,
            triton_filter.NUM_WARPS,
            dtype=dtype,
        )
        mask = {"TILE": triton_mask.TILE}
        yield Build(
            f"keep_allowed {dtype}",
            triton_mask.keep_allowed_kernel,
            mask,
            triton_mask.NUM_WARPS,
            dtype=dtype,
        )
    inputs = {"BLOCKS": 640, "BLOCK_SIZE": 64, "PIECE": 1024}
    yield Build("decode_inputs", triton_step.decode_inputs_kernel, inputs, 4)
    span = inputs | {"ROWS": 256, "TOKENS": triton_step.SPAN_TOKENS}
    yield Build("span_inputs", triton_step.span_inputs_kernel, span, 4)
    for has_num in (False, True):
        rows = {"ROWS": triton_step.ROWS, "HAS_NUM": has_num}
        label = "K tokens" if has_num else "1 token"
        sampling = rows | {"FIELDS": 4}
        yield Build(f"sampling_inputs {label}", triton_step.sampling_inputs_kernel, sampling, 4)
        yield Build(f"advance {label}", triton_step.advance_kernel, rows, 4)


def mixtures(target: Target, whole: bool) -> Iterator[Build]:
    """The kernels of experts: of every model, or of one, and once in fp32."""
    from tests.kernels.expert_builds import launches

    cases = (("qwen3-30b-a3b", "bf16"), ("mixtral-8x7b", "bf16"), ("odd", "fp32"))
    for model, dtype in cases if whole else cases[:1]:
        for label, kernel, constants, num_warps, num_stages, types in launches(
            model, target.shared_bytes, dtype
        ):
            yield Build(
                f"experts {model} {dtype}: {label}", kernel, constants, num_warps, num_stages,
                dtype, types=types,
            )  # fmt: skip


def segments(target: Target, whole: bool) -> Iterator[Build]:
    """Attention of vision towers: of Qwen3-VL-2B, or of heads of other sizes and in fp32, too."""
    from nanovllm.kernels.triton import segment_attention as segment

    cases = ((16, 64, "bf16"), (16, 80, "bf16"), (16, 72, "bf16"), (8, 128, "bf16"))
    for num_heads, head_dim, dtype in (*cases, (8, 128, "fp32")) if whole else cases[:1]:
        for max_len in (4096, 64):
            tile = segment.segment_tile(
                head_dim, 4 if dtype == "fp32" else 2, max_len, target.shared_bytes
            )
            constants = segment.segment_constants(num_heads, head_dim, 17, tile)
            for name in "QKV":
                constants |= {
                    f"{name}_STRIDE_TOKEN": (3 if name == "V" else 1) * num_heads * head_dim
                }
                constants |= {f"{name}_STRIDE_HEAD": head_dim, "UPCAST": False}
            yield Build(
                f"segments of {max_len} head {head_dim} {dtype}", segment.segment_attention_kernel,
                constants, tile.num_warps, tile.num_stages, dtype,
            )  # fmt: skip


def is_of_segments(name: str) -> bool:
    return name.startswith("segments ")


def sums(whole: bool) -> Iterator[Build]:
    """The kernels of small sums over ranks."""
    from tests.kernels.reduce_builds import launches

    for dtype in ("bf16", "fp32") if whole else ("bf16",):
        for name, kernel, constants, num_warps, types in launches(dtype):
            yield Build(name, kernel, constants, num_warps, dtype=dtype, types=types)


def all_builds(name: str) -> Iterator[Build]:
    target, whole = TARGETS[name], name == WHOLE
    for model_name, model in MODELS.items():
        if model_name in target.models:
            yield from attention(model_name, model, target)
        if model_name == "qwen3-0.6b" or (whole and model_name in ("head-80", "head-256-fp32")):
            yield from pointwise(model_name, model)
    if name in BETWEEN:
        return
    if name in FP8_TARGETS:
        for model_name, model in fp8_models(name).items():
            yield from attention(f"fp8 {model_name}", model, target, has_fp8_cache=True)
        yield from stores("fp8 qwen3-0.6b", FP8_MODELS["qwen3-0.6b"], has_fp8_cache=True)
    for case, product in enumerate(PRODUCTS):
        if whole or product.everywhere:
            yield from products(case, product, target)
    if target.has_matrix_units:
        yield from gated_products(target, whole)
    yield from segments(target, whole)
    yield from mixtures(target, whole)
    if name in WITH_RANKS:
        yield from sums(whole)
    yield from steps()


def compile_build(build: Build, target: Target) -> Any:
    """The compiled kernel; pointers and strides are multiples of 16, as for the shapes above."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel, arguments = build.kernel, build.kernel.arg_names
    constants = {name: value for name, value in build.constants.items() if name in arguments}
    constants["PDL"] = target.launches_dependent
    dtype = (
        "fp16" if build.dtype == "bf16" and target.arch == 75 else build.dtype
    )  # Turing has no bf16
    signature = {}
    for name in arguments:
        special = next((kind for kind, names in POINTERS.items() if name in names), f"*{dtype}")
        if build.types is not None:
            special = build.types.get(name, f"*{dtype}").replace("bf16", dtype)
        signature[name] = (
            "constexpr" if name in constants
            else build.out if build.out and name == "out_ptr"
            else "*fp8e4nv" if build.has_fp8_cache and name in ("k_ptr", "v_ptr")
            else special if name.endswith("_ptr")
            else "fp32" if name in FLOATS
            else "i32"
        )  # fmt: skip
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, param) in enumerate(zip(arguments, kernel.params, strict=True))
        if not (param.do_not_specialize or param.do_not_specialize_on_alignment)
        and (name.endswith("_ptr") or "_stride" in name or name in ("vocab_size", "num_elements"))
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options: dict[str, Any] = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    if target.backend == "cuda":
        options["launch_pdl"] = target.launches_dependent
    return compile(
        source, target=GPUTarget(target.backend, target.arch, target.warp_size), options=options
    )


class AbsentDevice:
    """Answers what `target_info` asks during a compile, on a machine without the GPU."""

    def __init__(self, target: Target) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget(target.backend, target.arch, target.warp_size)

    def get_current_target(self) -> Any:
        return self._target


def instructions(cubin: bytes) -> Counter[str]:
    """How often each instruction occurs in the machine code."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Counter(
        re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+ )?([A-Z][\w.]*)", text, re.MULTILINE)
    )


def compile_all(name: str) -> dict[str, dict[str, Any]]:
    """Properties of each kernel: its shared memory in bytes, and the NVIDIA instructions it has.

    With an fp8 cache and for segments also the numbers of spills, of loads of single bytes, and of
    conversions of two fp8 values at once.
    """
    from triton.runtime import driver

    target = TARGETS[name]
    driver.set_active(AbsentDevice(target))  # type: ignore[arg-type]
    found = {}
    for build in all_builds(name):
        compiled = compile_build(build, target)
        text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
        marks = ("mma.", "wgmma.", "mfma", "ex2.approx.ftz", "cp.async", "bf16")
        one = {
            "shared": compiled.metadata.shared,
            "marks": [mark for mark in marks if mark in text],
        }
        if target.backend == "cuda" and (build.has_fp8_cache or is_of_segments(build.name)):
            code = instructions(compiled.asm["cubin"])
            one |= {
                "spills": sum(num for name, num in code.items() if name.startswith(("STL", "LDL"))),
                "byte loads": sum(num for name, num in code.items() if name.startswith("LDS.U8")),
                "conversions": code["F2FP.F16.E4M3.UNPACK_B"],
            }
        found[build.name] = one
    return found


if __name__ == "__main__":
    print(json.dumps(compile_all(sys.argv[1])))
