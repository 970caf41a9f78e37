"""Rotary tables of models whose layers have different ones."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from nanovllm.models.config import ModelConfig, Rope, dense_config

FULL, SLIDING = "full_attention", "sliding_attention"


def config_with_ropes(
    hf: Any, *, architecture: str, dtype: torch.dtype, max_model_len: int | None, **differences: Any
) -> ModelConfig:
    """`dense_config` of a model with rope parameters per layer type.

    The first table is that of full layers, the second that of sliding ones (`layer_ropes`). Raises
    ValueError for parameters of other types.
    """
    if unknown := set(hf.rope_parameters) - {FULL, SLIDING}:
        raise ValueError(
            f"rope_parameters has {sorted(unknown)[0]!r} beside {FULL!r} and {SLIDING!r}, which is "
            "not supported: each layer type has its own"
        )
    positions = hf.max_position_embeddings
    # positions are already those that a rope type extends the context to
    longest = min(max_model_len or positions, positions)
    full, sliding = (
        dense_config(
            _with_ropes_of(hf, layer_type),
            architecture=architecture,
            dtype=dtype,
            max_model_len=longest,
            **differences,
        )
        for layer_type in (FULL, SLIDING)
    )
    return replace(full, other_ropes=(Rope(sliding.inv_freq, sliding.rope_scale),))


def layer_ropes(hf: Any) -> tuple[int, ...]:
    """Each layer's table, by its type."""
    return tuple(int(layer_type == SLIDING) for layer_type in hf.layer_types)


def with_still_layers(
    cfg: ModelConfig, rotates: Sequence[bool]
) -> tuple[ModelConfig, tuple[int, ...]]:
    """The config of a model in which some layers rotate nothing, and each layer's table.

    Those have a table of cosines 1 and sines 0, so all layers share their programs.
    """
    if all(rotates):
        return cfg, ()
    still = Rope((0.0,) * len(cfg.inv_freq))
    return replace(cfg, other_ropes=(still,)), tuple(int(not turns) for turns in rotates)


def _with_ropes_of(hf: Any, layer_type: str) -> Any:
    """The config of a model whose layers all rotate as those of one type."""
    flat = copy.copy(hf)
    flat.rope_parameters = dict(hf.rope_parameters[layer_type])
    return flat
