"""Rotary frequencies for the rope types of transformers, and the table that kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SUPPORTED_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


# The allowed rope parameters: the keys of transformers' `RopeParameters`, an older name for the
# type, a flag without effect, and `attn_factor`.
KEYS = frozenset(
    {
        "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor",
        "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
        "short_factor", "long_factor", "low_freq_factor", "high_freq_factor", "mscale",
        "mscale_all_dim", "truncate", "mrope_section", "mrope_interleaved", "finetuned",
        "attn_factor",
    }
)  # fmt: skip


def rotary_frequencies(
    hf: Any, head_dim: int, max_model_len: int, *, partial: bool = False
) -> tuple[tuple[float, ...], float]:
    """Inverse frequencies (H/2 of them), and the factor on cos and sin, for transformers' config.

    With `partial` a partial_rotary_factor is allowed, and there are frequencies for this part of
    the head alone.

    The engine has one table for all lengths. For rope types whose frequencies depend on the
    sequence length (dynamic, longrope) transformers changes them in mid-sequence, and older keys no
    longer match newer queries. Here `max_model_len` decides once: up to the original length the
    frequencies are the unscaled (short) ones.

    With yarn, `attention_factor` replaces the factor that transformers computes, and `attn_factor`
    multiplies it, as in vLLM. DeepSeek-R1-0528-Qwen3-8B has an `attn_factor` that makes the product
    1; transformers does not read it. Raises ValueError for unsupported settings.
    """
    parameters = rope_parameters(hf)
    rope_type = parameters["rope_type"]
    head_dim = _rotated_size(parameters, head_dim, partial)
    if rope_type == "default":
        exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return tuple((1.0 / parameters["rope_theta"] ** exponent).tolist()), 1.0
    # this import takes half a second, and few models need it
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    compute, cpu = ROPE_INIT_FUNCTIONS[rope_type], torch.device("cpu")
    try:
        inv_freq, scale = compute(hf, cpu, seq_len=max_model_len)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"rope_parameters {parameters} cannot be used: {type(error).__name__}: {error}"
        ) from error
    if inv_freq.shape != (head_dim // 2,):
        raise ValueError(
            f"rope_parameters {parameters} give {inv_freq.numel()} frequencies, but {head_dim} "
            f"rotated elements of a head need {head_dim // 2}"
        )
    return tuple(inv_freq.float().tolist()), float(scale) * (parameters.get("attn_factor") or 1.0)


def _rotated_size(parameters: dict[str, Any], head_dim: int, partial: bool) -> int:
    """How many elements of a head are rotated, as transformers computes it."""
    factor = parameters.get("partial_rotary_factor")
    if factor in (None, 1.0):
        return head_dim
    if not partial:
        raise ValueError(f"partial_rotary_factor {factor} is not supported: only 1.0 is")
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor <= 1:
        raise ValueError(f"partial_rotary_factor is {factor!r}: it must be a number in (0, 1]")
    size = int(head_dim * factor)
    if size < 2 or size % 2:
        raise ValueError(
            f"partial_rotary_factor {factor} rotates {size} of {head_dim} elements of a head: it "
            "must be an even number of them"
        )
    return size


def sequence_length(hf: Any, max_model_len: int | None) -> int:
    """`max_model_len`, lowered to the longest sequence that the rope type supports.

    | type | longest sequence | without `max_model_len` |
    |---|---|---|
    | default, llama3 | max_position_embeddings | the same |
    | linear | max_position_embeddings · factor | the same |
    | yarn | original_max_position_embeddings · factor | the same |
    | longrope | max_position_embeddings | original_max_position_embeddings |
    | dynamic | any | max_position_embeddings |

    For linear the original length, if present, replaces max_position_embeddings. For linear and
    yarn max_position_embeddings counts if it is larger. vLLM derives the same limits. It also takes
    the original length for longrope by default, since short sequences get other frequencies, and so
    other answers, where longer ones are allowed.
    """
    parameters, positions = rope_parameters(hf), int(hf.max_position_embeddings)
    original = parameters.get("original_max_position_embeddings") or positions
    if parameters["rope_type"] == "dynamic":
        return max_model_len or positions
    if parameters["rope_type"] == "longrope":
        return min(max_model_len or original, positions)
    if parameters["rope_type"] in ("linear", "yarn"):
        positions = max(positions, int(original * (parameters.get("factor") or 1.0)))
    return min(max_model_len or positions, positions)


def rope_parameters(hf: Any) -> dict[str, Any]:
    """The rope parameters of transformers' config in their standard form.

    Raises ValueError for types, keys and values that are not supported.
    """
    hf.standardize_rope_params()
    parameters: dict[str, Any] = hf.rope_parameters
    refuse_nested(parameters)
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in SUPPORTED_ROPE_TYPES:
        names = ", ".join(SUPPORTED_ROPE_TYPES)
        raise ValueError(f"rope type {rope_type!r} is not supported: use one of {names}")
    for key, value in parameters.items():
        if value is not None and key not in KEYS:
            raise ValueError(f"rope_parameters has {key} {value!r}, which is not supported")
    optional = [key for key in ("factor", "attn_factor") if parameters.get(key) is not None]
    for key in ("rope_theta", *optional):
        value = parameters.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ValueError(f"rope_parameters has {key} {value!r}: it must be a number above 0")
    if "attn_factor" in optional:
        _check_attn_factor(parameters)
    return {**parameters, "rope_type": rope_type}


def refuse_nested(parameters: dict[str, Any]) -> None:
    """Raise ValueError for rope parameters that hold a set for each layer type."""
    nested = [key for key, value in parameters.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(
            f"rope_parameters per layer type ({', '.join(nested)}) are not supported: only one set "
            "for all layers is"
        )


def _check_attn_factor(parameters: dict[str, Any]) -> None:
    if parameters["rope_type"] != "yarn":
        raise ValueError(
            f"attn_factor {parameters['attn_factor']} is not supported with rope type "
            f"{parameters['rope_type']!r}: only with 'yarn'"
        )
    if parameters.get("attention_factor") is not None:
        raise ValueError(
            f"rope_parameters has both attn_factor {parameters['attn_factor']} and "
            f"attention_factor {parameters['attention_factor']}: only one of them is supported"
        )


def axes_in_sections(sections: Sequence[int] | None, *, interleaved: bool) -> tuple[int, ...]:
    """Which of a token's positions (0 time, 1 height, 2 width) turns each of H/2 frequencies.

    `sections` are the numbers of frequencies of each: one after another (Qwen2.5-VL), or in turns
    until height and width have theirs, or the frequencies end; time has the rest (Qwen3-VL, as in
    transformers' `Qwen3VLTextRotaryEmbedding`). Raises ValueError unless there are three.
    """
    if sections is None or len(sections) != 3 or min(sections) < 0:
        raise ValueError(f"mrope_section is {sections}: it must be three numbers, from 0")
    if not interleaved:
        return tuple(axis for axis, num in enumerate(sections) for _ in range(num))
    axes = [0] * sum(sections)
    for axis in (1, 2):
        for place in range(axis, min(3 * sections[axis], len(axes)), 3):
            axes[place] = axis
    return tuple(axes)


def rotary_table(
    inv_freq: tuple[float, ...],
    scale: float,
    num_positions: int,
    device: torch.device,
    head_dim: int | None = None,
) -> Tensor:
    """[M, H] fp32: row m is [cos(m · f) | sin(m · f)] · scale for the H/2 frequencies f.

    If a head has more than two elements for each frequency, the others stay as they are: cos 1 and
    sin 0.
    """
    positions = torch.arange(num_positions, dtype=torch.float32)
    angle = torch.outer(positions, torch.tensor(inv_freq, dtype=torch.float32))
    cos, sin = angle.cos() * scale, angle.sin() * scale
    if head_dim is not None and head_dim > 2 * len(inv_freq):
        rest = torch.ones(num_positions, head_dim // 2 - len(inv_freq))
        cos, sin = torch.cat((cos, rest), dim=-1), torch.cat((sin, 0 * rest), dim=-1)
    return torch.cat((cos, sin), dim=-1).to(device)


def grouped_rows(head_dim: int, rotated: int, *, interleaved: bool = False) -> tuple[int, ...]:
    """The order of a head's rows in which the ops rotate the first `rotated` elements.

    The ops rotate element i with i + H/2. A checkpoint rotates element i with i + rotated/2, or, if
    its pairs are `interleaved`, element 2i with 2i + 1. Products of queries and keys do not depend
    on the order.
    """
    half, rest = rotated // 2, range(rotated, head_dim)
    first: Sequence[int] = range(0, rotated, 2) if interleaved else range(half)
    second: Sequence[int] = range(1, rotated, 2) if interleaved else range(half, rotated)
    middle = len(rest) // 2
    return (*first, *rest[:middle], *second, *rest[middle:])
