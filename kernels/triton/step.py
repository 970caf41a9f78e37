"""The ops of `step.py` in Triton, one launch each: programs take one row of a step (for the token table a piece of it).

Shapes: S rows of the state | R rows of a step | P blocks per row, "p" after it: padded to a power of two
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import launch_options, wait_for_earlier_kernels

ROWS = 128  # of one program, where a row is one number


@triton.jit(do_not_specialize=["num_rows"])
def decode_inputs_kernel(
    token_ptr,  # [S]
    pos_ptr,  # [S]
    table_ptr,  # [S, P]
    row_idx_ptr,  # [R]
    out_token_ptr,  # [R], written, as all below
    out_pos_ptr,  # [R]
    out_slot_ptr,  # [R]
    out_table_ptr,  # [R, P]
    out_seq_len_ptr,  # [R]
    out_q_start_ptr,  # [R + 1]
    num_rows,
    table_stride,
    BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PIECE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    row = tl.program_id(0)
    state_row = tl.load(row_idx_ptr + row)
    block_P = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    in_table = table_ptr + state_row * table_stride
    table_P = tl.load(in_table + block_P, mask=block_P < BLOCKS, other=0)
    tl.store(out_table_ptr + row.to(tl.int64) * BLOCKS + block_P, table_P, mask=block_P < BLOCKS)
    if tl.program_id(1) == 0:
        pos = tl.load(pos_ptr + state_row)
        block = tl.load(in_table + pos // BLOCK_SIZE).to(tl.int64)
        tl.store(out_token_ptr + row, tl.load(token_ptr + state_row))
        tl.store(out_pos_ptr + row, pos)
        tl.store(out_slot_ptr + row, block * BLOCK_SIZE + pos % BLOCK_SIZE)
        tl.store(out_seq_len_ptr + row, (pos + 1).to(tl.int32))
        tl.store(out_q_start_ptr + row, row)
        if row == num_rows - 1:
            tl.store(out_q_start_ptr + row + 1, row + 1)


def decode_inputs(
    token_S: Tensor, pos_S: Tensor, block_table_SP: Tensor, row_idx_R: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `step.decode_inputs_meaning`."""
    num_rows, num_blocks, device = row_idx_R.shape[0], block_table_SP.shape[1], row_idx_R.device
    token_R, pos_R, slot_R = (
        torch.empty(num_rows, dtype=torch.int64, device=device) for _ in range(3)
    )
    table_RP = torch.empty((num_rows, num_blocks), dtype=torch.int32, device=device)
    seq_len_R = torch.empty(num_rows, dtype=torch.int32, device=device)
    q_start = torch.empty(num_rows + 1, dtype=torch.int32, device=device)
    piece = min(1024, triton.next_power_of_2(num_blocks))
    decode_inputs_kernel[(num_rows, triton.cdiv(num_blocks, piece))](
        token_S,
        pos_S,
        block_table_SP,
        row_idx_R,
        token_R,
        pos_R,
        slot_R,
        table_RP,
        seq_len_R,
        q_start,
        num_rows,
        block_table_SP.stride(0),
        BLOCKS=num_blocks,
        BLOCK_SIZE=block_size,
        PIECE=piece,
        num_warps=1 if piece <= 256 else 4,
        **launch_options(device),
    )
    return token_R, pos_R, slot_R, table_RP, seq_len_R, q_start


@triton.jit(do_not_specialize=["num_rows"])
def sampling_inputs_kernel(
    pos_ptr,  # [S]
    sampling_ptr,  # [S, F]
    seed_ptr,  # [S]
    row_idx_ptr,  # [R]
    out_temperature_ptr,  # [R], written, as all below
    out_seed_ptr,  # [R]
    out_pos_ptr,  # [R]
    num_rows,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row_R = row_R < num_rows
    state_row_R = tl.load(row_idx_ptr + row_R, mask=is_row_R, other=0)
    temperature_R = tl.load(sampling_ptr + state_row_R * FIELDS, mask=is_row_R, other=0.0)
    tl.store(out_temperature_ptr + row_R, temperature_R, mask=is_row_R)
    tl.store(
        out_seed_ptr + row_R, tl.load(seed_ptr + state_row_R, mask=is_row_R, other=0), mask=is_row_R
    )
    tl.store(
        out_pos_ptr + row_R,
        tl.load(pos_ptr + state_row_R, mask=is_row_R, other=0) + 1,
        mask=is_row_R,
    )


def sampling_inputs(
    pos_S: Tensor, sampling_SF: Tensor, seed_S: Tensor, row_idx_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `step.sampling_inputs_meaning`."""
    num_rows, device = row_idx_R.shape[0], row_idx_R.device
    temperature_R = torch.empty(num_rows, dtype=torch.float32, device=device)
    seed_R, pos_R = (torch.empty(num_rows, dtype=torch.int64, device=device) for _ in range(2))
    sampling_inputs_kernel[(triton.cdiv(num_rows, ROWS),)](
        pos_S,
        sampling_SF,
        seed_S,
        row_idx_R,
        temperature_R,
        seed_R,
        pos_R,
        num_rows,
        FIELDS=sampling_SF.stride(0),
        ROWS=ROWS,
        num_warps=4,
        **launch_options(device),
    )
    return temperature_R, seed_R, pos_R


@triton.jit(do_not_specialize=["num_rows", "pad_row"])
def advance_kernel(
    token_ptr,  # [S], written
    pos_ptr,  # [S], written
    row_idx_ptr,  # [R]
    new_token_ptr,  # [R]
    num_rows,
    pad_row,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    state_row_R = tl.load(row_idx_ptr + row_R, mask=row_R < num_rows, other=0)
    is_row_R = row_R < num_rows
    is_real_R = is_row_R & (state_row_R != pad_row)
    # several padding rows store the same zeros
    tl.store(
        token_ptr + state_row_R,
        tl.load(new_token_ptr + row_R, mask=is_real_R, other=0),
        mask=is_row_R,
    )
    tl.store(
        pos_ptr + state_row_R,
        tl.load(pos_ptr + state_row_R, mask=is_real_R, other=-1) + 1,
        mask=is_row_R,
    )


def advance(token_S: Tensor, pos_S: Tensor, row_idx_R: Tensor, token_R: Tensor) -> None:
    """See `step.advance_meaning`."""
    num_rows = row_idx_R.shape[0]
    advance_kernel[(triton.cdiv(num_rows, ROWS),)](
        token_S,
        pos_S,
        row_idx_R,
        token_R,
        num_rows,
        token_S.shape[0] - 1,
        ROWS=ROWS,
        num_warps=4,
        **launch_options(row_idx_R.device),
    )


def register() -> None:
    """Register the kernels for the dispatch key CUDA; a second call changes nothing."""
    from nanovllm.kernels import ops

    ops.register_kernels(
        "CUDA",
        {"decode_inputs": decode_inputs, "sampling_inputs": sampling_inputs, "advance": advance},
    )
