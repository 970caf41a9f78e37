"""What drafting and verifying need beside the model, in Triton, one launch for each op.

Shapes: S rows of the state | R rows of a step | T tokens | K tokens of a row | P blocks per row
X = R · NUM tokens of blocks
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import launch_options, wait_for_earlier_kernels
from nanovllm.kernels.triton.norm_act import as_rows, norm_tile

TILE = 1024  # tokens that a program of `next_tokens` takes at a time
PIECE = 1024  # entries of a block table that a program copies


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "pad_row", "rate"])
def accept_kernel(
    fed_ptr,  # [T]
    chosen_ptr,  # [T]
    num_tokens_ptr,  # [R]
    row_idx_ptr,  # [R]
    token_ptr,  # [S], written
    pos_ptr,  # [S], written
    seed_ptr,  # [S], read if HAS_RATE
    out_ptr,  # [R, K], written
    count_ptr,  # [R], written
    num_rows,
    num_tokens,
    pad_row,
    rate,  # of 2³¹, read if HAS_RATE
    NUM: tl.constexpr,
    NUM_POW2: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_RATE: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program for each row."""
    wait_for_earlier_kernels(PDL)
    row = tl.program_id(0)
    row_R = tl.arange(0, ROWS)
    start = tl.sum(tl.load(num_tokens_ptr + row_R, mask=row_R < row, other=0), 0)
    num = tl.load(num_tokens_ptr + row)
    state_row = tl.load(row_idx_ptr + row)
    is_real = state_row != pad_row
    pos = tl.load(pos_ptr + state_row)
    k_K = tl.arange(0, NUM_POW2)
    at_K = tl.minimum(start + k_K, num_tokens - 1)
    next_K = tl.load(fed_ptr + tl.minimum(start + k_K + 1, num_tokens - 1))
    chosen_K = tl.load(chosen_ptr + at_K)
    if HAS_RATE:
        seed = tl.load(seed_ptr + state_row) % 65521
        seed = tl.where(seed < 0, seed + 65521, seed)
        x_K = ((pos + k_K + 1) * 40503 + seed) & 0x7FFFFFFF
        x_K = ((x_K ^ (x_K >> 15)) * 0x2C1B3C6D) & 0x7FFFFFFF
        x_K = ((x_K ^ (x_K >> 12)) * 0x297A2D39) & 0x7FFFFFFF
        x_K = x_K ^ (x_K >> 15)
        wrong_K = tl.where(next_K == 0, 1, next_K - 1)
        drafted_K = tl.where(x_K < rate, next_K, wrong_K)
        chosen_K = tl.where((k_K + 1 < num) & (k_K + 1 < NUM), drafted_K, chosen_K)
    is_wrong_K = (k_K + 1 >= num) | (k_K + 1 >= NUM) | (next_K != chosen_K)
    count = tl.min(tl.where(is_wrong_K, k_K, NUM - 1), 0) + 1
    tl.store(out_ptr + row * NUM + k_K, chosen_K, mask=k_K < NUM)
    tl.store(count_ptr + row, count.to(tl.int64))
    newest = tl.sum(tl.where(k_K == count - 1, chosen_K, 0), 0)
    # several padding rows store the same zeros; NO_TOKEN is negative
    tl.store(token_ptr + state_row, tl.where(is_real, tl.maximum(newest, 0), 0))
    tl.store(pos_ptr + state_row, tl.where(is_real, pos + count, 0))


def accept(
    token_T: Tensor,
    chosen_T: Tensor,
    num_tokens_R: Tensor,
    row_idx_R: Tensor,
    token_S: Tensor,
    pos_S: Tensor,
    num: int,
    seed_S: Tensor | None = None,
    rate: int = 0,
) -> tuple[Tensor, Tensor]:
    """See `reference.drafts.accept`."""
    num_rows = row_idx_R.shape[0]
    token_RK, count_R = token_T.new_empty((num_rows, num)), torch.empty_like(row_idx_R)
    accept_kernel[(num_rows,)](
        token_T,
        chosen_T,
        num_tokens_R,
        row_idx_R,
        token_S,
        pos_S,
        pos_S if seed_S is None else seed_S,
        token_RK,
        count_R,
        num_rows,
        token_T.shape[0],
        token_S.shape[0] - 1,
        rate,
        NUM=num,
        NUM_POW2=triton.next_power_of_2(num),
        ROWS=triton.next_power_of_2(num_rows),
        HAS_RATE=seed_S is not None,
        num_warps=1,
        **launch_options(row_idx_R.device),
    )
    return token_RK, count_R


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "pad_row"])
def next_tokens_kernel(
    token_ptr,  # [S]
    pos_ptr,  # [S]
    row_idx_ptr,  # [R]
    fed_ptr,  # [T]
    seq_len_ptr,  # [R]
    q_start_ptr,  # [R + 1]
    out_ptr,  # [T], written
    last_ptr,  # [R], written
    num_rows,
    num_tokens,
    pad_row,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program for each row, and one for the tokens of none."""
    wait_for_earlier_kernels(PDL)
    row = tl.program_id(0)
    first = tl.load(q_start_ptr + row)
    end = num_tokens
    last = tl.full((), -1, tl.int64)
    newest = tl.full((), 0, tl.int64)
    if row < num_rows:
        end = tl.load(q_start_ptr + row + 1)
        state_row = tl.load(row_idx_ptr + row)
        before = tl.load(seq_len_ptr + row) - (end - first)
        kept = tl.load(pos_ptr + state_row) - before
        last = tl.minimum(tl.maximum(first + kept - 1, 0), num_tokens - 1)
        tl.store(last_ptr + row, last)
        newest = tl.load(token_ptr + state_row)
        last = tl.where(state_row == pad_row, -1, last)
    for start in range(first, end, TILE):
        t_T = start + tl.arange(0, TILE)
        is_own_T = t_T < end
        after_T = tl.where(t_T + 1 < num_tokens, t_T + 1, 0)
        next_T = tl.load(fed_ptr + after_T, mask=is_own_T, other=0)
        tl.store(out_ptr + t_T, tl.where(t_T == last, newest, next_T), mask=is_own_T)


def next_tokens(
    token_S: Tensor,
    pos_S: Tensor,
    row_idx_R: Tensor,
    fed_T: Tensor,
    seq_len_R: Tensor,
    q_start: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `reference.drafts.next_tokens`."""
    num_rows, num_tokens = row_idx_R.shape[0], fed_T.shape[0]
    next_T, last_R = torch.empty_like(fed_T), torch.empty_like(row_idx_R)
    next_tokens_kernel[(num_rows + 1,)](
        token_S,
        pos_S,
        row_idx_R,
        fed_T,
        seq_len_R,
        q_start,
        next_T,
        last_R,
        num_rows,
        num_tokens,
        token_S.shape[0] - 1,
        TILE=min(TILE, triton.next_power_of_2(num_tokens)),
        num_warps=4,
        **launch_options(row_idx_R.device),
    )
    return next_T, last_R


@triton.jit(do_not_specialize=["num_tokens", "mask_id", "last_pos", "shift"])
def draft_inputs_kernel(
    token_ptr,  # [S]
    pos_ptr,  # [S]
    rope_offset_ptr,  # [S]
    table_ptr,  # [S, P]
    row_idx_ptr,  # [R]
    out_token_ptr,  # [X], written, as all below
    out_pos_ptr,  # [X]
    out_slot_ptr,  # [X]
    out_table_ptr,  # [X, P]
    out_seq_len_ptr,  # [X]
    out_q_start_ptr,  # [X + 1]
    out_row_ptr,  # [X]
    out_ahead_ptr,  # [X]
    num_tokens,
    shift,
    mask_id,
    last_pos,
    table_stride,
    NUM: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PIECE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    x = tl.program_id(0)
    ahead = x % NUM
    state_row = tl.load(row_idx_ptr + x // NUM)
    block_P = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    in_table = table_ptr + state_row * table_stride
    table_P = tl.load(in_table + block_P, mask=block_P < BLOCKS, other=0)
    tl.store(out_table_ptr + x.to(tl.int64) * BLOCKS + block_P, table_P, mask=block_P < BLOCKS)
    if tl.program_id(1) == 0:
        first = tl.load(pos_ptr + state_row) + shift
        pos = tl.minimum(tl.maximum(first + ahead, 0), last_pos)
        end = tl.minimum(tl.maximum(first + NUM - 1, 0), last_pos) + 1
        block = tl.load(in_table + pos // BLOCK_SIZE).to(tl.int64)
        token = tl.load(token_ptr + state_row)
        tl.store(out_token_ptr + x, tl.where(ahead == 0, token, mask_id))
        tl.store(out_pos_ptr + x, pos + tl.load(rope_offset_ptr + state_row))
        tl.store(out_slot_ptr + x, block * BLOCK_SIZE + pos % BLOCK_SIZE)
        tl.store(out_seq_len_ptr + x, end.to(tl.int32))
        tl.store(out_q_start_ptr + x, x)
        tl.store(out_row_ptr + x, state_row)
        tl.store(out_ahead_ptr + x, ahead.to(tl.int64))
        if x == num_tokens - 1:
            tl.store(out_q_start_ptr + x + 1, x + 1)


def draft_inputs(
    token_S: Tensor,
    pos_S: Tensor,
    rope_offset_S: Tensor,
    block_table_SP: Tensor,
    row_idx_R: Tensor,
    num: int,
    shift: int,
    mask_id: int,
    block_size: int,
    last_pos: int,
) -> tuple[Tensor, ...]:
    """See `reference.drafts.draft_inputs`."""
    num_tokens, num_blocks = row_idx_R.shape[0] * num, block_table_SP.shape[1]
    token_X, pos_X, slot_X, row_X, ahead_X = (row_idx_R.new_empty(num_tokens) for _ in range(5))
    sizes = ((num_tokens, num_blocks), (num_tokens,), (num_tokens + 1,))
    per_row = tuple(row_idx_R.new_empty(size, dtype=torch.int32) for size in sizes)
    written = (token_X, pos_X, slot_X, *per_row, row_X, ahead_X)
    piece = min(PIECE, triton.next_power_of_2(num_blocks))
    draft_inputs_kernel[(num_tokens, triton.cdiv(num_blocks, piece))](
        token_S,
        pos_S,
        rope_offset_S,
        block_table_SP,
        row_idx_R,
        *written,
        num_tokens,
        shift,
        mask_id,
        last_pos,
        block_table_SP.stride(0),
        NUM=num,
        BLOCKS=num_blocks,
        BLOCK_SIZE=block_size,
        PIECE=piece,
        num_warps=1 if piece <= 256 else 4,
        **launch_options(row_idx_R.device),
    )
    return written


@triton.jit
def rms_norm_each_kernel(
    x_ptr,  # [T, PARTS · DIM]
    weight_ptr,  # [PARTS, DIM]
    out_ptr,  # [T, PARTS · DIM], written
    x_stride,
    eps,
    PARTS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_P: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program for each part of a token."""
    wait_for_earlier_kernels(PDL)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    token_idx, part = (tl.program_id(0) // PARTS).to(tl.int64), tl.program_id(0) % PARTS
    d_D = tl.arange(0, DIM_P)
    is_in_D = d_D < DIM
    weight_D = tl.load(weight_ptr + part * DIM + d_D, mask=is_in_D, other=0.0).to(tl.float32)
    at_D = x_ptr + token_idx * x_stride + part * DIM + d_D
    x_D = tl.load(at_D, mask=is_in_D, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(x_D * x_D, 0) / DIM + eps)
    out_D = (x_D * factor).to(dtype).to(tl.float32) * weight_D
    to_D = out_ptr + (token_idx * PARTS + part) * DIM + d_D
    tl.store(to_D, out_D.to(dtype), mask=is_in_D)


def rms_norm_each(x_TD: Tensor, weight_PE: Tensor, eps: float) -> Tensor:
    """See `reference.drafts.rms_norm_each`."""
    x_TD = as_rows(x_TD)
    out_TD = x_TD.new_empty(x_TD.shape)
    parts, dim = weight_PE.shape
    if x_TD.numel() == 0:
        return out_TD
    rms_norm_each_kernel[(x_TD.shape[0] * parts,)](
        x_TD,
        weight_PE.contiguous(),
        out_TD,
        x_TD.stride(0),
        eps,
        PARTS=parts,
        DIM=dim,
        DIM_P=triton.next_power_of_2(dim),
        num_warps=norm_tile(dim)[1],
        **launch_options(x_TD.device),
    )
    return out_TD


_ALL = (accept, next_tokens, draft_inputs, rms_norm_each)
KERNELS = {kernel.__name__: kernel for kernel in _ALL}
