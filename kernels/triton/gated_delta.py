"""The gated delta rule of prompts and of verified proposals in Triton.

A prompt is computed in chunks of 64 tokens, as in `kernels/gated_delta.py`: one launch prepares all
chunks side by side, a second one goes from chunk to chunk with a part of a row's state in
registers. The few tokens of a row that are verified go one by one, since the state after each is
kept.

Shapes: those of `kernels/gated_delta.py`; A values of one program; "p" after a letter: padded to a
power of two
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels import gated_delta as chunked
from nanovllm.kernels.gated_delta import CHUNK
from nanovllm.kernels.triton.chunks import (
    first_chunk_of,
    num_chunks_of,
    row_of,
    rows_of,
    takes_chunks,
    values_of_program,
)
from nanovllm.kernels.triton.common import launch_options, wait_for_earlier_kernels
from nanovllm.kernels.triton.gated_delta_step import (
    NORM_EPS,
    by_rows,
    decay_and_beta,
    next_state,
    sizes,
)
from nanovllm.kernels.triton.zero_padding import zero_padding_

NUM_WARPS, NUM_STAGES = 4, 2
LEVELS = tl.constexpr(CHUNK.bit_length() - 1)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """a @ b in fp32. UPCAST is for the interpreter, which multiplies bf16 as raw integers."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _inverse_of_unit_lower(a_LL, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
                           UPCAST: tl.constexpr):  # fmt: skip
    """See `kernels.gated_delta.inverse_of_unit_lower`."""
    row_L1, column_1L = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    is_pair_LL = row_L1 // 2 == column_1L // 2
    inverse_LL = (row_L1 == column_1L).to(tl.float32) - tl.where(is_pair_LL, a_LL, 0.0)
    # a loop that is not unrolled: the products take many instructions
    for level in range(1, LEVELS):
        is_pair_LL = row_L1 >> (level + 1) == column_1L >> (level + 1)
        is_below_LL = row_L1 >> level > column_1L >> level
        b_LL = tl.where(is_pair_LL & is_below_LL, a_LL, 0.0)
        product_LL = _dot(inverse_LL, b_LL, PRECISION, UPCAST)
        inverse_LL -= _dot(product_LL, inverse_LL, PRECISION, UPCAST)
    return inverse_LL


@triton.jit
def _unit_rows(x_LH, factor):
    """Rows of length 1, times a factor, in fp32."""
    x_LH = x_LH.to(tl.float32)
    return x_LH * (tl.rsqrt(tl.sum(x_LH * x_LH, 1) + NORM_EPS) * factor)[:, None]


@triton.jit
def prepare_chunks_kernel(
    qkv_ptr,  # [T, C]
    ba_ptr,  # [T, J]
    a_log_ptr,  # [V] fp32
    dt_bias_ptr,  # [V] fp32
    q_start_ptr,  # [R + 1] int32
    written_ptr,  # [Z, V, L, I], written, as all below
    read_ptr,  # [Z, V, L, H]
    scores_ptr,  # [Z, V, L, L]
    total_ptr,  # [Z, V, L] fp32
    qkv_stride,
    ba_stride,
    num_rows,
    KEY_HEADS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    KEY: tl.constexpr,
    KEY_P: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_P: tl.constexpr,
    ROWS_P: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """What one head of one chunk writes and reads, as functions of the state before the chunk."""
    wait_for_earlier_kernels(PDL)
    head, chunk = tl.program_id(0), tl.program_id(1)
    num_R = num_chunks_of(q_start_ptr, num_rows, ROWS_P, CHUNK)
    row, chunk_in_row = row_of(chunk, num_R, ROWS_P)
    if row >= num_rows:
        return
    dtype = qkv_ptr.dtype.element_ty
    l_L = tl.arange(0, CHUNK)
    token_L = (tl.load(q_start_ptr + row) + chunk_in_row * CHUNK + l_L).to(tl.int64)
    inside_L = token_L < tl.load(q_start_ptr + row + 1)
    keys: tl.constexpr = KEY_HEADS * KEY
    q_at_L = qkv_ptr + token_L * qkv_stride + head // (NUM_HEADS // KEY_HEADS) * KEY
    v_at_L = qkv_ptr + token_L * qkv_stride + 2 * keys + head * VALUE
    log_decay_L, beta_L = decay_and_beta(
        ba_ptr + token_L * ba_stride + head, tl.load(a_log_ptr + head),
        tl.load(dt_bias_ptr + head), NUM_HEADS, inside_L,
    )  # fmt: skip
    total_L = tl.cumsum(tl.where(inside_L, log_decay_L, 0.0), 0)
    at_L = (chunk.to(tl.int64) * NUM_HEADS + head) * CHUNK + l_L
    tl.store(total_ptr + at_L, total_L)
    is_before_LL = l_L[:, None] >= l_L[None, :]
    decay_LL = tl.exp(tl.where(is_before_LL, total_L[:, None] - total_L[None, :], -1.0e30))
    k_LH = _unit_rows(rows_of(q_at_L + keys, inside_L, KEY, KEY_P), 1.0).to(dtype)
    q_LH = _unit_rows(rows_of(q_at_L, inside_L, KEY, KEY_P), KEY**-0.5).to(dtype)
    scores_LL = _dot(q_LH, tl.trans(k_LH), PRECISION, UPCAST) * decay_LL
    tl.store(scores_ptr + at_L[:, None] * CHUNK + l_L[None, :], scores_LL)
    a_LL = _dot(k_LH, tl.trans(k_LH), PRECISION, UPCAST) * decay_LL * beta_L[:, None]
    a_LL = tl.where(l_L[:, None] > l_L[None, :], a_LL, 0.0)
    inverse_LL = _inverse_of_unit_lower(a_LL, CHUNK, PRECISION, UPCAST).to(dtype)
    # values and keys are loaded late, since the inverse takes most registers
    v_LI = rows_of(v_at_L, inside_L, VALUE, VALUE_P).to(tl.float32) * beta_L[:, None]
    written_LI = _dot(inverse_LL, v_LI.to(dtype), PRECISION, UPCAST)
    i_I, h_H = tl.arange(0, VALUE_P)[None, :], tl.arange(0, KEY_P)[None, :]
    tl.store(written_ptr + at_L[:, None] * VALUE + i_I, written_LI, mask=i_I < VALUE)
    k_LH = _unit_rows(rows_of(q_at_L + keys, inside_L, KEY, KEY_P), beta_L * tl.exp(total_L))
    read_LH = _dot(inverse_LL, k_LH.to(dtype), PRECISION, UPCAST)
    tl.store(read_ptr + at_L[:, None] * KEY + h_H, read_LH, mask=h_H < KEY)


@triton.jit
def scan_chunks_kernel(
    qkv_ptr,  # [T, C]
    written_ptr,  # [Z, V, L, I]
    read_ptr,  # [Z, V, L, H]
    scores_ptr,  # [Z, V, L, L]
    total_ptr,  # [Z, V, L] fp32
    state_ptr,  # [X, V, H, I], updated
    q_start_ptr,  # [R + 1] int32
    from_ptr,  # [R] int64
    is_new_ptr,  # [R] bool
    to_ptr,  # [R] int64
    out_ptr,  # [T, V, I], written
    qkv_stride,
    num_rows,
    KEY_HEADS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    KEY: tl.constexpr,
    KEY_P: tl.constexpr,
    VALUE: tl.constexpr,
    VALUES: tl.constexpr,
    ROWS_P: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
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
    first_chunk = first_chunk_of(row, num_R, ROWS_P)
    dtype = qkv_ptr.dtype.element_ty
    l_L, h_H = tl.arange(0, CHUNK), tl.arange(0, KEY_P)
    i_A = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    is_A = (i_A < VALUE)[None, :]
    at_HA = head * KEY * VALUE + h_H[:, None] * VALUE + i_A[None, :]
    is_HA, size = (h_H < KEY)[:, None] & is_A, NUM_HEADS * KEY * VALUE
    is_new = tl.load(is_new_ptr + row) != 0
    from_at = state_ptr + tl.load(from_ptr + row) * size + at_HA
    state_HA = tl.load(from_at, mask=is_HA & ~is_new, other=0.0).to(tl.float32)
    key_at = head // (NUM_HEADS // KEY_HEADS) * KEY
    for chunk in range(tl.cdiv(end - start, CHUNK)):
        token_L = (start + chunk * CHUNK + l_L).to(tl.int64)
        inside_L = token_L < end
        at_L = (first_chunk.to(tl.int64) + chunk) * (NUM_HEADS * CHUNK) + head * CHUNK + l_L
        total_L = tl.load(total_ptr + at_L)
        whole = tl.sum(tl.where(l_L == CHUNK - 1, total_L, 0.0), 0)
        read_LH = rows_of(read_ptr + at_L * KEY, l_L >= 0, KEY, KEY_P)
        written_at = written_ptr + at_L[:, None] * VALUE + i_A[None, :]
        written_LA = tl.load(written_at, mask=is_A, other=0.0).to(tl.float32)
        scores_LL = tl.load(scores_ptr + at_L[:, None] * CHUNK + l_L[None, :])
        q_at_L = qkv_ptr + token_L * qkv_stride + key_at
        q_LH = _unit_rows(rows_of(q_at_L, inside_L, KEY, KEY_P), KEY**-0.5)
        k_at_L = q_at_L + KEY_HEADS * KEY
        k_LH = _unit_rows(rows_of(k_at_L, inside_L, KEY, KEY_P), 1.0)
        old_HA = state_HA.to(dtype)
        value_LA = (written_LA - _dot(read_LH, old_HA, PRECISION, UPCAST)).to(dtype)
        q_LH = (q_LH * tl.exp(total_L)[:, None]).to(dtype)
        out_LA = _dot(q_LH, old_HA, PRECISION, UPCAST)
        out_LA += _dot(scores_LL, value_LA, PRECISION, UPCAST)
        out_at = out_ptr + (token_L[:, None] * NUM_HEADS + head) * VALUE + i_A[None, :]
        tl.store(out_at, out_LA, mask=inside_L[:, None] & is_A)
        k_HL = tl.trans((k_LH * tl.exp(whole - total_L)[:, None]).to(dtype))
        state_HA = state_HA * tl.exp(whole) + _dot(k_HL, value_LA, PRECISION, UPCAST)
    tl.store(state_ptr + tl.load(to_ptr + row) * size + at_HA, state_HA, mask=is_HA)


@triton.jit
def delta_tokens_kernel(
    qkv_ptr,  # [T, C]
    ba_ptr,  # [T, J]
    a_log_ptr,  # [V] fp32
    dt_bias_ptr,  # [V] fp32
    state_ptr,  # [X, V, H, I], updated
    q_start_ptr,  # [R + 1] int32
    from_ptr,  # [R] int64
    is_new_ptr,  # [R] bool
    to_ptr,  # [T] int64
    out_ptr,  # [T, V, I], written
    qkv_stride,
    ba_stride,
    KEY_HEADS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    KEY: tl.constexpr,
    KEY_P: tl.constexpr,
    VALUE: tl.constexpr,
    VALUES: tl.constexpr,
    PDL: tl.constexpr,
):
    """A row's tokens one by one, for VALUES values of a head; the state after each is stored."""
    wait_for_earlier_kernels(PDL)
    head, row = tl.program_id(1), tl.program_id(2)
    h_H = tl.arange(0, KEY_P)
    i_A = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    is_h, is_a = h_H < KEY, i_A < VALUE
    at_HA = head * KEY * VALUE + h_H[:, None] * VALUE + i_A[None, :]
    is_HA, size = is_h[:, None] & is_a[None, :], NUM_HEADS * KEY * VALUE
    is_new = tl.load(is_new_ptr + row) != 0
    from_at = state_ptr + tl.load(from_ptr + row) * size + at_HA
    state_HA = tl.load(from_at, mask=is_HA & ~is_new, other=0.0).to(tl.float32)
    a_log, dt_bias = tl.load(a_log_ptr + head), tl.load(dt_bias_ptr + head)
    start = tl.load(q_start_ptr + row)
    row_at = qkv_ptr + start.to(tl.int64) * qkv_stride
    for token in range(start, tl.load(q_start_ptr + row + 1)):
        x_at = row_at + (token - start) * qkv_stride
        q_at = x_at + head // (NUM_HEADS // KEY_HEADS) * KEY
        q_H = tl.load(q_at + h_H, mask=is_h, other=0.0).to(tl.float32)
        k_H = tl.load(q_at + KEY_HEADS * KEY + h_H, mask=is_h, other=0.0).to(tl.float32)
        v_at = x_at + 2 * KEY_HEADS * KEY + head * VALUE
        v_A = tl.load(v_at + i_A, mask=is_a, other=0.0).to(tl.float32)
        q_H = q_H * (tl.rsqrt(tl.sum(q_H * q_H, 0) + NORM_EPS) * KEY**-0.5)
        k_H = k_H * tl.rsqrt(tl.sum(k_H * k_H, 0) + NORM_EPS)
        ba_at = ba_ptr + token * ba_stride + head
        log_decay, beta = decay_and_beta(ba_at, a_log, dt_bias, NUM_HEADS, True)
        state_HA = next_state(state_HA, k_H, v_A, log_decay, beta)
        tl.store(state_ptr + tl.load(to_ptr + token) * size + at_HA, state_HA, mask=is_HA)
        o_A = tl.sum(state_HA * q_H[:, None], 0)
        tl.store(out_ptr + (token * NUM_HEADS + head) * VALUE + i_A, o_A, mask=is_a)


def precision_of(device: torch.device) -> str:
    """The precision of products of fp32: nearly fp32's, on the matrix units if they can."""
    return "tf32x3" if device.type == "cuda" and torch.version.hip is None else "ieee"


def warps_of_prepare(key_size: int, value_size: int) -> int:
    """Warps of a program that prepares a chunk. Four multiply by warpgroups (wgmma), in half the
    time; with heads smaller than 128 Triton 3.6 then reads shared memory that is not there."""
    return NUM_WARPS if min(key_size, value_size) >= 128 else 2 * NUM_WARPS


def gated_delta(
    qkv_TC: Tensor,
    ba_TJ: Tensor,
    a_log_V: Tensor,
    dt_bias_V: Tensor,
    state_XVHI: Tensor,
    q_start_S: Tensor,
    from_R: Tensor,
    is_new_R: Tensor,
    to_R: Tensor | None = None,
    to_T: Tensor | None = None,
) -> Tensor:
    """See `reference.gated_delta.gated_delta`."""
    qkv_TC, ba_TJ = by_rows(qkv_TC), by_rows(ba_TJ)
    num_tokens, num_rows, device = len(qkv_TC), len(from_R), qkv_TC.device
    _, num_heads, key, value = state_XVHI.shape
    of_heads, options = sizes(qkv_TC, state_XVHI), launch_options(device)
    of_heads["KEY_P"] = max(16, of_heads["KEY_P"])
    values = values_of_program(value)
    out_TVI = qkv_TC.new_empty((num_tokens, num_heads, value))
    grid = (triton.cdiv(value, values), num_heads, num_rows)
    gates = (ba_TJ, a_log_V, dt_bias_V)
    places = (q_start_S, from_R, is_new_R)
    if to_R is None:
        delta_tokens_kernel[grid](
            qkv_TC, *gates, state_XVHI, *places, to_T, out_TVI, qkv_TC.stride(0), ba_TJ.stride(0),
            **of_heads, VALUES=values, num_warps=NUM_WARPS, **options,
        )  # fmt: skip
        zero_padding_(out_TVI, q_start_S)
        return out_TVI
    if not takes_chunks(qkv_TC.dtype, device):
        return chunked.gated_delta(qkv_TC, *gates, state_XVHI, *places, to_R)
    num_chunks = num_tokens // CHUNK + num_rows
    of_chunks = {
        **of_heads,
        "ROWS_P": triton.next_power_of_2(num_rows),
        "CHUNK": CHUNK,
        "PRECISION": precision_of(device),
        "UPCAST": device.type != "cuda",
    }
    per_token = (num_chunks, num_heads, CHUNK)
    prepared = [qkv_TC.new_empty((*per_token, size)) for size in (value, key, CHUNK)]
    prepared.append(qkv_TC.new_empty(per_token, dtype=torch.float32))
    prepare_chunks_kernel[(num_heads, num_chunks)](
        qkv_TC, *gates, q_start_S, *prepared, qkv_TC.stride(0), ba_TJ.stride(0), num_rows,
        **of_chunks, VALUE_P=max(16, triton.next_power_of_2(value)),
        num_warps=warps_of_prepare(key, value), **options,
    )  # fmt: skip
    scan_chunks_kernel[grid](
        qkv_TC, *prepared, state_XVHI, *places, to_R, out_TVI, qkv_TC.stride(0), num_rows,
        **of_chunks, VALUES=values, num_warps=NUM_WARPS, num_stages=NUM_STAGES, **options,
    )  # fmt: skip
    zero_padding_(out_TVI, q_start_S)
    return out_TVI
