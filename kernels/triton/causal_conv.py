"""The short causal convolution of prompts in Triton: two launches, results and states.

Shapes: those of `reference.gated_delta`; "p" after a letter: padded to a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import launch_options, wait_for_earlier_kernels
from nanovllm.kernels.triton.gated_delta_step import by_rows, silu

TOKENS, CHANNELS, NUM_WARPS = 32, 128, 8  # of one program
STATE_CHANNELS = 1024


@triton.jit
def causal_conv_kernel(
    x_ptr,  # [T, C]
    weight_ptr,  # [C, W]
    state_ptr,  # [X, W, C]
    seq_len_ptr,  # [R] int32
    q_start_ptr,  # [R + 1] int32
    from_ptr,  # [R] int64
    bias_ptr,  # [C] with BIASED, else anything
    out_ptr,  # [T, C], written
    num_tokens,
    num_rows,
    x_stride,
    num_channels,
    TAPS: tl.constexpr,
    ROWS_P: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BIASED: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    token_T = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel_C = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = (channel_C < num_channels)[None, :]
    row_R = tl.arange(0, ROWS_P)
    end_R = tl.load(q_start_ptr + 1 + row_R, mask=row_R < num_rows, other=2147483647)
    row_T = tl.sum((end_R[None, :] <= token_T[:, None]).to(tl.int32), 1)
    is_real_T = row_T < num_rows
    start_T = tl.load(q_start_ptr + row_T, mask=is_real_T, other=0)
    end_T = tl.load(q_start_ptr + row_T + 1, mask=is_real_T, other=0)
    idx_T = token_T - start_T
    before_T = tl.load(seq_len_ptr + row_T, mask=is_real_T, other=0) - (end_T - start_T)
    pos_T = before_T + idx_T
    from_T = tl.load(from_ptr + row_T, mask=is_real_T, other=0)
    total = tl.zeros([TOKENS, CHANNELS], tl.float32)
    if BIASED:
        bias_C = tl.load(bias_ptr + channel_C, mask=channel_C < num_channels, other=0.0)
        total += tl.where(is_real_T[:, None], bias_C.to(tl.float32)[None, :], 0.0)
    for shift in tl.static_range(TAPS):
        is_own = (is_real_T & (idx_T >= shift))[:, None] & is_channel
        own_at = x_ptr + (token_T - shift).to(tl.int64)[:, None] * x_stride + channel_C[None, :]
        own = tl.load(own_at, mask=is_own, other=0.0).to(tl.float32)
        is_kept = (is_real_T & (idx_T < shift) & (pos_T >= shift))[:, None] & is_channel
        place_T = from_T * TAPS + (pos_T + TAPS - shift) % TAPS
        kept_at = state_ptr + place_T[:, None] * num_channels + channel_C[None, :]
        kept = tl.load(kept_at, mask=is_kept, other=0.0).to(out_ptr.dtype.element_ty)
        weight_at = weight_ptr + channel_C * TAPS + TAPS - 1 - shift
        weight_C = tl.load(weight_at, mask=channel_C < num_channels, other=0.0).to(tl.float32)
        total += (own + kept.to(tl.float32)) * weight_C[None, :]
    y = silu(total.to(out_ptr.dtype.element_ty).to(tl.float32))
    out_at = out_ptr + token_T.to(tl.int64)[:, None] * num_channels + channel_C[None, :]
    tl.store(out_at, y, mask=(token_T < num_tokens)[:, None] & is_channel)


@triton.jit
def conv_state_kernel(
    x_ptr,  # [T, C]
    state_ptr,  # [X, W, C], updated
    seq_len_ptr,  # [R] int32
    q_start_ptr,  # [R + 1] int32
    from_ptr,  # [R] int64
    to_ptr,  # [R] or, with EACH, [T] int64
    x_stride,
    num_channels,
    TAPS: tl.constexpr,
    EACH: tl.constexpr,
    CHANNELS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The states of some channels of a row. A row's last token alone may write to the place that is
    read, and all its inputs are read before they are written."""
    wait_for_earlier_kernels(PDL)
    row = tl.program_id(0)
    channel_C = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel_C < num_channels
    start, end = tl.load(q_start_ptr + row), tl.load(q_start_ptr + row + 1)
    before = tl.load(seq_len_ptr + row) - (end - start)
    from_at = state_ptr + tl.load(from_ptr + row) * TAPS * num_channels + channel_C
    x_at = x_ptr + start.to(tl.int64) * x_stride + channel_C
    first = start
    if not EACH:
        first = tl.maximum(start, end - 1)
    for token in range(first, end):
        idx = token - start
        pos = before + idx
        place = tl.load(to_ptr + (token if EACH else row))
        to_at = state_ptr + place * TAPS * num_channels + channel_C
        taps = ()
        for shift in tl.static_range(TAPS):
            own_at = x_at + (idx - shift) * x_stride
            own = tl.load(own_at, mask=is_channel & (idx >= shift), other=0.0)
            is_kept = is_channel & (idx < shift) & (pos >= shift)
            kept_at = from_at + (pos + TAPS - shift) % TAPS * num_channels
            kept = tl.load(kept_at, mask=is_kept, other=0.0)
            taps += (tl.where(idx >= shift, own.to(kept.dtype), kept),)
        for shift in tl.static_range(TAPS):
            at = to_at + (pos + TAPS - shift) % TAPS * num_channels
            tl.store(at, taps[shift], mask=is_channel)


def causal_conv(
    x_TC: Tensor,
    weight_CW: Tensor,
    state_XWC: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    from_R: Tensor,
    to_R: Tensor | None = None,
    to_T: Tensor | None = None,
    bias_C: Tensor | None = None,
) -> Tensor:
    """See `reference.gated_delta.causal_conv`."""
    x_TC, to = by_rows(x_TC), to_T if to_R is None else to_R
    num_tokens, num_channels = x_TC.shape
    num_rows, num_taps = len(from_R), weight_CW.shape[1]
    options = launch_options(x_TC.device)
    out_TC = torch.empty(x_TC.shape, dtype=x_TC.dtype, device=x_TC.device)
    grid = (triton.cdiv(num_tokens, TOKENS), triton.cdiv(num_channels, CHANNELS))
    causal_conv_kernel[grid](
        x_TC,
        weight_CW.contiguous(),
        state_XWC,
        seq_len_R,
        q_start_S,
        from_R,
        weight_CW if bias_C is None else bias_C,
        out_TC,
        num_tokens,
        num_rows,
        x_TC.stride(0),
        num_channels,
        TAPS=num_taps,
        ROWS_P=triton.next_power_of_2(num_rows),
        TOKENS=TOKENS,
        CHANNELS=CHANNELS,
        BIASED=bias_C is not None,
        num_warps=NUM_WARPS,
        **options,
    )
    conv_state_kernel[(num_rows, triton.cdiv(num_channels, STATE_CHANNELS))](
        x_TC,
        state_XWC,
        seq_len_R,
        q_start_S,
        from_R,
        to,
        x_TC.stride(0),
        num_channels,
        TAPS=num_taps,
        EACH=to_R is None,
        CHANNELS=STATE_CHANNELS,
        num_warps=NUM_WARPS,
        **options,
    )
    return out_TC
