"""The recurrence of Mamba-2 in decode steps in Triton: a state is read and written once.

A program takes some values of one head of one row, with their states in registers.

Shapes: those of `reference.ssd`; "p" after a letter: padded to a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import launch_options, wait_for_earlier_kernels
from nanovllm.kernels.triton.gated_delta_step import by_rows

STATES, NUM_WARPS = 8192, 4  # numbers of a program's states


@triton.jit
def next_state(
    state_HI, x_at, head, i_I, dt, log_decay, NUM_HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr, STATE: tl.constexpr, STATE_P: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """(`reference.ssd.next_state`, the results) of values i of one head, whose token's channels
    begin at `x_at`."""
    h_H = tl.arange(0, STATE_P)
    x_I = tl.load(x_at + head * HEAD + i_I, mask=i_I < HEAD, other=0.0).to(tl.float32)
    b_at = x_at + NUM_HEADS * HEAD + head // HEADS_PER_GROUP * STATE + h_H
    b_H = tl.load(b_at, mask=h_H < STATE, other=0.0).to(tl.float32)
    c_at = b_at + NUM_HEADS // HEADS_PER_GROUP * STATE
    c_H = tl.load(c_at, mask=h_H < STATE, other=0.0).to(tl.float32)
    state_HI = state_HI * tl.exp(log_decay) + b_H[:, None] * (x_I * dt)[None, :]
    return state_HI, tl.sum(state_HI * c_H[:, None], 0)


@triton.jit
def ssd_step_kernel(
    xbc_ptr,  # [R, C]
    dt_ptr,  # [R, V] fp32
    log_decay_ptr,  # [R, V] fp32
    state_ptr,  # [X, V, H, I], updated
    from_ptr,  # [R] int64
    is_new_ptr,  # [R] bool
    to_ptr,  # [R] int64
    out_ptr,  # [R, V, I] fp32, written
    xbc_stride,
    NUM_HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    STATE: tl.constexpr,
    STATE_P: tl.constexpr,
    HEAD: tl.constexpr,
    VALUES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    h_H = tl.arange(0, STATE_P)
    i_I = tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    is_h, is_i = h_H < STATE, i_I < HEAD
    is_HI = is_h[:, None] & is_i[None, :]
    state_at = state_ptr + head * STATE * HEAD + h_H[:, None] * HEAD + i_I[None, :]
    size: tl.constexpr = NUM_HEADS * STATE * HEAD
    # what is stored for a new row may be anything
    is_new = tl.load(is_new_ptr + row) != 0
    from_at = state_at + tl.load(from_ptr + row) * size
    state_HI = tl.load(from_at, mask=is_HI & ~is_new, other=0.0).to(tl.float32)
    state_HI, y_I = next_state(
        state_HI, xbc_ptr + row * xbc_stride, head, i_I,
        tl.load(dt_ptr + row * NUM_HEADS + head), tl.load(log_decay_ptr + row * NUM_HEADS + head),
        NUM_HEADS, HEADS_PER_GROUP, STATE, STATE_P, HEAD,
    )  # fmt: skip
    tl.store(state_at + tl.load(to_ptr + row) * size, state_HI, mask=is_HI)
    tl.store(out_ptr + (row * NUM_HEADS + head) * HEAD + i_I, y_I, mask=is_i)


def values_of_step(state_size: int, head_size: int) -> int:
    """How many values of a head a program takes: a power of two."""
    most = max(1, STATES // triton.next_power_of_2(state_size))
    return int(min(triton.next_power_of_2(head_size), most))


def sizes(xbc_TC: Tensor, state_XVHI: Tensor) -> dict[str, int]:
    """The constants of kernels that follow from the heads."""
    _, num_heads, state_size, head_size = state_XVHI.shape
    num_groups = (xbc_TC.shape[1] - num_heads * head_size) // (2 * state_size)
    return {
        "NUM_HEADS": num_heads,
        "HEADS_PER_GROUP": num_heads // num_groups,
        "STATE": state_size,
        "STATE_P": triton.next_power_of_2(state_size),
        "HEAD": head_size,
    }


def ssd_step(
    xbc_RC: Tensor,
    dt_RV: Tensor,
    log_decay_RV: Tensor,
    state_XVHI: Tensor,
    from_R: Tensor,
    is_new_R: Tensor,
    to_R: Tensor,
) -> Tensor:
    """See `reference.ssd.ssd_step`."""
    xbc_RC = by_rows(xbc_RC)
    num_rows = len(xbc_RC)
    _, num_heads, state_size, head_size = state_XVHI.shape
    values = values_of_step(state_size, head_size)
    out_RVI = torch.empty(
        (num_rows, num_heads, head_size), dtype=torch.float32, device=xbc_RC.device
    )
    ssd_step_kernel[(num_heads, num_rows, triton.cdiv(head_size, values))](
        xbc_RC,
        dt_RV.contiguous(),
        log_decay_RV.contiguous(),
        state_XVHI,
        from_R,
        is_new_R,
        to_R,
        out_RVI,
        xbc_RC.stride(0),
        **sizes(xbc_RC, state_XVHI),
        VALUES=values,
        num_warps=NUM_WARPS,
        **launch_options(xbc_RC.device),
    )
    return out_RVI
