"""Embeddings and positions of requests as inputs of a prefill step.

They are inputs of fixed shapes, so that a step with images is one program, or one captured graph,
per bucket. A step without any has programs without these inputs.

T tokens | D hidden | H head size | M positions
L = 1 + the layers after which features are added to hidden states
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.models.config import ModelConfig
from nanovllm.platforms.base import Platform
from nanovllm.runner.embeddings import Embeddings
from nanovllm.schedule.plan import StepPlan


class MMEmbeds(NamedTuple):
    """Replacements for embeddings and positions of a span's tokens.

    embeds_LTD: the embeddings of tokens, and the features added to their hidden states after the
        first L − 1 layers.
    is_given_T: bool; embeddings of other tokens are not read.
    position_3T: the positions in time, height and width. None for models with one per token.
    axis_H: which of the three positions rotates each element of a head. row_T: the numbers of the
        tokens, which are the rows of their rotations.
    end_T: int32, that of `Batch`, in models whose tokens see later ones (`ModelConfig.sees_ahead`).
    """

    embeds_LTD: Tensor
    is_given_T: Tensor
    position_3T: Tensor | None = None
    axis_H: Tensor | None = None
    row_T: Tensor | None = None
    end_T: Tensor | None = None


# regions -----------------------------------------------------------------------------------------


def with_given(
    factor: float, given: MMEmbeds, cos_sin_MH: Tensor, h_TD: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The hidden states with the given embeddings times `factor`, and the rotation [T, H] of each
    token if tokens have three positions. It has so few ops that it can be a call list on a GPU
    (`lower.calls`)."""
    embeds_TD = given.embeds_LTD.select(0, 0)
    if factor != 1.0:
        embeds_TD = embeds_TD * factor
    h_TD = torch.where(given.is_given_T.unsqueeze(1), embeds_TD, h_TD)
    if given.position_3T is None or given.axis_H is None:
        return h_TD, None
    return h_TD, cos_sin_MH.gather(0, given.position_3T.index_select(0, given.axis_H).t())


def add_features(is_given_T: Tensor, features_TD: Tensor, h_TD: Tensor) -> Tensor:
    """The hidden states with the features of the given tokens added."""
    return torch.where(is_given_T.unsqueeze(1), h_TD + features_TD, h_TD)


# inputs ------------------------------------------------------------------------------------------


class MMEmbedInputs:
    """The static inputs `MMEmbeds` of steps of up to `max_tokens` tokens.

    All steps share the memory of the embeddings, since it is large: each step fills what it reads.
    """

    def __init__(self, cfg: ModelConfig, platform: Platform, max_tokens: int) -> None:
        self._num_levels, self._size = 1 + cfg.num_deepstack, cfg.hidden_size
        num = self._num_levels * max_tokens * self._size
        self._memory = torch.zeros(num, dtype=cfg.dtype, device=platform.device)
        self._sees_ahead = cfg.sees_ahead
        self._axis_H: Tensor | None = None
        if cfg.rope_axes:
            # elements that are not rotated are the same in all rows of the table
            num_others = cfg.head_dim // 2 - len(cfg.rope_axes)
            axes = (*cfg.rope_axes, *(0,) * num_others)
            self._axis_H = torch.tensor(axes * 2, device=platform.device)
            self._row_T = torch.arange(max_tokens, device=platform.device)

    def of(self, num_tokens: int) -> MMEmbeds:
        """The inputs of a step of this size; nothing is given, and all positions are 0."""
        shape = (self._num_levels, num_tokens, self._size)
        embeds_LTD = self._memory.narrow(0, 0, math.prod(shape)).view(shape)
        is_given_T = embeds_LTD.new_zeros(num_tokens, dtype=torch.bool)
        if self._axis_H is None:
            ends = embeds_LTD.new_zeros(num_tokens, dtype=torch.int32) if self._sees_ahead else None
            return MMEmbeds(embeds_LTD, is_given_T, end_T=ends)
        position_3T = embeds_LTD.new_zeros((3, num_tokens), dtype=torch.int64)
        row_T = self._row_T.narrow(0, 0, num_tokens)
        return MMEmbeds(embeds_LTD, is_given_T, position_3T, self._axis_H, row_T)


def fill(given: MMEmbeds, plan: StepPlan, embeddings: Embeddings, platform: Platform) -> None:
    """Copy a plan's embeddings and positions to a step's inputs. Does not synchronise.

    `embeddings` are [n, D] to [n, L · D]; missing levels are zero.
    """
    _, num_tokens, size = given.embeds_LTD.shape
    is_given_T = np.zeros(num_tokens, np.bool_)
    for one in plan.embeddings:
        tokens = slice(one.start, one.start + one.num)
        is_given_T[tokens] = True
        rows = embeddings[one.key][one.source : one.source + one.num]
        levels_LnD = rows.unflatten(1, (-1, size)).transpose(0, 1)
        given.embeds_LTD[: len(levels_LnD), tokens] = levels_LnD
        given.embeds_LTD[len(levels_LnD) :, tokens] = 0
    platform.write(given.is_given_T, is_given_T)
    if given.end_T is not None:
        platform.write(given.end_T, _ends(plan, num_tokens))
    if given.position_3T is not None:
        position_3T = np.zeros((3, num_tokens), np.int64)
        position_3T[:, : len(plan.token_T)] = _positions(plan)
        platform.write(given.position_3T, position_3T)


def _ends(plan: StepPlan, num_tokens: int) -> np.ndarray:
    """For tokens of images, where their image ends in the sequence; 0 for others. No step has a
    part of an image without its end."""
    spans = zip(plan.seq_lens, plan.num_tokens)
    pos_T = np.concatenate([np.arange(seq_len - num, seq_len) for seq_len, num in spans])
    end_T = np.zeros(num_tokens, np.int32)
    for one in plan.embeddings:
        end_T[one.start : one.start + one.num] = pos_T[one.start + one.num - 1] + 1
    return end_T


def _positions(plan: StepPlan) -> np.ndarray:
    """Those of a plan, or those of tokens in their rows: [3, T] or [T]."""
    if plan.position_3T is not None:
        return plan.position_3T
    spans = zip(plan.seq_lens, plan.num_tokens)
    return np.concatenate([np.arange(seq_len - num, seq_len) for seq_len, num in spans])
