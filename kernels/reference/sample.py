"""The choice of the next token: filters, masks and draws. Shapes: see the package."""

from __future__ import annotations

import torch
from torch import Tensor

# What `sample` gives for a row in which no token can be chosen. The newest token of the row's state
# is 0 then, so that no op looks up an invalid id.
NO_TOKEN = -1
MASK_32 = 0xFFFFFFFF


def hash32(x: Tensor) -> Tensor:
    """A bijective hash of 32-bit integers in int64. Constants below 2³¹ keep products within int64.

    Source: C. Wellons, hash-prospector, the "lowbias32" search, constants 21f0aaad-735a2d97 with
    shifts 16, 15, 15.
    """
    return keyed_hash32(x, torch.zeros_like(x))


def keyed_hash32(x: Tensor, key: Tensor) -> Tensor:
    """`hash32` with a key between its two rounds: a different bijection of x for every key."""
    x = (((x ^ (x >> 16)) * 0x21F0AAAD) & MASK_32) ^ key
    x = ((x ^ (x >> 15)) * 0x735A2D97) & MASK_32
    return x ^ (x >> 15)


def gumbel_noise(seed_R: Tensor, pos_R: Tensor, vocab_size: int, first_token: int = 0) -> Tensor:
    """Standard Gumbel noise [R, V] in fp32, of the tokens from `first_token` on.

    Uniforms are odd multiples of 2⁻²⁴: they are exact in fp32 and never 0 or 1.
    """
    low, high = hash32(seed_R & MASK_32), hash32((seed_R >> 32) & MASK_32)
    key_R = hash32(low ^ hash32(high ^ hash32(pos_R & MASK_32)))
    second_R = hash32(key_R ^ 0x5BD1E995)
    token_V = torch.arange(vocab_size, device=seed_R.device)
    if first_token:
        token_V = token_V + first_token
    bits_RV = keyed_hash32(token_V.unsqueeze(0) ^ key_R.unsqueeze(1), second_R.unsqueeze(1))
    uniform_RV = ((bits_RV >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform_RV))


def sample(logits_RV: Tensor, temperature_R: Tensor, seed_R: Tensor, pos_R: Tensor) -> Tensor:
    """argmax(logits / temperature + Gumbel noise): a draw from softmax(logits / temperature).

    Temperature 0 gives argmax(logits). The noise is a hash of (seed, position, token id), so a
    request's tokens do not depend on other requests, buckets or earlier draws. The smallest id wins
    among equal scores, as in torch.argmax on a CPU. NaN counts as −inf: it never wins. A row
    without a score above −inf gives NO_TOKEN.
    """
    return best_column(logits_RV, temperature_R, seed_R, pos_R)[1]


def best_column(
    logits_RV: Tensor, temperature_R: Tensor, seed_R: Tensor, pos_R: Tensor, first_token: int = 0
) -> tuple[Tensor, Tensor]:
    """The best score of `sample` [R] in fp32, and its token [R].

    The columns are those of the tokens from `first_token` on.
    """
    minus_inf = float("-inf")
    logits_RV = logits_RV.float()
    is_greedy_R1 = (temperature_R == 0).unsqueeze(1)
    scaled_RV = logits_RV / torch.where(temperature_R == 0, 1.0, temperature_R).unsqueeze(1)
    noise_RV = gumbel_noise(seed_R, pos_R, logits_RV.shape[1], first_token)
    score_RV = torch.where(is_greedy_R1, logits_RV, scaled_RV + noise_RV)
    score_RV = torch.where(score_RV > minus_inf, score_RV, minus_inf)  # no NaN is left
    token_R = score_RV.argmax(-1)
    best_R = score_RV.gather(1, token_R.unsqueeze(1)).squeeze(1)
    if first_token:
        token_R = token_R + first_token
    return best_R, torch.where(best_R > minus_inf, token_R, NO_TOKEN)


def apply_top_k_top_p(
    logits_RV: Tensor, temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor
) -> Tensor:
    """Logits in which tokens outside min_p, then the top k, then the top p are −inf.

    top_k 0, top_p 1 and min_p 0 turn a filter off. Probabilities are softmax(logits / temperature);
    temperature 0 counts as 1. The likeliest token always stays. Among equal logits the smaller id
    counts as likelier. NaN counts as −inf; where it stays, it is NaN.
    """
    scaled_RV = logits_RV.float() / torch.where(temperature_R == 0, 1.0, temperature_R).unsqueeze(1)
    scaled_RV = scaled_RV.masked_fill(scaled_RV.isnan(), float("-inf"))
    sorted_RV, order_RV = scaled_RV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(scaled_RV.shape[1], device=scaled_RV.device)
    # log 0 = −inf: no score is below it
    floor_R1 = sorted_RV[:, :1] + torch.log(min_p_R).unsqueeze(1)
    num_kept_R1 = torch.where(top_k_R > 0, top_k_R, scaled_RV.shape[1]).unsqueeze(1)
    kept_RV = (sorted_RV >= floor_R1) & (rank_V < num_kept_R1)
    prob_RV = sorted_RV.masked_fill(~kept_RV, float("-inf")).softmax(-1)
    before_RV = prob_RV.cumsum(-1) - prob_RV  # probability of all likelier tokens
    kept_RV &= (before_RV < top_p_R.unsqueeze(1)) | (top_p_R >= 1).unsqueeze(1)
    kept_RV[:, 0] = True
    return logits_RV.masked_fill(
        ~torch.zeros_like(kept_RV).scatter_(1, order_RV, kept_RV), float("-inf")
    )


def apply_token_bitmask(logits_RV: Tensor, allowed_SW: Tensor, row_R: Tensor) -> Tensor:
    """Logits in which the tokens that the rows' masks leave out are −inf.

    allowed_SW: int32 [S, ceil(V / 32)]. Token v of row r stays if bit v % 32 of
    allowed_SW[row_R[r], v // 32] is 1.
    """
    bit_32 = torch.arange(32, dtype=torch.int32, device=logits_RV.device)
    word_RW1 = allowed_SW.index_select(0, row_R).unsqueeze(-1)
    is_allowed_RV = ((word_RW1 >> bit_32) & 1).flatten(1)[:, : logits_RV.shape[1]]
    return logits_RV.masked_fill(is_allowed_RV == 0, float("-inf"))
