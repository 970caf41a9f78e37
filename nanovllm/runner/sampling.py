"""Choosing tokens where more than a temperature is asked for; the plain choice is the op `sample`.

R rows | V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.kernels.reference import gumbel_noise, hash32, keep_likely, sample

__all__ = [
    "Logprobs",
    "Penalties",
    "gumbel_noise",
    "hash32",
    "keep_likely",
    "logprobs",
    "penalize",
    "sample",
    "sample_filtered",
]


class Penalties(NamedTuple):
    """Per row: how often each token was generated, whether it stands in the prompt, and the three penalties."""

    output_count_RV: Tensor
    in_prompt_RV: Tensor
    repetition_R1: Tensor
    presence_R1: Tensor
    frequency_R1: Tensor


def penalize(logits_RV: Tensor, p: Penalties) -> Tensor:
    """Repetition penalty on tokens of prompt and output, presence and frequency penalties on those of the output; in fp32."""
    logits_RV = logits_RV.float()
    generated_RV = p.output_count_RV > 0
    repeated_RV = torch.where(
        logits_RV > 0, logits_RV / p.repetition_R1, logits_RV * p.repetition_R1
    )
    logits_RV = torch.where(generated_RV | p.in_prompt_RV, repeated_RV, logits_RV)
    return logits_RV - generated_RV * p.presence_R1 - p.output_count_RV * p.frequency_R1


def sample_filtered(
    logits_RV: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    seed_R: Tensor,
    pos_R: Tensor,
) -> Tensor:
    """`sample` among the tokens that `keep_likely` leaves."""
    kept_RV = ops.keep_likely(logits_RV, temperature_R, top_k_R, top_p_R, min_p_R)
    return ops.sample(kept_RV, temperature_R, seed_R, pos_R)


def rehearse_filtered(visit: Callable[..., object], logits_RV: Tensor, one_R: Tensor) -> None:
    """Give `visit` the calls of our ops that `sample_filtered` makes."""
    visit(ops.keep_likely, [logits_RV, one_R, one_R, one_R, one_R], {})
    visit(ops.sample, [logits_RV, one_R, one_R.long(), one_R.long()], {})


class Logprobs(NamedTuple):
    """Log-softmax of the model's own logits: of the token itself, and of the L likeliest."""

    chosen_R: Tensor
    top_RL: Tensor
    top_token_RL: Tensor


def logprobs(logits_RV: Tensor, token_R: Tensor, num_top: int) -> Logprobs:
    logprob_RV = logits_RV.float().log_softmax(-1)
    top_RL, top_token_RL = logprob_RV.topk(num_top, dim=-1)
    return Logprobs(logprob_RV.gather(1, token_R.unsqueeze(1)).squeeze(1), top_RL, top_token_RL)
