"""Choosing tokens. Noise comes from a counter-based hash of (seed, position, token id), so that a request's tokens
depend on nothing else in the batch, on no bucket, and on no earlier draw.

R rows | V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MASK_32 = 0xFFFFFFFF


def hash32(x: Tensor) -> Tensor:
    """A bijective mix of 32-bit integers held in int64: the constants are below 2³¹, so that no product leaves int64.

    Source: C. Wellons, hash-prospector, the "lowbias32" search, constants 21f0aaad-735a2d97 with shifts 16, 15, 15.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & MASK_32
    x = ((x ^ (x >> 15)) * 0x735A2D97) & MASK_32
    return x ^ (x >> 15)


def gumbel_noise(seed_R: Tensor, pos_R: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise [R, V] fp32. Uniforms are odd multiples of 2⁻²⁴: never 0 or 1, exact in fp32."""
    low, high = hash32(seed_R & MASK_32), hash32((seed_R >> 32) & MASK_32)
    key_R = hash32(low ^ hash32(high ^ hash32(pos_R & MASK_32)))
    second_R = hash32(key_R ^ 0x5BD1E995)
    token_V = torch.arange(vocab_size, device=seed_R.device)
    bits_RV = hash32(hash32(token_V.unsqueeze(0) ^ key_R.unsqueeze(1)) ^ second_R.unsqueeze(1))
    uniform_RV = ((bits_RV >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform_RV))


def sample(logits_RV: Tensor, temperature_R: Tensor, seed_R: Tensor, pos_R: Tensor) -> Tensor:
    """argmax(logits / temperature + Gumbel noise), a draw from softmax(logits / temperature); argmax(logits) at 0."""
    logits_RV = logits_RV.float()
    is_greedy_R1 = (temperature_R == 0).unsqueeze(1)
    scaled_RV = logits_RV / torch.where(temperature_R == 0, 1.0, temperature_R).unsqueeze(1)
    noise_RV = gumbel_noise(seed_R, pos_R, logits_RV.shape[1])
    return torch.where(is_greedy_R1, logits_RV, scaled_RV + noise_RV).argmax(-1)


class Penalties(NamedTuple):
    """Per row: how often each token was generated, whether it stands in the prompt, and the three penalties."""

    output_count_RV: Tensor
    in_prompt_RV: Tensor
    repetition_R1: Tensor
    presence_R1: Tensor
    frequency_R1: Tensor


def penalize(logits_RV: Tensor, p: Penalties) -> Tensor:
    """Repetition penalty on tokens of prompt and output, presence and frequency penalties on those of the output."""
    generated_RV = p.output_count_RV > 0
    repeated_RV = torch.where(logits_RV > 0, logits_RV / p.repetition_R1, logits_RV * p.repetition_R1)
    logits_RV = torch.where(generated_RV | p.in_prompt_RV, repeated_RV, logits_RV)
    return logits_RV - generated_RV * p.presence_R1 - p.output_count_RV * p.frequency_R1


def keep_likely(scaled_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor) -> Tensor:
    """Logits with everything outside min_p, then the top k, then the top p at −inf; top_k 0, top_p 1, min_p 0 are off.

    The likeliest token always stays. Of tokens with the same logit the smaller ids count as likelier.
    """
    sorted_RV, order_RV = scaled_RV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(scaled_RV.shape[1], device=scaled_RV.device)
    floor_R1 = sorted_RV[:, :1] + torch.log(min_p_R).unsqueeze(1)  # log 0 = −inf: nothing is below it
    num_kept_R1 = torch.where(top_k_R > 0, top_k_R, scaled_RV.shape[1]).unsqueeze(1)
    kept_RV = (sorted_RV >= floor_R1) & (rank_V < num_kept_R1)
    prob_RV = sorted_RV.masked_fill(~kept_RV, float("-inf")).softmax(-1)
    before_RV = prob_RV.cumsum(-1) - prob_RV  # probability of everything likelier
    kept_RV &= (before_RV < top_p_R.unsqueeze(1)) | (top_p_R >= 1).unsqueeze(1)
    kept_RV[:, 0] = True
    return scaled_RV.masked_fill(~torch.zeros_like(kept_RV).scatter_(1, order_RV, kept_RV), float("-inf"))


def sample_filtered(
    logits_RV: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    seed_R: Tensor,
    pos_R: Tensor,
) -> Tensor:
    """`sample` among the tokens that `keep_likely` leaves after the division by temperature."""
    divisor_R1 = torch.where(temperature_R == 0, 1.0, temperature_R).unsqueeze(1)
    scaled_RV = keep_likely(logits_RV / divisor_R1, top_k_R, top_p_R, min_p_R)
    noisy_RV = scaled_RV + gumbel_noise(seed_R, pos_R, logits_RV.shape[1])
    return torch.where((temperature_R == 0).unsqueeze(1), logits_RV, noisy_RV).argmax(-1)


class Logprobs(NamedTuple):
    """Log-softmax of the model's own logits: of the token itself, and of the L likeliest."""

    chosen_R: Tensor
    top_RL: Tensor
    top_token_RL: Tensor


def logprobs(logits_RV: Tensor, token_R: Tensor, num_top: int) -> Logprobs:
    logprob_RV = logits_RV.float().log_softmax(-1)
    top_RL, top_token_RL = logprob_RV.topk(num_top, dim=-1)
    return Logprobs(logprob_RV.gather(1, token_R.unsqueeze(1)).squeeze(1), top_RL, top_token_RL)
