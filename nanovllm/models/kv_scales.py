"""The scales of an fp8 cache, from the weights alone: bounds that no key and no value of any prompt can pass.

float8_e4m3fn is a floating-point format: its relative error is the same from 2⁻⁶ to 448, so a scale that is larger than it
need be costs nothing until values fall below 2⁻⁶ of it. A bound that always holds is therefore better than a maximum seen on
some prompts, which the next prompt passes: nothing saturates, there is nothing to run or to keep, and ranks, restarts and
prefix-cache hits agree.

D hidden | N query heads | K key-value heads | H head size | E = (N + 2K)·H
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nanovllm.models.config import ModelConfig
from nanovllm.models.dense import Layer
from nanovllm.models.formats.int8 import Int8Weight

FP8_MAX = float(torch.finfo(torch.float8_e4m3fn).max)
# Norms, products and rotations round in the model's dtype, bf16 at the worst, and so may pass a bound by a few 2⁻⁸.
ROUNDING = 1.0 + 2.0**-5
# A head whose weights are all zeros has the bound 0; no value of others is as small as this.
SMALLEST_BOUND = 2.0**-32


def kv_scales(cfg: ModelConfig, layer: Layer) -> tuple[Tensor, Tensor]:
    """(scales for keys, for values) of one layer, [K] fp32, powers of two, so that scaling itself rounds nothing.

    A normalised hidden state has at most the length √D. So row j of a projection gives at most √D · |row j ⊙ norm weight|, by
    Cauchy and Schwarz, and its bias. A key that is normalised per head has at most the length √H before the norm's weight.
    The rotation mixes elements i and i + H/2 and keeps the length of the pair.
    """
    num_kv, half = cfg.num_kv_heads, cfg.head_dim // 2
    first_key = cfg.num_heads * cfg.head_dim
    qkv_ED = layer.qkv_ED
    if isinstance(qkv_ED, Int8Weight):
        rows_JD = qkv_ED.values_OD[first_key:].float() * qkv_ED.scale_O[first_key:, None]
    else:
        rows_JD = qkv_ED[first_key:].float()
    rows_JD = rows_JD * layer.attn_norm_D.float()
    bound_J = math.sqrt(cfg.hidden_size) * rows_JD.norm(dim=1)
    if layer.qkv_bias_E is not None:
        bound_J += layer.qkv_bias_E[first_key:].float().abs()
    k_bound_KH, v_bound_KH = bound_J.view(2, num_kv, cfg.head_dim)
    pair_K2h = k_bound_KH.view(num_kv, 2, half)
    k_bound_K = pair_K2h.norm(dim=1).amax(1)
    if layer.k_norm_H is not None:
        k_bound_K = (math.sqrt(cfg.head_dim) * layer.k_norm_H.float().abs().amax()).expand(num_kv)
    return _scale(k_bound_K * cfg.rope_scale), _scale(v_bound_KH.amax(1))


def _scale(bound_K: Tensor) -> Tensor:
    """The power of two by which a bound, divided, comes to 448 at most."""
    return (bound_K * ROUNDING / FP8_MAX).clamp(min=SMALLEST_BOUND).log2().ceil().exp2()
