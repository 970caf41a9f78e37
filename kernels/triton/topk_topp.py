"""Masks the logits of tokens outside top_k, top_p and min_p, in Triton and without sorting.

The filters leave the first tokens in the order (logit descending, id ascending), so the last of
these tokens defines the result. Sorting 256 rows of 151,936 logits to find it would move gigabytes.
Here each program takes one row:

- It searches for a value below all tokens that can stay and above most others, and copies the
  tokens above it. The first try mostly succeeds. Without such a value it works on the whole row.
- It finds the smallest logit that stays by bisection. A step counts the tokens above a value, sums
  their probability, and finds the next logit on both sides, so bounds are always logits that occur.

Sums are in a fixed order, so every run gives the same tokens.

Shapes: R rows | V vocabulary | N tokens of a tile, also the most that are copied
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import launch_options, wait_for_earlier_kernels

TILE = 4096
NUM_WARPS = 16
NUM_STAGES = tl.constexpr(4)
INFINITY = tl.constexpr(float("inf"))
LARGEST = tl.constexpr(3.0e38)  # finite, so that halves and differences are finite
FIRST_STEP = tl.constexpr(8.0)  # the first value tried is this far below the best logit
MAX_TRIES = tl.constexpr(3)


@triton.jit
def _scaled(logit_N, factor):
    """Logits divided by the temperature: −inf for NaN, which never wins, and LARGEST for inf."""
    x_N = logit_N.to(tl.float32) * factor
    return tl.where(x_N == x_N, tl.minimum(x_N, LARGEST), -INFINITY)


@triton.jit
def _load(row_at, factor, token_N, num_tokens):
    """`_scaled` logits; −inf after the last token."""
    return _scaled(tl.load(row_at + token_N, mask=token_N < num_tokens, other=-INFINITY), factor)


@triton.jit
def _scan(row_at, factor, num_tokens, value, best, HAS_MASS: tl.constexpr, TILE: tl.constexpr):
    """(count, mass, below, following) of the tokens above `value`.

    `mass` is their probability relative to that of the best token (0 without HAS_MASS), `below` the
    largest logit that is not above `value` (−inf if none), `following` the smallest that is (inf if
    none).
    """
    lane_N = tl.arange(0, TILE)
    count_N = tl.zeros((TILE,), tl.int32)
    mass_N = tl.zeros((TILE,), tl.float32)
    below_N = tl.full((TILE,), -INFINITY, tl.float32)
    next_N = tl.full((TILE,), INFINITY, tl.float32)
    for tile in tl.range(tl.cdiv(num_tokens, TILE), num_stages=NUM_STAGES):
        x_N = _load(row_at, factor, tile * TILE + lane_N, num_tokens)
        is_above_N = x_N > value
        count_N += is_above_N.to(tl.int32)
        if HAS_MASS:
            mass_N += tl.where(is_above_N, tl.exp(x_N - best), 0.0)
        below_N = tl.where(is_above_N, below_N, tl.maximum(below_N, x_N))
        next_N = tl.where(is_above_N, tl.minimum(next_N, x_N), next_N)
    return tl.sum(count_N, 0), tl.sum(mass_N, 0), tl.max(below_N, 0), tl.min(next_N, 0)


@triton.jit
def _weigh(row_at, factor, num_tokens, value, best, TILE: tl.constexpr):
    """(count, mass, whole): tokens above `value`, their probability, and that of all tokens.

    Probabilities are relative to that of the best token.
    """
    lane_N = tl.arange(0, TILE)
    count_N = tl.zeros((TILE,), tl.int32)
    mass_N = tl.zeros((TILE,), tl.float32)
    rest_N = tl.zeros((TILE,), tl.float32)
    for tile in tl.range(tl.cdiv(num_tokens, TILE), num_stages=NUM_STAGES):
        x_N = _load(row_at, factor, tile * TILE + lane_N, num_tokens)
        is_above_N = x_N > value
        one_N = tl.exp(x_N - best)
        count_N += is_above_N.to(tl.int32)
        mass_N += tl.where(is_above_N, one_N, 0.0)
        rest_N += tl.where(is_above_N, 0.0, one_N)
    mass = tl.sum(mass_N, 0)
    return tl.sum(count_N, 0), mass, mass + tl.sum(rest_N, 0)


@triton.jit
def _copy_above(row_at, factor, num_tokens, value, few_at, few_token_at, TILE: tl.constexpr):
    """Copies the tokens above `value` in the order of their ids.

    Logits go to `few_at`, followed by −inf, and ids to `few_token_at`.
    """
    lane_N = tl.arange(0, TILE)
    tl.store(few_at + lane_N, tl.full((TILE,), -INFINITY, tl.float32).to(few_at.dtype.element_ty))
    tl.debug_barrier()  # other threads overwrite some of these
    num_before = 0
    for tile in tl.range(tl.cdiv(num_tokens, TILE), num_stages=NUM_STAGES):
        token_N = tile * TILE + lane_N
        logit_N = tl.load(row_at + token_N, mask=token_N < num_tokens, other=-INFINITY)
        is_above_N = _scaled(logit_N, factor) > value
        rank_N = num_before + tl.cumsum(is_above_N.to(tl.int32), 0) - 1
        tl.store(few_at + rank_N, logit_N, mask=is_above_N)
        tl.store(few_token_at + rank_N, token_N, mask=is_above_N)
        num_before += tl.sum(is_above_N.to(tl.int32), 0)
    tl.debug_barrier()  # all threads read what the others wrote


@triton.jit
def _just_below(value):
    """The next smaller number in fp32."""
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(value > 0, bits - 1, tl.where(value < 0, bits + 1, -2147483647))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _search(
    row_at, factor, num_tokens, low, best, target, BY_MASS: tl.constexpr, TILE: tl.constexpr
):
    """(value, total): the smallest logit whose total above it is less than `target`; the total.

    A total is a probability with BY_MASS, else a number of tokens. All logits up to `low` are known
    to have a total of `target` or more; −inf: nothing is known.
    """
    high = best
    total_high, step = 0.0, FIRST_STEP
    is_done = low >= high
    while not is_done:
        is_open = low == -INFINITY
        middle = tl.where(is_open, tl.maximum(best - step, -LARGEST), low * 0.5 + high * 0.5)
        middle = tl.where(middle < high, middle, tl.where(is_open, _just_below(high), low))
        count, mass, below, following = _scan(
            row_at, factor, num_tokens, middle, best, BY_MASS, TILE
        )
        total = mass
        if not BY_MASS:
            total = count.to(tl.float32)
        stays = total < target
        if stays & (below > low):
            high = below
            total_high = total
            step = tl.minimum(tl.maximum(2.0 * step, 2.0 * (best - below)), LARGEST)
        else:
            # either the total above `middle` is too large, or no logit is there
            is_done = following >= high
            low = middle
    return high, total_high


@triton.jit
def _nth_token(row_at, factor, num_tokens, value, num, TILE: tl.constexpr):
    """Index of the num-th token with this logit, or of the last one if there are fewer."""
    lane_N = tl.arange(0, TILE)
    num_before = 0
    found = -1
    for tile in range(tl.cdiv(num_tokens, TILE)):
        token_N = tile * TILE + lane_N
        is_value_N = (_load(row_at, factor, token_N, num_tokens) == value) & (token_N < num_tokens)
        count = tl.sum(is_value_N.to(tl.int32), 0)
        if (count > 0) & (num_before < num):
            rank_N = num_before + tl.cumsum(is_value_N.to(tl.int32), 0)
            found = tl.max(tl.where(is_value_N & (rank_N <= num), token_N, -1), 0)
        num_before += count
    return found


@triton.jit
def _narrow(row_at, factor, vocab_size, best, top_k, top_p, min_p, TILE: tl.constexpr):
    """(value, probability of the whole row), where all tokens that can stay lie above `value`.

    At most a tile of tokens lies above it.

    The value is −inf if none is found. top_k 0: off.
    """
    found, whole = best - INFINITY, 0.0
    least, most, step, tries = 0.0, INFINITY, FIRST_STEP, MAX_TRIES
    while tries > 0:
        tries -= 1
        value = best - step
        if (top_k == 0) & (min_p > 0):  # exactly the tokens that min_p leaves
            value = _just_below(best + tl.log(min_p))
            tries = 0
        count, mass, whole = _weigh(row_at, factor, vocab_size, value, best, TILE)
        has_all = ((top_p < 1) & (mass >= top_p * whole)) | (min_p > 0)
        if top_k > 0:
            has_all = count.to(tl.float32) >= top_k
        if has_all & (count <= TILE):
            found, tries = value, 0
        if has_all:
            most = step
        else:
            least = step
        step = tl.where(most == INFINITY, 2.0 * step, 0.5 * (least + most))
    return found, whole


@triton.jit
def _least(
    row_at,
    factor,
    few_at,
    few_token_at,
    vocab_size,
    log_vocab_size,
    top_k,
    top_p,
    min_p,
    TILE: tl.constexpr,
):
    """(logit, id) of the last token that stays.

    `few_at` and `few_token_at` have room for a tile of logits and ids.
    """
    everything = vocab_size.to(tl.float32)
    top_k = tl.where(top_k < everything, top_k, 0.0)
    _, _, best, _ = _scan(row_at, factor, vocab_size, INFINITY, INFINITY, False, TILE)
    low, whole = _narrow(row_at, factor, vocab_size, best, top_k, top_p, min_p, TILE)
    is_few = low > -INFINITY
    num_tokens = vocab_size
    if is_few:
        _copy_above(row_at, factor, vocab_size, low, few_at, few_token_at, TILE)
        row_at, num_tokens = few_at, tl.full((), TILE, tl.int32)
    # `value`: the smallest logit that stays; `num`: how many tokens with this logit stay
    value, num = best - INFINITY, everything
    if min_p > 0:
        _, _, _, value = _scan(
            row_at, factor, num_tokens, _just_below(best + tl.log(min_p)), best, False, TILE
        )
    if top_k > 0:
        kth, num_above = _search(row_at, factor, num_tokens, low, best, top_k, False, TILE)
        if kth >= value:
            value, num = kth, top_k - num_above
    if top_p < 1:
        lowest, mass = value, whole
        if lowest > -INFINITY:
            count_above, mass_above, _, _ = _scan(
                row_at, factor, num_tokens, lowest, best, True, TILE
            )
            count, _, _, _ = _scan(
                row_at, factor, num_tokens, _just_below(lowest), best, False, TILE
            )
            mass = mass_above + tl.minimum((count - count_above).to(tl.float32), num) * tl.exp(
                lowest - best
            )
        target = top_p * mass
        # all tokens below this together have less than the rest of the probability
        low = tl.maximum(low, best - (log_vocab_size - tl.log(1.0 - top_p)))
        if lowest > -INFINITY:
            low = tl.maximum(low, _just_below(lowest))
        value, total = _search(row_at, factor, num_tokens, low, best, target, True, TILE)
        needed = tl.maximum(tl.ceil((target - total) / tl.exp(value - best)), 1.0)
        num = tl.where(value == lowest, tl.minimum(num, needed), needed)
    if value == -INFINITY:  # no filter leaves out a token
        _, _, _, value = _scan(row_at, factor, num_tokens, -INFINITY, best, False, TILE)
    num = tl.minimum(num, everything).to(tl.int32)
    last = _nth_token(row_at, factor, num_tokens, value, num, TILE)
    if is_few:
        last = tl.load(few_token_at + last)
    return value, last


# these are columns of a table; with one row they are not aligned
@triton.jit(
    do_not_specialize_on_alignment=["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr"]
)
def apply_top_k_top_p_kernel(
    logits_ptr,  # [R, V]
    temperature_ptr,  # [R] fp32
    top_k_ptr,  # [R] fp32
    top_p_ptr,  # [R] fp32
    min_p_ptr,  # [R] fp32
    few_ptr,  # [R, N], scratch
    few_token_ptr,  # [R, N] int32, scratch
    out_ptr,  # [R, V], written
    logits_stride,
    vocab_size,
    log_vocab_size,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    row_idx = tl.program_id(0).to(tl.int64)
    top_k, top_p, min_p = (
        tl.load(top_k_ptr + row_idx),
        tl.load(top_p_ptr + row_idx),
        tl.load(min_p_ptr + row_idx),
    )
    temperature = tl.load(temperature_ptr + row_idx)
    factor = 1.0 / tl.where(temperature == 0, 1.0, temperature)
    row_at = logits_ptr + row_idx * logits_stride
    # the smallest logit that stays, and the last token with this logit that stays
    value, last = -float("inf"), vocab_size
    if (top_k > 0) | (top_p < 1) | (min_p > 0):
        few_at, few_token_at = few_ptr + row_idx * TILE, few_token_ptr + row_idx * TILE
        value, last = _least(
            row_at, factor, few_at, few_token_at, vocab_size, log_vocab_size,
            top_k, top_p, min_p, TILE,
        )  # fmt: skip
    lane_N = tl.arange(0, TILE)
    for tile in tl.range(tl.cdiv(vocab_size, TILE), num_stages=NUM_STAGES):
        token_N = tile * TILE + lane_N
        logit_N = tl.load(row_at + token_N, mask=token_N < vocab_size, other=-INFINITY)
        x_N = _scaled(logit_N, factor)
        is_out_N = (x_N < value) | ((x_N == value) & (token_N > last))
        out_N = tl.where(is_out_N, -INFINITY, logit_N.to(tl.float32)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row_idx * vocab_size + token_N, out_N, mask=token_N < vocab_size)


def apply_top_k_top_p(
    logits_RV: Tensor, temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor
) -> Tensor:
    """`reference.sample.apply_top_k_top_p`.

    If a sum of probabilities is within rounding of top_p, one token more or less may stay.
    """
    num_rows, vocab_size = logits_RV.shape
    out_RV = torch.empty((num_rows, vocab_size), dtype=logits_RV.dtype, device=logits_RV.device)
    if num_rows == 0:
        return out_RV
    if vocab_size == 1:
        return logits_RV.clone()
    logits_RV = logits_RV if logits_RV.stride(1) == 1 else logits_RV.contiguous()
    few_RN = torch.empty((num_rows, TILE), dtype=logits_RV.dtype, device=logits_RV.device)
    apply_top_k_top_p_kernel[(num_rows,)](
        logits_RV,
        temperature_R.float().contiguous(),
        top_k_R.float().contiguous(),
        top_p_R.float().contiguous(),
        min_p_R.float().contiguous(),
        few_RN,
        torch.empty((num_rows, TILE), dtype=torch.int32, device=logits_RV.device),
        out_RV,
        logits_RV.stride(0),
        vocab_size,
        math.log(vocab_size),
        TILE=TILE,
        num_warps=NUM_WARPS,
        **launch_options(logits_RV.device),
    )
    return out_RV
