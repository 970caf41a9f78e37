"""The tokens that top_k, top_p and min_p leave, in Triton and without sorting.

What the filters leave is the beginning of the tokens in order (logit descending, id ascending), so the last of them
tells it all. Sorting 256 rows of 151,936 logits to find it moves gigabytes. Here a program has a row and asks, for a value in
question, how many tokens and how much probability lie above it, and which values are next to it on both sides. By
bisection, in which every answer snaps to a value that is there, some ten readings of the row find the smallest value that
stays. Rows lie in the L2. Sums run in a fixed order, so every run gives the same tokens. Not yet timed on a GPU.

Shapes: R rows | V vocabulary | N tokens of a tile
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton_common import launch_options, wait_for_earlier_kernels

TILE = 2048
INFINITY = tl.constexpr(float("inf"))
LARGEST = tl.constexpr(3.0e38)  # finite, as halves and differences have to be


@triton.jit
def _load(row_at, token_N, vocab_size):
    """Logits, −inf beyond the vocabulary and for NaN, which never wins, and LARGEST for inf."""
    x_N = tl.load(row_at + token_N, mask=token_N < vocab_size, other=-INFINITY).to(tl.float32)
    return tl.where(x_N == x_N, tl.minimum(x_N, LARGEST), -INFINITY)


@triton.jit
def _scan(row_at, vocab_size, value, best, TILE: tl.constexpr):
    """Of the tokens above a value: how many, and their probability in units of the best one's. The largest logit that is
    not above it (−inf: there is none), and the smallest that is (inf)."""
    lane_N = tl.arange(0, TILE)
    count_N = tl.zeros((TILE,), tl.int32)
    mass_N = tl.zeros((TILE,), tl.float32)
    below_N = tl.full((TILE,), -INFINITY, tl.float32)
    next_N = tl.full((TILE,), INFINITY, tl.float32)
    for tile in range(tl.cdiv(vocab_size, TILE)):
        x_N = _load(row_at, tile * TILE + lane_N, vocab_size)
        is_above_N = x_N > value
        count_N += is_above_N.to(tl.int32)
        mass_N += tl.where(is_above_N, tl.exp(x_N - best), 0.0)
        below_N = tl.where(is_above_N, below_N, tl.maximum(below_N, x_N))
        next_N = tl.where(is_above_N, tl.minimum(next_N, x_N), next_N)
    return tl.sum(count_N, 0), tl.sum(mass_N, 0), tl.max(below_N, 0), tl.min(next_N, 0)


@triton.jit
def _just_below(value):
    """The next smaller number in fp32."""
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(value > 0, bits - 1, tl.where(value < 0, bits + 1, -2147483647))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _search(row_at, vocab_size, low, best, target, BY_MASS: tl.constexpr, TILE: tl.constexpr):
    """(value, total): the smallest logit with a total above it of less than `target`, and that total.

    Totals are probability with BY_MASS, else numbers of tokens. All logits up to `low` are known to have more; −inf: nothing
    is known.
    """
    high = best
    total_high, step = 0.0, 8.0  # at first the k-th is looked for so far below the best
    is_done = low >= high
    while not is_done:
        is_open = low == -INFINITY
        middle = tl.where(is_open, tl.maximum(best - step, -LARGEST), low * 0.5 + high * 0.5)
        middle = tl.where(middle < high, middle, tl.where(is_open, _just_below(high), low))
        count, mass, below, following = _scan(row_at, vocab_size, middle, best, TILE)
        total = mass
        if not BY_MASS:
            total = count.to(tl.float32)
        stays = total < target
        if stays & (below > low):
            high = below
            total_high = total
            step = tl.minimum(tl.maximum(2.0 * step, 2.0 * (best - below)), LARGEST)
        else:
            # up to `middle` either too much lies above, or nothing is there
            is_done = following >= high
            low = middle
    return high, total_high


@triton.jit
def _nth_token(row_at, vocab_size, value, num, TILE: tl.constexpr):
    """The id of the num-th token with this logit, or of the last one if they are fewer."""
    lane_N = tl.arange(0, TILE)
    num_before = 0
    found = -1
    for tile in range(tl.cdiv(vocab_size, TILE)):
        token_N = tile * TILE + lane_N
        is_value_N = (_load(row_at, token_N, vocab_size) == value) & (token_N < vocab_size)
        count = tl.sum(is_value_N.to(tl.int32), 0)
        if (count > 0) & (num_before < num):
            rank_N = num_before + tl.cumsum(is_value_N.to(tl.int32), 0)
            found = tl.max(tl.where(is_value_N & (rank_N <= num), token_N, -1), 0)
        num_before += count
    return found


@triton.jit
def _least(row_at, vocab_size, log_vocab_size, top_k, top_p, min_p, TILE: tl.constexpr):
    """(logit, id) of the last token that stays."""
    everything = vocab_size.to(tl.float32)
    _, _, best, _ = _scan(row_at, vocab_size, INFINITY, INFINITY, TILE)
    # `value` and `num`: the smallest logit that stays, and how many tokens that have it do
    value, num = best - INFINITY, everything
    if min_p > 0:
        _, _, _, value = _scan(row_at, vocab_size, _just_below(best + tl.log(min_p)), best, TILE)
    if (top_k > 0) & (top_k < everything):
        kth, num_above = _search(row_at, vocab_size, best - INFINITY, best, top_k, False, TILE)
        if kth >= value:
            value, num = kth, top_k - num_above
    if top_p < 1:
        lowest = value
        count_above, mass_above, _, _ = _scan(row_at, vocab_size, lowest, best, TILE)
        mass = mass_above
        if lowest > -INFINITY:
            count, _, _, _ = _scan(row_at, vocab_size, _just_below(lowest), best, TILE)
            mass += tl.minimum((count - count_above).to(tl.float32), num) * tl.exp(lowest - best)
        target = top_p * mass
        # all tokens so far down have less than the rest of the probability together
        low = best - (log_vocab_size - tl.log(1.0 - top_p))
        if lowest > -INFINITY:
            low = tl.maximum(low, _just_below(lowest))
        value, total = _search(row_at, vocab_size, low, best, target, True, TILE)
        needed = tl.maximum(tl.ceil((target - total) / tl.exp(value - best)), 1.0)
        num = tl.where(value == lowest, tl.minimum(num, needed), needed)
    if value == -INFINITY:  # there was nothing above it, or nothing to leave out
        _, _, _, value = _scan(row_at, vocab_size, -INFINITY, best, TILE)
    num = tl.minimum(num, everything).to(tl.int32)
    return value, _nth_token(row_at, vocab_size, value, num, TILE)


@triton.jit(do_not_specialize=["vocab_size"])
def keep_likely_kernel(
    logits_ptr,  # [R, V]
    top_k_ptr,  # [R] fp32
    top_p_ptr,  # [R] fp32
    min_p_ptr,  # [R] fp32
    out_ptr,  # [R, V], written
    logits_stride,
    vocab_size,
    log_vocab_size,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    row_idx = tl.program_id(0).to(tl.int64)
    top_k, top_p, min_p = tl.load(top_k_ptr + row_idx), tl.load(top_p_ptr + row_idx), tl.load(min_p_ptr + row_idx)
    row_at = logits_ptr + row_idx * logits_stride
    # the smallest logit that stays, and the last token that stays of those that have it
    value, last = -float("inf"), vocab_size
    if (top_k > 0) | (top_p < 1) | (min_p > 0):
        value, last = _least(row_at, vocab_size, log_vocab_size, top_k, top_p, min_p, TILE)
    lane_N = tl.arange(0, TILE)
    for tile in range(tl.cdiv(vocab_size, TILE)):
        token_N = tile * TILE + lane_N
        x_N = tl.load(row_at + token_N, mask=token_N < vocab_size, other=-INFINITY)
        is_out_N = (x_N < value) | ((x_N == value) & (token_N > last))
        out_N = tl.where(is_out_N, -INFINITY, x_N.to(tl.float32)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row_idx * vocab_size + token_N, out_N, mask=token_N < vocab_size)


def keep_likely(logits_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor) -> Tensor:
    """`reference.keep_likely`; where a sum of probabilities is within rounding of top_p, a token more or less may stay."""
    num_rows, vocab_size = logits_RV.shape
    out_RV = torch.empty((num_rows, vocab_size), dtype=logits_RV.dtype, device=logits_RV.device)
    if num_rows == 0:
        return out_RV
    logits_RV = logits_RV if logits_RV.stride(1) == 1 else logits_RV.contiguous()
    keep_likely_kernel[(num_rows,)](
        logits_RV,
        top_k_R.float().contiguous(),
        top_p_R.float().contiguous(),
        min_p_R.float().contiguous(),
        out_RV,
        logits_RV.stride(0),
        vocab_size,
        math.log(vocab_size),
        TILE=TILE,
        num_warps=8,
        **launch_options(logits_RV.device),
    )
    return out_RV
