"""The kernels of small sums and choices over ranks, with the constants that launches choose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# name, kernel, constants, warps, types of pointers
Launch = tuple[str, Any, dict[str, Any], int, dict[str, str]]

TYPES = {"peers_ptr": "*i64"}
# rows, hidden size, number of ranks
CASES = (
    (1, 4096, 2),
    (8, 5120, 2),
    (64, 5120, 2),
    (128, 5120, 2),
    (1, 2880, 4),
    (64, 5120, 4),
    (200, 5120, 8),
)


def launches(dtype: str) -> Iterator[Launch]:
    import triton

    from nanovllm.kernels.triton import all_reduce, sample_columns

    element_size = 4 if dtype == "fp32" else 2
    for num_rows, dim, num_ranks in CASES:
        case = f"{num_rows}x{dim}, {num_ranks} ranks, {dtype}"
        shared: dict[str, Any] = {"NUM_RANKS": num_ranks}
        tile = all_reduce.tile_for(num_rows * dim * element_size, element_size, num_ranks)
        assert tile is not None
        size = {"PART" if tile.form == "two-shot" else "TILE": tile.size, "HAS_RESIDUAL": True}
        kernel = all_reduce.BY_FORM[tile.form]
        yield f"{tile.form} {case}", kernel, shared | size, tile.num_warps, TYPES
        if all_reduce.takes_norm(num_rows, dim, element_size, num_ranks):
            dim_p = triton.next_power_of_2(dim)
            sizes = shared | {"DIM": dim, "DIM_P": dim_p}
            warps = all_reduce.warps_for(dim_p * element_size)
            yield f"reduce_norm {case}", all_reduce.reduce_norm_kernel, sizes, warps, TYPES
    width = 75968
    columns = all_reduce.gather_tile(8, width, element_size)
    assert columns is not None
    sizes = {"NUM_RANKS": 2, "WIDTH": width, "NUM_COLUMNS": 151936, "TILE": columns}
    warps = all_reduce.warps_for(columns * element_size)
    yield f"gather_columns {dtype}", all_reduce.gather_columns_kernel, sizes, warps, TYPES
    best = TYPES | {"best_ptr": "*fp32", "best_token_ptr": "*i32", "out_ptr": "*i64"}
    for num_rows, num_spans, num_ranks in ((1, 75, 2), (64, 19, 4), (989, 1, 8)):
        rows, spans = sample_columns.rows_of_program(num_rows), triton.next_power_of_2(num_spans)
        sizes = {"NUM_RANKS": num_ranks, "ROWS": rows, "SPANS_P": spans}
        warps = 1 if rows * num_spans <= 32 else 4
        label = f"best_of_ranks {num_rows} rows, {num_ranks} ranks, {dtype}"
        yield label, sample_columns.best_of_ranks_kernel, sizes, warps, best
