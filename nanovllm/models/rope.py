"""Rotary frequencies for every rope type that transformers knows, and the table that the kernels read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SUPPORTED_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def rotary_frequencies(
    hf: Any, head_dim: int, max_model_len: int
) -> tuple[tuple[float, ...], float]:
    """(inverse frequencies, H/2 of them; factor on cos and sin) for a Hugging Face config.

    A static engine has one table for all lengths. Where a rope type depends on the length of the sequence (dynamic,
    longrope), transformers changes its frequencies in mid-sequence, so that older keys no longer fit newer queries;
    here `max_model_len` decides once: up to the original length they are the unscaled (short) ones.
    """
    hf.standardize_rope_params()
    parameters = hf.rope_parameters
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise ValueError(
            f"rope type {rope_type!r} is not supported: use one of {', '.join(SUPPORTED_ROPE_TYPES)}"
        )
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor {parameters['partial_rotary_factor']} is not supported: only 1.0 is"
        )
    if rope_type == "default":
        exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return tuple((1.0 / parameters["rope_theta"] ** exponent).tolist()), 1.0
    from transformers.modeling_rope_utils import (
        ROPE_INIT_FUNCTIONS,  # half a second that few models need
    )

    inv_freq, scale = ROPE_INIT_FUNCTIONS[rope_type](hf, torch.device("cpu"), seq_len=max_model_len)
    return tuple(inv_freq.float().tolist()), float(scale)


def extends_itself(hf: Any) -> bool:
    """Whether the rope type stretches to any length: dynamic does, the others end at max_position_embeddings."""
    hf.standardize_rope_params()
    return hf.rope_parameters.get("rope_type") == "dynamic"


def rotary_table(
    inv_freq: tuple[float, ...], scale: float, num_positions: int, device: torch.device
) -> Tensor:
    """[M, H] fp32: row m is [cos(m · f) | sin(m · f)] · scale for the H/2 frequencies f."""
    angle = torch.outer(
        torch.arange(num_positions, dtype=torch.float32),
        torch.tensor(inv_freq, dtype=torch.float32),
    )
    return (torch.cat((angle.cos(), angle.sin()), dim=-1) * scale).to(device)
