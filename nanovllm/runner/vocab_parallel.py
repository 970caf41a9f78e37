"""Logits on several ranks: each rank computes the columns of its part of the vocabulary.

The plain sampler takes the columns (`ops.sample_columns`): ranks exchange one number for each row.
Filters, penalties and log-probabilities need whole logits, so they gather them. On one rank the
columns are the whole logits, and programs do not change.

R rows | V vocabulary | W columns of one rank, V on one
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models.config import ModelConfig


def drawing(cfg: ModelConfig, region: Callable[..., Any]) -> Callable[..., Any]:
    """A region of `state` that chooses tokens, for the columns of each of the config's ranks."""
    if cfg.num_ranks == 1:
        return region
    return partial(region, draw=partial(ops.sample_columns, num_columns=cfg.vocab_size))


def gathered(cfg: ModelConfig, logits_RW: Tensor) -> Tensor:
    """The whole logits [R, V], on every rank."""
    return logits_RW if cfg.num_ranks == 1 else ops.gather_columns(logits_RW, cfg.vocab_size)


def warm_up(cfg: ModelConfig, sizes: Iterable[int], device: torch.device) -> None:
    """Load the gathering kernels for these numbers of rows, so that no request waits for them."""
    if cfg.num_ranks == 1:
        return
    width = -(-cfg.vocab_size // cfg.num_ranks)
    for num_rows in sizes:
        gathered(cfg, torch.zeros(num_rows, width, dtype=cfg.dtype, device=device))
