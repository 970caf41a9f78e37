"""Rotary frequencies for the rope types of transformers, and the table that kernels read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SUPPORTED_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def rotary_frequencies(
    hf: Any, head_dim: int, max_model_len: int
) -> tuple[tuple[float, ...], float]:
    """Inverse frequencies (H/2 of them), and the factor on cos and sin, for transformers' config.

    The engine has one table for all lengths. For rope types whose frequencies depend on the
    sequence length (dynamic, longrope) transformers changes them in mid-sequence, and older keys no
    longer fit newer queries. Here `max_model_len` decides once: up to the original length the
    frequencies are the unscaled (short) ones. Raises ValueError for unsupported settings.
    """
    hf.standardize_rope_params()
    parameters = hf.rope_parameters
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in SUPPORTED_ROPE_TYPES:
        names = ", ".join(SUPPORTED_ROPE_TYPES)
        raise ValueError(f"rope type {rope_type!r} is not supported: use one of {names}")
    factor = parameters.get("partial_rotary_factor", 1.0)
    if factor != 1.0:
        raise ValueError(f"partial_rotary_factor {factor} is not supported: only 1.0 is")
    if rope_type == "default":
        exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return tuple((1.0 / parameters["rope_theta"] ** exponent).tolist()), 1.0
    # this import takes half a second, and few models need it
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq, scale = ROPE_INIT_FUNCTIONS[rope_type](hf, torch.device("cpu"), seq_len=max_model_len)
    return tuple(inv_freq.float().tolist()), float(scale)


def extends_itself(hf: Any) -> bool:
    """True if the rope type has no longest position (dynamic); others have one."""
    hf.standardize_rope_params()
    return hf.rope_parameters.get("rope_type") == "dynamic"


def rotary_table(
    inv_freq: tuple[float, ...], scale: float, num_positions: int, device: torch.device
) -> Tensor:
    """[M, H] fp32: row m is [cos(m · f) | sin(m · f)] · scale for the H/2 frequencies f."""
    positions = torch.arange(num_positions, dtype=torch.float32)
    angle = torch.outer(positions, torch.tensor(inv_freq, dtype=torch.float32))
    return (torch.cat((angle.cos(), angle.sin()), dim=-1) * scale).to(device)
