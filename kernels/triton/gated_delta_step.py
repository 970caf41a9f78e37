"""The gated delta rule of decode steps in Triton: convolution, gates, rule and norm in one launch.

A program takes one value head of one row, with its whole state in registers: it reads and writes
the state once, which is nearly all the memory that it moves. The inputs of queries and keys are
convolved again for each value head of a key head. That is safe although the state of the
convolution is updated in place: a token's input replaces one that no program of this step reads.

Shapes: those of `reference.gated_delta`; "p" after a letter: padded to a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.triton.common import launch_options, wait_for_earlier_kernels

NUM_WARPS = 8
NORM_EPS = tl.constexpr(reference.gated_delta.NORM_EPS)


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def decay_and_beta(ba_at, a_log, dt_bias, NUM_HEADS: tl.constexpr, mask):
    """(log α, β) of a value head: see `reference.gated_delta.gates`. `ba_at` points to its b."""
    b = tl.load(ba_at, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(ba_at + NUM_HEADS, mask=mask, other=0.0).to(tl.float32) + dt_bias
    rate = tl.maximum(a, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(a)))
    return -tl.exp(a_log) * rate, 1.0 / (1.0 + tl.exp(-b))


@triton.jit
def next_state(state_HI, k_H, v_I, log_decay, beta):
    """See `reference.gated_delta.next_state`."""
    state_HI = state_HI * tl.exp(log_decay)
    delta_I = (v_I - tl.sum(state_HI * k_H[:, None], 0)) * beta
    return state_HI + k_H[:, None] * delta_I[None, :]


@triton.jit
def convolve(x_at, weight_ptr, from_at, to_at, channel, mask, pos, moves, stores,
             CHANNELS: tl.constexpr, TAPS: tl.constexpr):  # fmt: skip
    """silu of the convolution of some channels of one token, and the state after it.

    The token's input is stored if `stores`, and the inputs before it too if the state `moves` to
    another place.
    """
    x = tl.load(x_at + channel, mask=mask, other=0.0)
    weight_at = weight_ptr + channel * TAPS + TAPS - 1
    total = x.to(tl.float32) * tl.load(weight_at, mask=mask, other=0.0).to(tl.float32)
    for shift in tl.static_range(1, TAPS):
        at = (pos + TAPS - shift) % TAPS * CHANNELS + channel
        kept = tl.load(from_at + at, mask=mask & (pos >= shift), other=0.0)
        weight = tl.load(weight_at - shift, mask=mask, other=0.0).to(tl.float32)
        total += kept.to(x.dtype).to(tl.float32) * weight
        tl.store(to_at + at, kept, mask=mask & stores & moves)
    tl.store(to_at + pos % TAPS * CHANNELS + channel, x, mask=mask & stores)
    return silu(total.to(x.dtype).to(tl.float32)).to(x.dtype).to(tl.float32)


@triton.jit
def gated_delta_step_kernel(
    qkv_ptr,  # [R, C]
    z_ptr,  # [R, P]
    ba_ptr,  # [R, J]
    conv_ptr,  # [C, W]
    a_log_ptr,  # [V] fp32
    dt_bias_ptr,  # [V] fp32
    norm_ptr,  # [I]
    conv_state_ptr,  # [X, W, C], updated
    state_ptr,  # [X, V, H, I], updated
    seq_len_ptr,  # [R] int32
    from_ptr,  # [R] int64
    is_new_ptr,  # [R] bool
    to_ptr,  # [R] int64
    out_ptr,  # [R, P], written
    qkv_stride,
    z_stride,
    ba_stride,
    eps,
    KEY_HEADS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    KEY: tl.constexpr,
    KEY_P: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_P: tl.constexpr,
    TAPS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    repeats: tl.constexpr = NUM_HEADS // KEY_HEADS
    keys: tl.constexpr = KEY_HEADS * KEY
    channels: tl.constexpr = 2 * keys + NUM_HEADS * VALUE
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    from_place, to_place = tl.load(from_ptr + row), tl.load(to_ptr + row)
    is_new = tl.load(is_new_ptr + row) != 0
    h_H, i_I = tl.arange(0, KEY_P), tl.arange(0, VALUE_P)
    is_h, is_i = h_H < KEY, i_I < VALUE
    at_HI = h_H[:, None] * VALUE + i_I[None, :]
    is_HI = is_h[:, None] & is_i[None, :]
    state_at = state_ptr + head * KEY * VALUE + at_HI
    size: tl.constexpr = NUM_HEADS * KEY * VALUE
    # what is stored for a new row may be anything
    state_HI = tl.load(state_at + from_place * size, mask=is_HI & ~is_new, other=0.0)

    pos = tl.load(seq_len_ptr + row) - 1
    moves, is_first = from_place != to_place, head % repeats == 0
    x_at = qkv_ptr + row * qkv_stride
    from_at = conv_state_ptr + from_place * TAPS * channels
    to_at = conv_state_ptr + to_place * TAPS * channels
    q_at = head // repeats * KEY + h_H
    q_H = convolve(x_at, conv_ptr, from_at, to_at, q_at, is_h, pos, moves, is_first, channels, TAPS)
    k_H = convolve(
        x_at, conv_ptr, from_at, to_at, keys + q_at, is_h, pos, moves, is_first, channels, TAPS
    )
    v_at = 2 * keys + head * VALUE + i_I
    v_I = convolve(x_at, conv_ptr, from_at, to_at, v_at, is_i, pos, moves, True, channels, TAPS)
    q_H = q_H * (tl.rsqrt(tl.sum(q_H * q_H, 0) + NORM_EPS) * KEY**-0.5)
    k_H = k_H * tl.rsqrt(tl.sum(k_H * k_H, 0) + NORM_EPS)
    log_decay, beta = decay_and_beta(
        ba_ptr + row * ba_stride + head, tl.load(a_log_ptr + head), tl.load(dt_bias_ptr + head),
        NUM_HEADS, True,
    )  # fmt: skip
    state_HI = next_state(state_HI.to(tl.float32), k_H, v_I, log_decay, beta)
    tl.store(state_at + to_place * size, state_HI, mask=is_HI)

    out_at = head * VALUE + i_I
    z_I = tl.load(z_ptr + row * z_stride + out_at, mask=is_i, other=0.0)
    o_I = tl.sum(state_HI * q_H[:, None], 0).to(z_I.dtype).to(tl.float32)
    scale = tl.rsqrt(tl.sum(o_I * o_I, 0) / VALUE + eps)
    norm_I = tl.load(norm_ptr + i_I, mask=is_i, other=0.0)
    y_I = ((o_I * scale).to(z_I.dtype).to(tl.float32) * norm_I.to(tl.float32)).to(z_I.dtype)
    y_I = y_I.to(tl.float32) * silu(z_I.to(tl.float32))
    tl.store(out_ptr + row * NUM_HEADS * VALUE + out_at, y_I, mask=is_i)


def sizes(qkv_TC: Tensor, state_XVHI: Tensor) -> dict[str, int]:
    """The constants of kernels that follow from the heads."""
    _, num_heads, key, value = state_XVHI.shape
    return {
        "KEY_HEADS": (qkv_TC.shape[1] - num_heads * value) // (2 * key),
        "NUM_HEADS": num_heads,
        "KEY": key,
        "KEY_P": triton.next_power_of_2(key),
        "VALUE": value,
    }


def by_rows(x: Tensor) -> Tensor:
    """The same numbers with the columns of a row next to each other."""
    return x if x.stride(1) == 1 else x.contiguous()


def gated_delta_step(
    qkv_RC: Tensor,
    z_RP: Tensor,
    ba_RJ: Tensor,
    conv_CW: Tensor,
    a_log_V: Tensor,
    dt_bias_V: Tensor,
    norm_I: Tensor,
    eps: float,
    conv_state_XWC: Tensor,
    state_XVHI: Tensor,
    seq_len_R: Tensor,
    from_R: Tensor,
    is_new_R: Tensor,
    to_R: Tensor,
) -> Tensor:
    """See `reference.gated_delta.gated_delta_step`."""
    qkv_RC, z_RP, ba_RJ = by_rows(qkv_RC), by_rows(z_RP), by_rows(ba_RJ)
    num_rows, num_heads = len(qkv_RC), state_XVHI.shape[1]
    out_RP = torch.empty(z_RP.shape, dtype=z_RP.dtype, device=z_RP.device)
    gated_delta_step_kernel[(num_heads, num_rows)](
        qkv_RC,
        z_RP,
        ba_RJ,
        conv_CW.contiguous(),
        a_log_V,
        dt_bias_V,
        norm_I,
        conv_state_XWC,
        state_XVHI,
        seq_len_R,
        from_R,
        is_new_R,
        to_R,
        out_RP,
        qkv_RC.stride(0),
        z_RP.stride(0),
        ba_RJ.stride(0),
        eps,
        **sizes(qkv_RC, state_XVHI),
        VALUE_P=triton.next_power_of_2(state_XVHI.shape[3]),
        TAPS=conv_CW.shape[1],
        num_warps=NUM_WARPS,
        **launch_options(qkv_RC.device),
    )
    return out_RP
