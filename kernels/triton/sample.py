"""The plain sampler in Triton: argmax of the logits, or of logits / temperature + Gumbel noise.

It reads the logits once. A first kernel finds the best token of every span of the vocabulary, a
second the best of a row's spans. The hash of the noise equals the reference's bit by bit, in 32-bit
arithmetic. Logarithms are the hardware's, with a series where these are inaccurate. The
temperature's inverse is a factor. Scores differ from the reference's by less than
1e-5, so tokens differ only if the two best scores are as close. Greedy rows skip the noise. A NaN
never wins; a row of NaN is found by the search for its best token, at no cost.

On several ranks each one scores its own columns; `sample_columns.py` goes on from there.

At batch 1 the time is launch latency. In large batches greedy rows are limited by memory and drawn
rows by integer arithmetic. docs/log.md has the measurements.

Shapes: R rows | V vocabulary | P spans of a row
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import target_info
from triton.language.extra import libdevice

from nanovllm.kernels import reference
from nanovllm.kernels.triton.common import exp2, launch_options, num_multiprocessors

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
SLACK = tl.constexpr(0.001)  # in log2; much larger than the error of scores
# 2 − 2⁻²³: minus 1 + n · 2⁻²³ it is exact and slightly less than 1 − u
ALMOST_TWO = tl.constexpr(1.99999988079071044921875)
LAST = tl.constexpr(2147483647)  # larger than any token: there is none yet
NO_TOKEN = tl.constexpr(reference.sample.NO_TOKEN)

TILE = 1024  # tokens a program scores at a time
PROGRAMS_PER_MULTIPROCESSOR = 8


@triton.jit
def _keyed_hash32(x, key):
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) ^ key
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def _hash32(x):
    return _keyed_hash32(x, x ^ x)


@triton.jit
def _log2(x, HARDWARE: tl.constexpr):
    if not HARDWARE or not target_info.is_cuda():  # AMD's library has no fast_log2f
        return tl.log2(x)
    else:
        return libdevice.fast_log2f(x)


@triton.jit
def _one_plus_bits(token_V, key, second):
    """1 + n · 2⁻²³ with the 23 random bits n of token_V. The reference's u: (n + ½) · 2⁻²³."""
    return ((_keyed_hash32(token_V ^ key, second) >> 9) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _gumbel(one_plus_V, HARDWARE: tl.constexpr):
    """−log(−log u)."""
    uniform_V = one_plus_V - 0.999999940395355224609375  # 1 − 2⁻²⁴: the difference is exact
    rest_V = 1.0 - uniform_V
    # near 1 the hardware's logarithm has a large relative error, so: −log(1 − r) = r + r²/2 + r³/3
    # + r⁴/4 + …
    series_V = rest_V * (1.0 + rest_V * (0.5 + rest_V * (1.0 / 3.0 + rest_V * 0.25)))
    exponential_V = tl.where(rest_V < 0.02, series_V, -LN_2 * _log2(uniform_V, HARDWARE))
    return -LN_2 * _log2(exponential_V, HARDWARE)


@triton.jit(do_not_specialize=["vocab_size", "first_token", "tiles_per_program"])
def best_of_span_kernel(
    logits_ptr,  # [R, V]
    temperature_ptr,  # [R]
    seed_ptr,  # [R]
    pos_ptr,  # [R]
    id_ptr,  # [V], the tokens of the columns, read if HAS_IDS
    best_ptr,  # [R, P] fp32, written
    best_token_ptr,  # [R, P] int32, written
    logits_stride,
    vocab_size,
    first_token,  # of the first column, read if IS_PART
    tiles_per_program,
    TILE: tl.constexpr,
    IS_PART: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HARDWARE: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row_idx, span_idx = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperature_ptr + row_idx).to(tl.float32)
    lane_V = tl.arange(0, TILE)
    best_V = tl.full((TILE,), float("-inf"), tl.float32)
    best_token_V = tl.full((TILE,), LAST, tl.int32)
    first = span_idx * tiles_per_program
    num_tiles = tl.minimum(tiles_per_program, tl.cdiv(vocab_size, TILE) - first)
    logits_at = logits_ptr + row_idx * logits_stride
    if temperature == 0:
        for tile in range(num_tiles):
            token_V = (first + tile) * TILE + lane_V
            score_V = tl.load(
                logits_at + token_V, mask=token_V < vocab_size, other=float("-inf")
            ).to(tl.float32)
            is_better_V = score_V > best_V
            best_V = tl.where(is_better_V, score_V, best_V)
            best_token_V = tl.where(is_better_V, token_V, best_token_V)
    else:
        seed, pos = (
            tl.load(seed_ptr + row_idx).to(tl.int64),
            tl.load(pos_ptr + row_idx).to(tl.int64),
        )
        low, high = _hash32(seed.to(tl.uint32)), _hash32((seed >> 32).to(tl.uint32))
        key = _hash32(low ^ _hash32(high ^ _hash32(pos.to(tl.uint32))))
        second = _hash32(key ^ 0x5BD1E995)
        factor = 1.0 / temperature
        factor_log2 = factor * LOG2_E
        bound_log2 = float("inf")  # SLACK − best in log2; infinite before the first score
        for tile in range(num_tiles):
            token_V = (first + tile) * TILE + lane_V
            logit_V = tl.load(
                logits_at + token_V, mask=token_V < vocab_size, other=float("-inf")
            ).to(tl.float32)
            id_V = token_V + first_token if IS_PART else token_V
            if HAS_IDS:
                id_V = tl.load(id_ptr + token_V, mask=token_V < vocab_size, other=0)
            one_plus_V = _one_plus_bits(id_V.to(tl.uint32), key, second)
            # Noise is at most −log(1 − u), so only a token with 1 − u < exp(logit / temperature −
            # best) can win; the slack exceeds all rounding. The first tiles of a span find its best
            # score, and most other tiles stop here.
            spare_V = exp2(logit_V * factor_log2 + bound_log2, not HARDWARE) - (
                ALMOST_TWO - one_plus_V
            )
            if (bound_log2 == float("inf")) | (tl.max(spare_V, 0) > 0):
                score_V = logit_V * factor + _gumbel(one_plus_V, HARDWARE)
                is_better_V = score_V > best_V
                best_V = tl.where(is_better_V, score_V, best_V)
                best_token_V = tl.where(is_better_V, token_V, best_token_V)
                bound_log2 = SLACK - tl.max(best_V, 0) * LOG2_E
    best = tl.max(best_V, 0)
    best_token = tl.min(tl.where(best_V == best, best_token_V, LAST), 0)
    if IS_PART:
        best_token = tl.where(best_token == LAST, LAST, best_token + first_token)
    if HAS_IDS:
        found = tl.load(id_ptr + best_token, mask=best_token != LAST, other=LAST)
        best_token = found.to(tl.int32)
    out = row_idx * tl.num_programs(1) + span_idx
    tl.store(best_ptr + out, best)
    tl.store(best_token_ptr + out, best_token)


@triton.jit(do_not_specialize=["num_spans"])
def best_of_row_kernel(
    best_ptr,  # [R, P] fp32
    best_token_ptr,  # [R, P] int32
    out_ptr,  # [R] int64, written
    num_spans,
    SPANS_P: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row_idx = tl.program_id(0).to(tl.int64)
    span_P = tl.arange(0, SPANS_P)
    at_P = row_idx * num_spans + span_P
    best_P = tl.load(best_ptr + at_P, mask=span_P < num_spans, other=float("-inf"))
    token_P = tl.load(best_token_ptr + at_P, mask=span_P < num_spans, other=LAST)
    token = tl.min(tl.where(best_P == tl.max(best_P, 0), token_P, LAST), 0)
    # a row without a score above −inf has no best token
    tl.store(out_ptr + row_idx, tl.where(token == LAST, NO_TOKEN, token).to(tl.int64))


def spans(num_rows: int, vocab_size: int, multiprocessors: int) -> tuple[int, int]:
    """(spans of a row, tiles of a span): enough programs to fill the device, at most one a tile."""
    num_tiles = triton.cdiv(vocab_size, TILE)
    wanted = max(1, min(num_tiles, multiprocessors * PROGRAMS_PER_MULTIPROCESSOR // num_rows))
    tiles_per_span = triton.cdiv(num_tiles, wanted)
    return triton.cdiv(num_tiles, tiles_per_span), tiles_per_span


def best_of_spans(
    logits_RV: Tensor,
    temperature_R: Tensor,
    seed_R: Tensor,
    pos_R: Tensor,
    part: tuple[int, int] | None = None,
    token_V: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The best score of each span, fp32 [R, P], and its token, int32; LAST if all are −inf.

    The columns are a `part` of the vocabulary if they begin with another token than 0, or if only
    some of them have tokens: (token of the first column, number of columns with tokens). `token_V`
    are the tokens of the columns, if these are not all of the vocabulary. There is at least one
    row.
    """
    num_rows, width = logits_RV.shape
    device = logits_RV.device
    logits_RV = logits_RV if logits_RV.stride(1) == 1 else logits_RV.contiguous()
    first_token, num_tokens = part or (0, width)
    num_spans, tiles_per_span = spans(num_rows, width, num_multiprocessors(device))
    best_RP = torch.empty((num_rows, num_spans), dtype=torch.float32, device=device)
    best_token_RP = torch.empty((num_rows, num_spans), dtype=torch.int32, device=device)
    best_of_span_kernel[(num_rows, num_spans)](
        logits_RV,
        temperature_R.contiguous(),
        seed_R.contiguous(),
        pos_R.contiguous(),
        seed_R if token_V is None else token_V,
        best_RP,
        best_token_RP,
        logits_RV.stride(0),
        num_tokens,
        first_token,
        tiles_per_span,
        TILE=TILE,
        IS_PART=part is not None,
        HAS_IDS=token_V is not None,
        HARDWARE=device.type == "cuda",
        num_warps=4,
        **launch_options(device),
    )
    return best_RP, best_token_RP


def sample(logits_RV: Tensor, temperature_R: Tensor, seed_R: Tensor, pos_R: Tensor) -> Tensor:
    """`reference.sample.sample`; of equal scores the smallest id wins."""
    return _sample(logits_RV, temperature_R, seed_R, pos_R)


def sample_of(
    logits_RX: Tensor,
    token_X: Tensor,
    vocab_size: int,
    temperature_R: Tensor,
    seed_R: Tensor,
    pos_R: Tensor,
) -> Tensor:
    """`reference.drafts.sample_of`."""
    return _sample(logits_RX, temperature_R, seed_R, pos_R, token_X)


def _sample(
    logits_RV: Tensor,
    temperature_R: Tensor,
    seed_R: Tensor,
    pos_R: Tensor,
    token_V: Tensor | None = None,
) -> Tensor:
    num_rows, device = logits_RV.shape[0], logits_RV.device
    token_R = torch.empty(num_rows, dtype=torch.int64, device=device)
    if num_rows == 0:
        return token_R
    inputs = logits_RV, temperature_R, seed_R, pos_R
    best_RP, best_token_RP = best_of_spans(*inputs, token_V=token_V)
    num_spans = best_RP.shape[1]
    best_of_row_kernel[(num_rows,)](
        best_RP,
        best_token_RP,
        token_R,
        num_spans,
        SPANS_P=triton.next_power_of_2(num_spans),
        num_warps=1 if num_spans <= 32 else 4,
        **launch_options(device),
    )
    return token_R
