"""Shared by kernels that go over the tokens of rows in chunks: where a chunk is, and its tiles.

Chunks of a row follow each other, and only its last one may be shorter. Rows have their chunks in
order; chunks after the last row's are empty.

Shapes: R rows | Z chunks | L tokens of a chunk; "p" after a letter: padded to a power of two
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.triton.common import has_matrix_units


@triton.jit
def num_chunks_of(q_start_ptr, num_rows, ROWS_P: tl.constexpr, CHUNK: tl.constexpr):
    """The number of chunks of each row."""
    row_R = tl.arange(0, ROWS_P)
    is_row_R = row_R < num_rows
    start_R = tl.load(q_start_ptr + row_R, mask=is_row_R, other=0)
    end_R = tl.load(q_start_ptr + row_R + 1, mask=is_row_R, other=0)
    return (end_R - start_R + CHUNK - 1) // CHUNK


@triton.jit
def first_chunk_of(row, num_R, ROWS_P: tl.constexpr):
    """The first chunk of a row, from `num_chunks_of`."""
    return tl.sum(tl.where(tl.arange(0, ROWS_P) < row, num_R, 0), 0)


@triton.jit
def row_of(chunk, num_R, ROWS_P: tl.constexpr):
    """(the row of a chunk, its place among the row's chunks); `num_rows` or more for empty ones."""
    row = tl.sum((tl.cumsum(num_R, 0) <= chunk).to(tl.int32), 0)
    return row, chunk - first_chunk_of(row, num_R, ROWS_P)


@triton.jit
def rows_of(at_L, inside_L, SIZE: tl.constexpr, SIZE_P: tl.constexpr):
    """Rows of SIZE numbers that begin at `at_L`, zeros where there is none."""
    idx = tl.arange(0, SIZE_P)[None, :]
    return tl.load(at_L[:, None] + idx, mask=inside_L[:, None] & (idx < SIZE), other=0.0)


def takes_chunks(dtype: torch.dtype, device: torch.device) -> bool:
    """True if the kernels of chunks are used. Without matrix units they are slower than products of
    plain torch, and with inputs in fp32 they need more registers than there are."""
    return device.type != "cuda" or (dtype is not torch.float32 and has_matrix_units(device))


def values_of_program(value_size: int) -> int:
    """Values of a head that one program takes while it goes over the tokens of a row."""
    return max(16, min(triton.next_power_of_2(value_size), 32))
