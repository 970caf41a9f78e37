"""The kernels of packed weights with production constants, for `builds.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

# name, kernel, constants, warps, stages, types of pointers
Launch = tuple[str, Any, dict[str, Any], int, int, dict[str, str]]


class Kind(NamedTuple):
    bits: int
    group_rows: int
    group: int
    has_offset: bool = False
    has_table: bool = False
    is_e2m1: bool = False

    @property
    def is_fp8(self) -> bool:
        return self.group_rows > 1


KINDS = {
    "int4": Kind(4, 1, 128, True),
    "fp8": Kind(8, 128, 128),
    "nf4": Kind(4, 1, 64, has_table=True),
    "mxfp4": Kind(4, 1, 32, is_e2m1=True),
}
TYPES = {
    "table_ptr": "*fp32", "part_ptr": "*fp32", "arrived_ptr": "*i32", "expert_ptr": "*i32",
    "local_ptr": "*i32", "factor_ptr": "*fp32", "pair_ptr": "*i32", "start_ptr": "*i32",
}  # fmt: skip


def weight(kind: Kind, num_lines: int, depth: int, num_experts: int = 0) -> Any:
    """Codes without data."""
    from nanovllm.kernels.triton.packed_codes import Codes

    outer = (num_experts,) if num_experts else ()
    num_scales = (*outer, -(-num_lines // kind.group_rows), -(-depth // kind.group))
    code = torch.empty(*outer, num_lines, depth * kind.bits // 8, dtype=torch.uint8, device="meta")
    scale = torch.empty(num_scales, device="meta")
    offset = scale if kind.has_offset else None
    table = torch.empty(16, device="meta", dtype=torch.float16 if kind.is_e2m1 else None)
    table = table if kind.has_table or kind.is_e2m1 else None
    return Codes(code, scale, offset, table, kind.bits, kind.group_rows, kind.group, kind.is_fp8)


def types_of(kind: Kind, words: bool) -> dict[str, str]:
    scale = "*fp32" if kind.is_fp8 else "*bf16"
    own = {"code_ptr": "*i32", "x_ptr": "*i64", "norm_ptr": "*i64"} if words else {
        "code_ptr": "*u8"
    }  # fmt: skip
    return TYPES | own | {"scale_ptr": scale, "offset_ptr": scale}


def launches(shared_bytes: int, has_matrix_units: bool, whole: bool) -> Iterator[Launch]:
    """Of sizes of Qwen3-8B: one row, and some; for `whole` also many rows, a table, and experts."""
    size = (4096, 4096)
    yield rows_of_a_table()
    int4, fp8 = ("int4", KINDS["int4"], *size), ("fp8", KINDS["fp8"], *size)
    yield one_row(*int4, silu=True)
    if has_matrix_units:
        yield some_rows(*int4, 7, False, shared_bytes)
        yield some_rows(*fp8, 24, True, shared_bytes)
        yield some_rows(*int4, 64, False, shared_bytes)
    if whole:
        yield one_row(*fp8, silu=False)
        yield some_rows("nf4", KINDS["nf4"], *size, 16, False, shared_bytes)
        yield dequantized(*fp8)
        yield experts("fp8", KINDS["fp8"], shared_bytes)
        for pairs_each in (2.0, 32.0):
            yield clamped_experts("mxfp4", KINDS["mxfp4"], shared_bytes, pairs_each)
        yield clamped_pair("mxfp4", KINDS["mxfp4"])


def one_row(name: str, kind: Kind, num_outs: int, depth: int, silu: bool) -> Launch:
    from nanovllm.kernels.triton import packed_gemv, packed_tiles

    codes = weight(kind, 2 * num_outs if silu else num_outs, depth)
    tile = packed_tiles.gemv_tile(1, codes, depth, silu, 1, 132)
    constants = packed_gemv.gemv_constants(num_outs, depth, codes, silu, tile) | {
        "X_SHARED_BY": 1, "HAS_NORM": silu, "HAS_BIAS": False, "HAS_RESIDUAL": not silu,
        "HAS_EXPERTS": False, "EXPERT_PARALLEL": False, "HAS_FACTOR": False,
        "ALPHA": 0.0, "LIMIT": 0.0,
    }  # fmt: skip
    kernel, types = packed_gemv.packed_gemv_kernel, types_of(kind, True)
    return f"packed {name} 1x{num_outs}x{depth}", kernel, constants, tile.num_warps, 3, types


def some_rows(
    name: str, kind: Kind, num_outs: int, depth: int, num_rows: int, silu: bool, shared_bytes: int,
    tile: Any = None,
) -> Launch:  # fmt: skip
    from nanovllm.kernels.triton import packed_gemm, packed_tiles

    codes = weight(kind, 2 * num_outs if silu else num_outs, depth)
    tile = tile or packed_tiles.gemm_tile(num_rows, codes, depth, shared_bytes)
    constants = packed_gemm.gemm_constants(num_rows, num_outs, depth, codes, silu, tile)
    constants |= {"HAS_BIAS": silu, "HAS_RESIDUAL": not silu, "UPCAST": False}
    label = f"packed {name} {num_rows}x{num_outs}x{depth}"
    kernel, types = packed_gemm.packed_gemm_kernel, types_of(kind, False)
    return label, kernel, constants, tile.num_warps, tile.num_stages, types


def rows_of_a_table() -> Launch:
    """Of SmolLM2-135M, in Q8_0."""
    from nanovllm.kernels.triton import packed_lookup

    constants = {
        "NUM_BYTES": 576, "NUM_GROUPS": 18, "DEPTH": 576, "BITS": 8, "GROUP": 32, "HALF_BLOCK": 16,
        "HAS_OFFSET": True, "HAS_TABLE": False, "COLUMNS": 1024,
    }  # fmt: skip
    types = types_of(KINDS["int4"], False) | {"row_ptr": "*i64"}
    return "rows of a packed table", packed_lookup.packed_lookup_kernel, constants, 4, 3, types


def dequantized(name: str, kind: Kind, num_outs: int, depth: int) -> Launch:
    from nanovllm.kernels.triton import packed_dequantize, packed_tiles

    codes = weight(kind, num_outs, depth)
    columns = packed_tiles.chunk_columns(codes, depth)
    constants = codes.constants() | {
        "NUM_OUTS": num_outs, "DEPTH": depth, "LINES": 64, "COLUMNS": columns,
        "EACH": max(1, 512 // columns), "UPCAST": False,
    }  # fmt: skip
    kernel, types = packed_dequantize.dequantize_kernel, types_of(kind, False)
    return f"packed {name} dequantize", kernel, constants, 4, 3, types


def experts(name: str, kind: Kind, shared_bytes: int) -> Launch:
    """gate and up of Qwen3-30B-A3B for groups of one pair."""
    from nanovllm.kernels.triton import grouped_gemm, packed_grouped, packed_tiles

    codes = weight(kind, 1536, 2048, 128)
    tile = packed_tiles.grouped_tile(1.0, codes, 2048, shared_bytes)
    constants = packed_grouped.grouped_constants(768, 2048, codes, True, tile, 8) | {
        "X_BY": grouped_gemm.BY_TOKEN.value, "OUT_BY": grouped_gemm.BY_PLACE.value,
        "HAS_FACTOR": False, "UPCAST": False, "HAS_BIAS": False, "ALPHA": 0.0, "LIMIT": 0.0,
        "bias_ptr": None,
    }  # fmt: skip
    kernel, types = packed_grouped.packed_grouped_kernel, types_of(kind, False)
    return f"packed {name} group", kernel, constants, tile.num_warps, tile.num_stages, types


SIZE, NUM_EXPERTS, TOP_K = 2880, 32, 4  # of gpt-oss-20b
CLAMP: dict[str, Any] = {"HAS_BIAS": True, "ALPHA": 1.702, "LIMIT": 7.0}


def clamped_experts(name: str, kind: Kind, shared_bytes: int, pairs_each: float) -> Launch:
    """gate and up of gpt-oss-20b for groups of so many pairs."""
    from nanovllm.kernels.triton import grouped_gemm, packed_grouped, packed_tiles

    codes = weight(kind, 2 * SIZE, SIZE, NUM_EXPERTS)
    tile = packed_tiles.grouped_tile(pairs_each, codes, SIZE, shared_bytes)
    constants = packed_grouped.grouped_constants(SIZE, SIZE, codes, True, tile, TOP_K) | {
        "X_BY": grouped_gemm.BY_TOKEN.value, "OUT_BY": grouped_gemm.BY_PLACE.value,
        "HAS_FACTOR": False, "UPCAST": False, **CLAMP,
    }  # fmt: skip
    kernel, types = packed_grouped.packed_grouped_kernel, types_of(kind, False)
    label = f"packed {name} group of {pairs_each:g} clamped"
    return label, kernel, constants, tile.num_warps, tile.num_stages, types


def clamped_pair(name: str, kind: Kind) -> Launch:
    """down of gpt-oss-20b for one token."""
    from nanovllm.kernels.triton import packed_gemv, packed_tiles

    codes = weight(kind, SIZE, SIZE, NUM_EXPERTS)
    tile = packed_tiles.gemv_tile(1, codes, SIZE, False, TOP_K, 132)
    constants = packed_gemv.gemv_constants(SIZE, SIZE, codes, False, tile, TOP_K) | {
        "X_SHARED_BY": 1, "HAS_NORM": False, "HAS_RESIDUAL": True, "HAS_EXPERTS": True,
        "EXPERT_PARALLEL": False, "HAS_FACTOR": True, **CLAMP,
    }  # fmt: skip
    kernel, types = packed_gemv.packed_gemv_kernel, types_of(kind, True)
    return f"packed {name} 1x pair clamped", kernel, constants, tile.num_warps, 3, types
