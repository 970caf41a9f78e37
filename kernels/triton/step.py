"""A step's index arithmetic in Triton, one launch for each op.

Shapes: S rows of the state | R rows of a step | T tokens | P blocks per row
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.triton.common import launch_options, wait_for_earlier_kernels

DRAFT = tl.constexpr(reference.step.DRAFT)
ROWS = 128  # of one program, where a row is one number
NGRAM_TILE = 4096  # positions that a program of `ngram_propose` compares at a time
SPAN_TOKENS = 64  # of one program of `span_inputs`, which compares each with the ends of all rows


def _per_token(like_T: Tensor, num: int) -> tuple[Tensor, ...]:
    """Memory for `num` tensors like one."""
    return tuple(torch.empty_like(like_T) for _ in range(num))


def _per_row(row_idx_R: Tensor, num_blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for block_table_RP, seq_len_R and q_start."""
    num_rows = row_idx_R.shape[0]
    sizes = ((num_rows, num_blocks), (num_rows,), (num_rows + 1,))
    table_RP, seq_len_R, q_start = (row_idx_R.new_empty(size, dtype=torch.int32) for size in sizes)
    return table_RP, seq_len_R, q_start


def _piece(num_blocks: int) -> int:
    """Entries of a block table that a program copies at a time."""
    return min(1024, triton.next_power_of_2(num_blocks))


@triton.jit(do_not_specialize=["num_rows"])
def decode_inputs_kernel(
    token_ptr,  # [S]
    pos_ptr,  # [S]
    rope_offset_ptr,  # [S]
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
        tl.store(out_pos_ptr + row, pos + tl.load(rope_offset_ptr + state_row))
        tl.store(out_slot_ptr + row, block * BLOCK_SIZE + pos % BLOCK_SIZE)
        tl.store(out_seq_len_ptr + row, (pos + 1).to(tl.int32))
        tl.store(out_q_start_ptr + row, row)
        if row == num_rows - 1:
            tl.store(out_q_start_ptr + row + 1, row + 1)


def decode_inputs(
    token_S: Tensor,
    pos_S: Tensor,
    rope_offset_S: Tensor,
    block_table_SP: Tensor,
    row_idx_R: Tensor,
    block_size: int,
) -> tuple[Tensor, ...]:
    """See `reference.step.decode_inputs`."""
    num_rows, num_blocks, device = row_idx_R.shape[0], block_table_SP.shape[1], row_idx_R.device
    written = (*_per_token(row_idx_R, 3), *_per_row(row_idx_R, num_blocks))
    piece = _piece(num_blocks)
    decode_inputs_kernel[(num_rows, triton.cdiv(num_blocks, piece))](
        token_S,
        pos_S,
        rope_offset_S,
        block_table_SP,
        row_idx_R,
        *written,
        num_rows,
        block_table_SP.stride(0),
        BLOCKS=num_blocks,
        BLOCK_SIZE=block_size,
        PIECE=piece,
        num_warps=1 if piece <= 256 else 4,
        **launch_options(device),
    )
    return written


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "pad_row", "token_programs"])
def span_inputs_kernel(
    token_ptr,  # [S]
    pos_ptr,  # [S]
    rope_offset_ptr,  # [S]
    table_ptr,  # [S, P]
    row_idx_ptr,  # [R]
    num_tokens_ptr,  # [R]
    given_ptr,  # [T]
    draft_ptr,  # [S, DRAFTS], read if DRAFTS
    out_token_ptr,  # [T], written, as all below
    out_pos_ptr,  # [T]
    out_slot_ptr,  # [T]
    out_table_ptr,  # [R, P]
    out_seq_len_ptr,  # [R]
    out_q_start_ptr,  # [R + 1]
    out_row_ptr,  # [T]
    out_num_ptr,  # [T]
    out_last_ptr,  # [R]
    num_rows,
    num_tokens,
    pad_row,
    token_programs,
    table_stride,
    BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DRAFTS: tl.constexpr,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    PIECE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs 0 .. token_programs − 1 take TOKENS tokens each, the others a row each, or with EACH
    the block table of a token."""
    wait_for_earlier_kernels(PDL)
    row_R = tl.arange(0, ROWS)
    num_R = tl.load(num_tokens_ptr + row_R, mask=row_R < num_rows, other=0)
    end_R = tl.cumsum(num_R, 0)
    if tl.program_id(0) < token_programs:
        token_idx_T = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        is_token_T = token_idx_T < num_tokens
        is_before_TR = (end_R[None, :] <= token_idx_T[:, None]) & (row_R < num_rows)[None, :]
        start_T = tl.max(tl.where(is_before_TR, end_R[None, :], 0), 1)
        r_T = tl.sum(is_before_TR.to(tl.int32), 1)
        is_real_T = is_token_T & (r_T < num_rows)
        row_T = tl.load(row_idx_ptr + r_T, mask=is_real_T, other=0)
        row_T = tl.where(is_real_T, row_T, pad_row)
        index_T = tl.where(is_real_T, token_idx_T - start_T, 0)
        pos_T = tl.load(pos_ptr + row_T) + index_T
        block_T = tl.load(
            table_ptr + row_T * table_stride + pos_T // BLOCK_SIZE, mask=is_real_T, other=0
        )
        slot_T = block_T.to(tl.int64) * BLOCK_SIZE + pos_T % BLOCK_SIZE
        slot_T = tl.where(is_real_T, slot_T, token_idx_T % BLOCK_SIZE)
        given_T = tl.load(given_ptr + token_idx_T, mask=is_token_T, other=0)
        token_T = tl.where(given_T < 0, tl.load(token_ptr + row_T), given_T)
        if DRAFTS:
            draft_T = tl.minimum(tl.maximum(index_T - 1, 0), DRAFTS - 1)
            draft_T = tl.load(draft_ptr + row_T * DRAFTS + draft_T)
            token_T = tl.where(given_T == DRAFT, draft_T, token_T)
        tl.store(out_token_ptr + token_idx_T, token_T, mask=is_token_T)
        rope_pos_T = pos_T + tl.load(rope_offset_ptr + row_T)
        tl.store(out_pos_ptr + token_idx_T, rope_pos_T, mask=is_token_T)
        tl.store(out_slot_ptr + token_idx_T, slot_T, mask=is_token_T)
        tl.store(out_row_ptr + token_idx_T, row_T, mask=is_token_T)
        tl.store(out_num_ptr + token_idx_T, index_T + 1, mask=is_token_T)
        if EACH:
            tl.store(out_seq_len_ptr + token_idx_T, (pos_T + 1).to(tl.int32), mask=is_token_T)
            tl.store(out_q_start_ptr + token_idx_T, token_idx_T, mask=token_idx_T <= num_tokens)
            if tl.program_id(0) == token_programs - 1:
                tl.store(out_q_start_ptr + num_tokens, num_tokens)
    elif EACH:
        token = tl.program_id(0) - token_programs
        r = tl.sum(((end_R <= token) & (row_R < num_rows)).to(tl.int32), 0)
        state_row = tl.load(row_idx_ptr + r, mask=r < num_rows, other=pad_row)
        for first in range(0, BLOCKS, PIECE):
            block_P = first + tl.arange(0, PIECE)
            is_block_P = block_P < BLOCKS
            table_P = tl.load(table_ptr + state_row * table_stride + block_P, mask=is_block_P)
            to_P = out_table_ptr + token.to(tl.int64) * BLOCKS + block_P
            tl.store(to_P, table_P, mask=is_block_P)
        if token < num_rows:
            end = tl.sum(tl.where(row_R <= token, num_R, 0), 0)
            tl.store(out_last_ptr + token, tl.maximum(end - 1, 0))
    else:
        row = tl.program_id(0) - token_programs
        state_row = tl.load(row_idx_ptr + row)
        num = tl.load(num_tokens_ptr + row)
        end = tl.sum(tl.where(row_R <= row, num_R, 0), 0)
        for first in range(0, BLOCKS, PIECE):
            block_P = first + tl.arange(0, PIECE)
            is_block_P = block_P < BLOCKS
            table_P = tl.load(table_ptr + state_row * table_stride + block_P, mask=is_block_P)
            tl.store(out_table_ptr + row.to(tl.int64) * BLOCKS + block_P, table_P, mask=is_block_P)
        seq_len = tl.where(num > 0, tl.load(pos_ptr + state_row) + num, 0)
        tl.store(out_seq_len_ptr + row, seq_len.to(tl.int32))
        tl.store(out_q_start_ptr + row + 1, end.to(tl.int32))
        tl.store(out_last_ptr + row, tl.maximum(end - 1, 0))
        if row == 0:
            tl.store(out_q_start_ptr, 0)


def span_inputs(
    token_S: Tensor,
    pos_S: Tensor,
    rope_offset_S: Tensor,
    block_table_SP: Tensor,
    row_idx_R: Tensor,
    num_tokens_R: Tensor,
    given_T: Tensor,
    block_size: int,
    draft_SK: Tensor | None = None,
    each: bool = False,
) -> tuple[Tensor, ...]:
    """See `reference.step.span_inputs`."""
    num_rows, num_blocks, num_tokens = row_idx_R.shape[0], block_table_SP.shape[1], given_T.shape[0]
    written = (
        *_per_token(given_T, 3),
        *_per_row(given_T if each else row_idx_R, num_blocks),
        *_per_token(given_T, 2),
        torch.empty_like(row_idx_R),
    )
    token_programs = triton.cdiv(num_tokens, SPAN_TOKENS)
    others = max(num_tokens, num_rows) if each else num_rows
    span_inputs_kernel[(token_programs + others,)](
        token_S,
        pos_S,
        rope_offset_S,
        block_table_SP,
        row_idx_R,
        num_tokens_R,
        given_T,
        given_T if draft_SK is None else draft_SK,
        *written,
        num_rows,
        num_tokens,
        pos_S.shape[0] - 1,
        token_programs,
        block_table_SP.stride(0),
        BLOCKS=num_blocks,
        BLOCK_SIZE=block_size,
        DRAFTS=0 if draft_SK is None else draft_SK.shape[1],
        EACH=each,
        ROWS=triton.next_power_of_2(num_rows),
        TOKENS=SPAN_TOKENS,
        PIECE=_piece(num_blocks),
        num_warps=4,
        **launch_options(row_idx_R.device),
    )
    return written


@triton.jit(do_not_specialize=["num_rows"])
def sampling_inputs_kernel(
    pos_ptr,  # [S]
    sampling_ptr,  # [S, F]
    seed_ptr,  # [S]
    row_idx_ptr,  # [R]
    num_ptr,  # [R], read if HAS_NUM
    out_temperature_ptr,  # [R], written, as all below
    out_seed_ptr,  # [R]
    out_pos_ptr,  # [R]
    num_rows,
    FIELDS: tl.constexpr,
    HAS_NUM: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row_R = row_R < num_rows
    state_row_R = tl.load(row_idx_ptr + row_R, mask=is_row_R, other=0)
    temperature_R = tl.load(sampling_ptr + state_row_R * FIELDS, mask=is_row_R, other=0.0)
    tl.store(out_temperature_ptr + row_R, temperature_R, mask=is_row_R)
    seed_R = tl.load(seed_ptr + state_row_R, mask=is_row_R, other=0)
    tl.store(out_seed_ptr + row_R, seed_R, mask=is_row_R)
    pos_R = tl.load(pos_ptr + state_row_R, mask=is_row_R, other=0)
    pos_R += tl.load(num_ptr + row_R, mask=is_row_R, other=0) if HAS_NUM else 1
    tl.store(out_pos_ptr + row_R, pos_R, mask=is_row_R)


def sampling_inputs(
    pos_S: Tensor,
    sampling_SF: Tensor,
    seed_S: Tensor,
    row_idx_R: Tensor,
    num_R: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.step.sampling_inputs`."""
    num_rows = row_idx_R.shape[0]
    temperature_R = row_idx_R.new_empty(num_rows, dtype=torch.float32)
    seed_R, pos_R = _per_token(row_idx_R, 2)
    sampling_inputs_kernel[(triton.cdiv(num_rows, ROWS),)](
        pos_S,
        sampling_SF,
        seed_S,
        row_idx_R,
        row_idx_R if num_R is None else num_R,
        temperature_R,
        seed_R,
        pos_R,
        num_rows,
        FIELDS=sampling_SF.stride(0),
        HAS_NUM=num_R is not None,
        ROWS=ROWS,
        num_warps=4,
        **launch_options(row_idx_R.device),
    )
    return temperature_R, seed_R, pos_R


@triton.jit(do_not_specialize=["num_rows", "pad_row"])
def advance_kernel(
    token_ptr,  # [S], written
    pos_ptr,  # [S], written
    row_idx_ptr,  # [R]
    new_token_ptr,  # [R]
    num_ptr,  # [R], read if HAS_NUM
    num_rows,
    pad_row,
    HAS_NUM: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row_R = row_R < num_rows
    state_row_R = tl.load(row_idx_ptr + row_R, mask=is_row_R, other=0)
    is_real_R = is_row_R & (state_row_R != pad_row)
    # several padding rows store the same zeros
    token_R = tl.load(new_token_ptr + row_R, mask=is_real_R, other=0)
    token_R = tl.maximum(token_R, 0)  # NO_TOKEN
    tl.store(token_ptr + state_row_R, token_R, mask=is_row_R)
    pos_R = tl.load(pos_ptr + state_row_R, mask=is_real_R, other=0)
    num_R = tl.load(num_ptr + row_R, mask=is_real_R, other=0) if HAS_NUM else is_real_R.to(tl.int64)
    tl.store(pos_ptr + state_row_R, pos_R + num_R, mask=is_row_R)


def advance(
    token_S: Tensor, pos_S: Tensor, row_idx_R: Tensor, token_R: Tensor, num_R: Tensor | None = None
) -> None:
    """See `reference.step.advance`."""
    num_rows = row_idx_R.shape[0]
    advance_kernel[(triton.cdiv(num_rows, ROWS),)](
        token_S,
        pos_S,
        row_idx_R,
        token_R,
        row_idx_R if num_R is None else num_R,
        num_rows,
        token_S.shape[0] - 1,
        HAS_NUM=num_R is not None,
        ROWS=ROWS,
        num_warps=4,
        **launch_options(row_idx_R.device),
    )


@triton.jit
def ngram_propose_kernel(
    history_ptr,  # [S, M], read and written
    draft_ptr,  # [S, K], written
    token_ptr,  # [S]
    pos_ptr,  # [S]
    row_idx_ptr,  # [R]
    past_ptr,  # [C], read if PAST
    POSITIONS: tl.constexpr,
    NUM: tl.constexpr,
    NUM_POW2: tl.constexpr,
    MIN_N: tl.constexpr,
    MAX_N: tl.constexpr,
    PAST: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program for each row. An end of an occurrence has the key n · 2³¹ + (2³⁰ − place): the
    largest key is the longest occurrence, and of these the first. The places of the past are after
    those of the row."""
    wait_for_earlier_kernels(PDL)
    state_row = tl.load(row_idx_ptr + tl.program_id(0))
    pos = tl.load(pos_ptr + state_row)
    token = tl.load(token_ptr + state_row)
    row_ptr = history_ptr + state_row * POSITIONS
    num_ends = tl.where(pos < POSITIONS, pos, 0)
    key_M = tl.zeros([TILE], dtype=tl.int64)
    for first in range(0, num_ends, TILE):
        place_M = first + tl.arange(0, TILE)
        is_end_M = place_M < num_ends
        is_end_M &= tl.load(row_ptr + place_M, mask=is_end_M, other=-1) == token
        if tl.max(is_end_M.to(tl.int32), 0) > 0:  # few tiles have one
            length_M = is_end_M.to(tl.int64)
            for back in range(1, MAX_N):
                last = tl.load(row_ptr + pos - back, mask=back <= pos, other=-1)
                is_end_M &= place_M >= back
                is_end_M &= tl.load(row_ptr + place_M - back, mask=is_end_M, other=-2) == last
                length_M += is_end_M.to(tl.int64)
            found_M = (length_M << 31) + (1073741824 - place_M)
            key_M = tl.maximum(key_M, tl.where(length_M >= MIN_N, found_M, 0))
    num_past = tl.where(pos < POSITIONS, PAST, 0)
    for first in range(0, num_past, TILE):
        place_M = first + tl.arange(0, TILE)
        is_end_M = place_M < num_past
        is_end_M &= tl.load(past_ptr + place_M, mask=is_end_M, other=-1) == token
        if tl.max(is_end_M.to(tl.int32), 0) > 0:
            length_M = is_end_M.to(tl.int64)
            for back in range(1, MAX_N):
                last = tl.load(row_ptr + pos - back, mask=back <= pos, other=-3)
                is_end_M &= place_M >= back
                is_end_M &= tl.load(past_ptr + place_M - back, mask=is_end_M, other=-2) == last
                length_M += is_end_M.to(tl.int64)
            found_M = (length_M << 31) + (1073741824 - POSITIONS - place_M)
            key_M = tl.maximum(key_M, tl.where(length_M >= MIN_N, found_M, 0))
    key = tl.max(key_M, 0)
    is_found = key > 0
    start = 1073741824 - (key & 2147483647) + 1
    is_past = start > POSITIONS
    period = tl.where(is_found, pos + 1 - start, 1)
    k_K = tl.arange(0, NUM_POW2)
    from_K = start + k_K % period
    # the newest token is not in memory yet
    draft_K = tl.load(row_ptr + from_K, mask=is_found & (from_K < pos), other=0).to(tl.int64)
    draft_K = tl.where(is_found & (from_K == pos), token, draft_K)
    if PAST:
        place_K = start - POSITIONS + k_K
        is_in_K = is_found & is_past & (place_K < PAST)
        past_K = tl.load(past_ptr + place_K, mask=is_in_K, other=-1).to(tl.int64)
        is_open_K = tl.cumsum((past_K < 0).to(tl.int32), 0) == 0
        draft_K = tl.where(is_past, tl.where(is_open_K, past_K, 0), draft_K)
    tl.store(draft_ptr + state_row * NUM + k_K, draft_K, mask=k_K < NUM)
    tl.store(row_ptr + pos, token.to(tl.int32), mask=pos < POSITIONS)
    to_K = pos + 1 + k_K
    is_kept_K = (k_K < NUM) & (to_K < POSITIONS)
    tl.store(row_ptr + to_K, draft_K.to(tl.int32), mask=is_kept_K)


def ngram_propose(
    history_SM: Tensor,
    draft_SK: Tensor,
    token_S: Tensor,
    pos_S: Tensor,
    row_idx_R: Tensor,
    min_n: int,
    max_n: int,
    past_C: Tensor | None = None,
) -> None:
    """See `reference.step.ngram_propose`."""
    num_positions, num = history_SM.shape[1], draft_SK.shape[1]
    num_past = 0 if past_C is None else past_C.shape[0]
    ngram_propose_kernel[(row_idx_R.shape[0],)](
        history_SM,
        draft_SK,
        token_S,
        pos_S,
        row_idx_R,
        history_SM if past_C is None else past_C,
        POSITIONS=num_positions,
        NUM=num,
        NUM_POW2=triton.next_power_of_2(num),
        MIN_N=min_n,
        MAX_N=max_n,
        PAST=num_past,
        TILE=min(NGRAM_TILE, triton.next_power_of_2(max(num_positions, num_past))),
        num_warps=8,
        **launch_options(row_idx_R.device),
    )


_ALL = (decode_inputs, span_inputs, sampling_inputs, advance, ngram_propose)
KERNELS = {kernel.__name__: kernel for kernel in _ALL}


def register() -> None:
    """Make these the ops' kernels for the dispatch key CUDA; later calls do nothing."""
    from nanovllm.kernels import ops

    ops.register_kernels("CUDA", KERNELS)
