"""The recurrence of Mamba-2 over prompts and verified proposals in Triton.

A prompt is computed in chunks of 64 tokens, as in `kernels/ssd.py`. One launch multiplies C and B
of each group and adds up the decays, for all chunks side by side. A second one goes from chunk to
chunk with a part of a head's state in registers, so no state of a chunk is written. The few tokens
of a row that are verified go one by one, since the state after each is kept.

Factors of tokens (decays, dt) are in fp32 and multiply scores, and values that a state gets, before
these are rounded to the dtype of the inputs.

Shapes: those of `kernels/ssd.py`; K heads of a group; A values of one program; "p" after a letter:
padded to a power of two
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels import ssd as chunked
from nanovllm.kernels.gated_delta import CHUNK
from nanovllm.kernels.triton.chunks import (
    first_chunk_of,
    num_chunks_of,
    row_of,
    rows_of,
    takes_chunks,
    values_of_program,
)
from nanovllm.kernels.triton.common import (
    NO_SCORE,
    dot,
    launch_options,
    shared_memory_bytes,
    wait_for_earlier_kernels,
)
from nanovllm.kernels.triton.gated_delta_step import by_rows
from nanovllm.kernels.triton.ssd_step import next_state, sizes, values_of_step
from nanovllm.kernels.triton.zero_padding import zero_padding_

NUM_WARPS = 4
MAX_STATE = 256  # larger ones do not fit the shared memory
ALIGNMENT = 16  # of strides, in numbers, and of addresses, in bytes: what Triton tells apart


@triton.jit
def ssd_scores_kernel(
    xbc_ptr,  # [T, C]
    log_decay_ptr,  # [T, V] fp32
    q_start_ptr,  # [R + 1] int32
    scores_ptr,  # [Z, G, L, L] fp32, written, as below
    total_ptr,  # [Z, V, L] fp32
    xbc_stride,
    num_rows,
    NUM_HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    STATE: tl.constexpr,
    STATE_P: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS_P: tl.constexpr,
    CHUNK: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """C Bᵀ of one group in one chunk, and the decay of its heads from before the chunk to after
    each token."""
    wait_for_earlier_kernels(PDL)
    group, chunk = tl.program_id(0), tl.program_id(1)
    num_R = num_chunks_of(q_start_ptr, num_rows, ROWS_P, CHUNK)
    row, chunk_in_row = row_of(chunk, num_R, ROWS_P)
    if row >= num_rows:
        return
    groups: tl.constexpr = NUM_HEADS // HEADS_PER_GROUP
    l_L, k_K = tl.arange(0, CHUNK), tl.arange(0, GROUP_P)
    token_L = (tl.load(q_start_ptr + row) + chunk_in_row * CHUNK + l_L).to(tl.int64)
    inside_L = token_L < tl.load(q_start_ptr + row + 1)
    b_at_L = xbc_ptr + token_L * xbc_stride + NUM_HEADS * HEAD + group * STATE
    b_LH = rows_of(b_at_L, inside_L, STATE, STATE_P)
    c_LH = rows_of(b_at_L + groups * STATE, inside_L, STATE, STATE_P)
    none_LL = tl.zeros((CHUNK, CHUNK), tl.float32)
    scores_LL = dot(c_LH, tl.trans(b_LH), none_LL, UPCAST)
    chunk = chunk.to(tl.int64)
    at_LL = (chunk * groups + group) * CHUNK * CHUNK + l_L[:, None] * CHUNK + l_L[None, :]
    tl.store(scores_ptr + at_LL, scores_LL)
    decay_at_L = log_decay_ptr + token_L * NUM_HEADS + group * HEADS_PER_GROUP
    total_LK = tl.cumsum(rows_of(decay_at_L, inside_L, HEADS_PER_GROUP, GROUP_P), 0)
    head_K = chunk * NUM_HEADS + group * HEADS_PER_GROUP + k_K
    at_LK = head_K[None, :] * CHUNK + l_L[:, None]
    tl.store(total_ptr + at_LK, total_LK, mask=(k_K < HEADS_PER_GROUP)[None, :])


@triton.jit
def ssd_chunks_kernel(
    xbc_ptr,  # [T, C]
    dt_ptr,  # [T, V] fp32
    scores_ptr,  # [Z, G, L, L] fp32
    total_ptr,  # [Z, V, L] fp32
    state_ptr,  # [X, V, H, I], updated
    q_start_ptr,  # [R + 1] int32
    from_ptr,  # [R] int64
    is_new_ptr,  # [R] bool
    to_ptr,  # [R] int64
    out_ptr,  # [T, V, I] fp32, written
    xbc_stride,
    num_rows,
    NUM_HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    STATE: tl.constexpr,
    STATE_P: tl.constexpr,
    HEAD: tl.constexpr,
    VALUES: tl.constexpr,
    ROWS_P: tl.constexpr,
    CHUNK: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """All tokens of a row, for VALUES values of a head."""
    wait_for_earlier_kernels(PDL)
    head, row = tl.program_id(1), tl.program_id(2)
    start, end = tl.load(q_start_ptr + row), tl.load(q_start_ptr + row + 1)
    if start == end:
        return
    num_R = num_chunks_of(q_start_ptr, num_rows, ROWS_P, CHUNK)
    first_chunk = first_chunk_of(row, num_R, ROWS_P).to(tl.int64)
    groups: tl.constexpr = NUM_HEADS // HEADS_PER_GROUP
    dtype = xbc_ptr.dtype.element_ty
    group = head // HEADS_PER_GROUP
    l_L, h_H = tl.arange(0, CHUNK), tl.arange(0, STATE_P)
    i_A = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    is_A = (i_A < HEAD)[None, :]
    at_HA = head * STATE * HEAD + h_H[:, None] * HEAD + i_A[None, :]
    is_HA, size = (h_H < STATE)[:, None] & is_A, NUM_HEADS * STATE * HEAD
    is_new = tl.load(is_new_ptr + row) != 0
    from_at = state_ptr + tl.load(from_ptr + row) * size + at_HA
    state_HA = tl.load(from_at, mask=is_HA & ~is_new, other=0.0).to(tl.float32)
    is_before_LL = l_L[:, None] >= l_L[None, :]
    for chunk_in_row in range(tl.cdiv(end - start, CHUNK)):
        # one address in 64 bits for the chunk: each of its own would take two registers
        chunk, token = first_chunk + chunk_in_row, (start + chunk_in_row * CHUNK).to(tl.int64)
        inside_L = l_L < end - start - chunk_in_row * CHUNK
        total_L = tl.load(total_ptr + (chunk * NUM_HEADS + head) * CHUNK + l_L)
        whole = tl.sum(tl.where(l_L == CHUNK - 1, total_L, 0.0), 0)
        dt_at = dt_ptr + token * NUM_HEADS + head
        dt_L = tl.load(dt_at + l_L * NUM_HEADS, mask=inside_L, other=0.0)
        scores_at = scores_ptr + (chunk * groups + group) * CHUNK * CHUNK
        scores_LL = tl.load(scores_at + (l_L[:, None] * CHUNK + l_L[None, :]))
        is_LA, x_at = inside_L[:, None] & is_A, xbc_ptr + token * xbc_stride
        x_at_LA = x_at + head * HEAD + (l_L[:, None] * xbc_stride + i_A[None, :])
        x_LA = tl.load(x_at_LA, mask=is_LA, other=0.0)
        b_at_L = x_at + NUM_HEADS * HEAD + group * STATE + l_L * xbc_stride
        b_LH = rows_of(b_at_L, inside_L, STATE, STATE_P)
        c_LH = rows_of(b_at_L + groups * STATE, inside_L, STATE, STATE_P)
        out_LA = dot(c_LH, state_HA.to(dtype), tl.zeros((CHUNK, VALUES), tl.float32), UPCAST)
        out_LA *= tl.exp(total_L)[:, None]
        between_LL = tl.where(is_before_LL, total_L[:, None] - total_L[None, :], NO_SCORE)
        scores_LL = (scores_LL * tl.exp(between_LL) * dt_L[None, :]).to(dtype)
        out_LA = dot(scores_LL, x_LA, out_LA, UPCAST)
        out_at = out_ptr + (token * NUM_HEADS + head) * HEAD
        tl.store(out_at + (l_L[:, None] * (NUM_HEADS * HEAD) + i_A[None, :]), out_LA, mask=is_LA)
        # a tile of x takes fewer registers than one of B
        x_LA = (x_LA.to(tl.float32) * (tl.exp(whole - total_L) * dt_L)[:, None]).to(dtype)
        state_HA = dot(tl.trans(b_LH), x_LA, state_HA * tl.exp(whole), UPCAST)
    tl.store(state_ptr + tl.load(to_ptr + row) * size + at_HA, state_HA, mask=is_HA)


@triton.jit
def ssd_tokens_kernel(
    xbc_ptr,  # [T, C]
    dt_ptr,  # [T, V] fp32
    log_decay_ptr,  # [T, V] fp32
    state_ptr,  # [X, V, H, I], updated
    q_start_ptr,  # [R + 1] int32
    from_ptr,  # [R] int64
    is_new_ptr,  # [R] bool
    to_ptr,  # [T] int64
    out_ptr,  # [T, V, I] fp32, written
    xbc_stride,
    NUM_HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    STATE: tl.constexpr,
    STATE_P: tl.constexpr,
    HEAD: tl.constexpr,
    VALUES: tl.constexpr,
    PDL: tl.constexpr,
):
    """A row's tokens one by one, for VALUES values of a head; the state after each is stored."""
    wait_for_earlier_kernels(PDL)
    head, row = tl.program_id(1), tl.program_id(2)
    h_H = tl.arange(0, STATE_P)
    i_A = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    at_HA = head * STATE * HEAD + h_H[:, None] * HEAD + i_A[None, :]
    is_HA, size = (h_H < STATE)[:, None] & (i_A < HEAD)[None, :], NUM_HEADS * STATE * HEAD
    is_new = tl.load(is_new_ptr + row) != 0
    from_at = state_ptr + tl.load(from_ptr + row) * size + at_HA
    state_HA = tl.load(from_at, mask=is_HA & ~is_new, other=0.0).to(tl.float32)
    for token in range(tl.load(q_start_ptr + row), tl.load(q_start_ptr + row + 1)):
        state_HA, y_A = next_state(
            state_HA, xbc_ptr + tl.cast(token, tl.int64) * xbc_stride, head, i_A,
            tl.load(dt_ptr + token * NUM_HEADS + head),
            tl.load(log_decay_ptr + token * NUM_HEADS + head),
            NUM_HEADS, HEADS_PER_GROUP, STATE, STATE_P, HEAD,
        )  # fmt: skip
        tl.store(state_ptr + tl.load(to_ptr + token) * size + at_HA, state_HA, mask=is_HA)
        tl.store(out_ptr + (token * NUM_HEADS + head) * HEAD + i_A, y_A, mask=i_A < HEAD)


def _aligned(xbc_TC: Tensor) -> Tensor:
    """The same numbers in rows at aligned addresses. For other rows Triton 3.6 makes a loop without
    stages, and on sm_90 its results are wrong from a row's second chunk on."""
    offset = xbc_TC.storage_offset() * xbc_TC.element_size()
    if xbc_TC.stride(0) % ALIGNMENT == 0 == offset % ALIGNMENT:
        return xbc_TC
    return xbc_TC.clone(memory_format=torch.contiguous_format)


def warps_and_stages(state_size: int, shared_bytes: int) -> tuple[int, int]:
    """Warps of a program that goes from chunk to chunk, so that large states fit its registers, and
    the chunks whose B and C are in its shared memory."""
    if state_size <= 128:
        return NUM_WARPS, 2
    return 2 * NUM_WARPS, 2 if shared_bytes > 96 << 10 else 1


def ssd(
    xbc_TC: Tensor,
    dt_TV: Tensor,
    log_decay_TV: Tensor,
    state_XVHI: Tensor,
    q_start_S: Tensor,
    from_R: Tensor,
    is_new_R: Tensor,
    to_R: Tensor | None = None,
    to_T: Tensor | None = None,
) -> Tensor:
    """See `reference.ssd.ssd`."""
    xbc_TC, dt_TV, log_decay_TV = by_rows(xbc_TC), dt_TV.contiguous(), log_decay_TV.contiguous()
    of_tokens, places = (xbc_TC, dt_TV, log_decay_TV), (q_start_S, from_R, is_new_R)
    takes = (
        takes_chunks(xbc_TC.dtype, xbc_TC.device)
        and state_XVHI.shape[2] <= MAX_STATE
        and (xbc_TC.device.type != "cuda" or xbc_TC.shape[1] % ALIGNMENT == 0)
    )
    if to_R is not None and not takes:
        return chunked.ssd(*of_tokens, state_XVHI, *places, to_R)
    out_TVI = dt_TV.new_empty((*dt_TV.shape, state_XVHI.shape[3]))
    if to_R is None:
        assert to_T is not None
        _by_token(*of_tokens, state_XVHI, places, to_T, out_TVI)
    else:
        _in_chunks(*of_tokens, state_XVHI, places, to_R, out_TVI)
    zero_padding_(out_TVI, q_start_S)
    return out_TVI


def _by_token(
    xbc_TC: Tensor,
    dt_TV: Tensor,
    log_decay_TV: Tensor,
    state_XVHI: Tensor,
    places: tuple[Tensor, Tensor, Tensor],
    to_T: Tensor,
    out_TVI: Tensor,
) -> None:
    """Write the results, and the state after each token. places: q_start_S, from_R, is_new_R."""
    _, num_heads, state_size, head_size = state_XVHI.shape
    values = values_of_step(state_size, head_size)
    ssd_tokens_kernel[(triton.cdiv(head_size, values), num_heads, len(places[1]))](
        xbc_TC, dt_TV, log_decay_TV, state_XVHI, *places, to_T, out_TVI, xbc_TC.stride(0),
        **sizes(xbc_TC, state_XVHI), VALUES=values, num_warps=NUM_WARPS,
        **launch_options(xbc_TC.device),
    )  # fmt: skip


def _in_chunks(
    xbc_TC: Tensor,
    dt_TV: Tensor,
    log_decay_TV: Tensor,
    state_XVHI: Tensor,
    places: tuple[Tensor, Tensor, Tensor],
    to_R: Tensor,
    out_TVI: Tensor,
) -> None:
    """Write the results, and each row's state after its last token. `places`: see `_by_token`."""
    xbc_TC = _aligned(xbc_TC)
    q_start_S, num_rows, device = places[0], len(to_R), xbc_TC.device
    _, num_heads, state_size, head_size = state_XVHI.shape
    of_heads, options = sizes(xbc_TC, state_XVHI), launch_options(device)
    of_chunks = {
        **of_heads,
        "STATE_P": max(16, of_heads["STATE_P"]),
        "ROWS_P": triton.next_power_of_2(num_rows),
        "CHUNK": CHUNK,
        "UPCAST": device.type != "cuda",
    }
    num_chunks, per_group = len(xbc_TC) // CHUNK + num_rows, of_heads["HEADS_PER_GROUP"]
    num_groups, stride = num_heads // per_group, xbc_TC.stride(0)
    scores = dt_TV.new_empty((num_chunks, num_groups, CHUNK, CHUNK))
    total = dt_TV.new_empty((num_chunks, num_heads, CHUNK))
    ssd_scores_kernel[(num_groups, num_chunks)](
        xbc_TC, log_decay_TV, q_start_S, scores, total, stride, num_rows, **of_chunks,
        GROUP_P=triton.next_power_of_2(per_group), num_warps=NUM_WARPS, **options,
    )  # fmt: skip
    values = values_of_program(head_size)
    warps, stages = warps_and_stages(state_size, shared_memory_bytes(device))
    ssd_chunks_kernel[(triton.cdiv(head_size, values), num_heads, num_rows)](
        xbc_TC, dt_TV, scores, total, state_XVHI, *places, to_R, out_TVI, stride, num_rows,
        **of_chunks, VALUES=values, num_warps=warps, num_stages=stages, **options,
    )  # fmt: skip
