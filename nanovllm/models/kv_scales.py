"""Scales of an fp8 cache, from upper bounds that the weights set on keys and values.

The relative error of float8_e4m3fn is the same from 2⁻⁶ to 448, so a scale that is too large costs
nothing until values fall below 2⁻⁶ of it. An upper bound therefore serves better than a maximum
over sample prompts, which another prompt can exceed: nothing saturates, no calibration run is
needed, and ranks, restarts and prefix-cache hits agree.

D hidden | N query heads | K kv heads | H head size | E = (N + 2K)·H | J = 2K·H
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nanovllm.models.config import ModelConfig
from nanovllm.models.formats import Weight, rows

FP8_MAX = float(torch.finfo(torch.float8_e4m3fn).max)
# Norms, products and rotations round in the model's dtype (at worst bf16), which can exceed an
# exact bound by a few 2⁻⁸.
ROUNDING = 1.0 + 2.0**-5
# A head whose weights are all zeros has the bound 0, which cannot divide. Other bounds are larger.
SMALLEST_BOUND = 2.0**-32


def kv_scales(
    cfg: ModelConfig,
    attn_norm_D: Tensor,
    qkv_ED: Weight,
    qkv_bias_E: Tensor | None,
    k_norm_H: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Scales [K] fp32 for the keys and for the values of one layer.

    They are powers of two, so that scaling does not round. The length of a normalised hidden state
    is at most √D, so row j of a projection is at most √D · |row j ⊙ norm weight| (Cauchy-Schwarz)
    plus its bias. The length of a key that is normalised per head is at most
    √H · max |norm weight|. The rotation mixes elements i and i + H/2 and keeps the pair's length.
    The weight may have more rows before those of the queries.
    """
    num_kv, half = cfg.num_kv_heads, cfg.head_dim // 2
    first_key = cfg.num_heads * cfg.head_dim
    num_rows = 2 * num_kv * cfg.head_dim
    rows_JD = rows(qkv_ED, first_key)[-num_rows:] * attn_norm_D.float()
    bound_J = math.sqrt(cfg.hidden_size) * rows_JD.norm(dim=1)
    if qkv_bias_E is not None:
        bound_J += qkv_bias_E[-num_rows:].float().abs()
    k_bound_KH, v_bound_KH = bound_J.view(2, num_kv, cfg.head_dim)
    pair_K2h = k_bound_KH.view(num_kv, 2, half)
    k_bound_K = pair_K2h.norm(dim=1).amax(1)
    if k_norm_H is not None:
        k_bound_K = (math.sqrt(cfg.head_dim) * k_norm_H.float().abs().amax()).expand(num_kv)
    return _scale(k_bound_K * cfg.largest_rope_scale), _scale(v_bound_KH.amax(1))


def _scale(bound_K: Tensor) -> Tensor:
    """The smallest power of two that divides the bound to at most 448."""
    return (bound_K * ROUNDING / FP8_MAX).clamp(min=SMALLEST_BOUND).log2().ceil().exp2()
