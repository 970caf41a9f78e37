"""Rotary embedding and the cache write. Shapes: see the package."""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels.reference.norm_act import rms_norm

# The largest finite float8_e4m3fn (Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433).
# The format has no infinity.
FP8_MAX = 448.0


def rope(x_TNH: Tensor, cos_sin_MH: Tensor, pos_T: Tensor) -> Tensor:
    """Rotary embedding, half-split form: [x1·cos − x2·sin | x2·cos + x1·sin].

    Row m of the table is [cos | sin] in fp32.
    """
    cos_T1h, sin_T1h = cos_sin_MH[pos_T].unsqueeze(1).chunk(2, dim=-1)
    x1, x2 = x_TNH.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos_T1h - x2 * sin_T1h, x2 * cos_T1h + x1 * sin_T1h), dim=-1).to(
        x_TNH.dtype
    )


def store_kv(
    k_TKH: Tensor,
    v_TKH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    slot_T: Tensor,
    k_scale_K: Tensor | None = None,
    v_scale_K: Tensor | None = None,
) -> None:
    """Write token t's key and value into slot slot_T[t] = block · B + offset, in place.

    With scales the cache is float8_e4m3fn and gets x · (1 / scale), saturated at ±448: no finite
    value becomes NaN.
    """
    for x_TKH, cache_CBKH, scale_K in (
        (k_TKH, k_cache_CBKH, k_scale_K),
        (v_TKH, v_cache_CBKH, v_scale_K),
    ):
        if scale_K is None:
            _copy_to_slots(cache_CBKH, slot_T.long(), x_TKH.to(cache_CBKH.dtype))
        else:
            # as bytes: torch has no index_copy_ for fp8 on a CPU
            stored_TKH = to_fp8(x_TKH, scale_K).view(torch.uint8)
            _copy_to_slots(cache_CBKH.view(torch.uint8), slot_T.long(), stored_TKH)


def _copy_to_slots(cache_CBKH: Tensor, slot_T: Tensor, x_TKH: Tensor) -> None:
    """The blocks of a cache need not be adjacent in memory."""
    if cache_CBKH.is_contiguous():
        cache_CBKH.view(-1, *cache_CBKH.shape[2:]).index_copy_(0, slot_T, x_TKH)
        return
    block_size = cache_CBKH.shape[1]
    cache_CBKH.index_put_((slot_T // block_size, slot_T % block_size), x_TKH)


def to_fp8(x_TKH: Tensor, scale_K: Tensor) -> Tensor:
    """x · (1 / scale) in float8_e4m3fn, rounded to nearest even, saturated at ±448."""
    return (
        (x_TKH.float() * scale_K.reciprocal()[:, None])
        .clamp(-FP8_MAX, FP8_MAX)
        .to(torch.float8_e4m3fn)
    )


def qk_norm_rope_store(
    qkv_TE: Tensor,
    q_norm_H: Tensor | None,
    k_norm_H: Tensor | None,
    cos_sin_MH: Tensor,
    pos_T: Tensor,
    slot_T: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    num_heads: int,
    eps: float,
    k_scale_K: Tensor | None = None,
    v_scale_K: Tensor | None = None,
) -> Tensor:
    """Split [q | k | v], normalise and rotate q and k, store k and v; returns q [T, N, H].

    q and k are normalised per head if their weight is given. Scales are those of `store_kv`.
    """
    num_kv_heads, head_dim = k_cache_CBKH.shape[2:]
    q_TNH, k_TKH, v_TKH = qkv_TE.view(qkv_TE.shape[0], -1, head_dim).split(
        [num_heads, num_kv_heads, num_kv_heads], dim=1
    )
    if q_norm_H is not None:
        q_TNH = rms_norm(q_TNH, q_norm_H, eps)
    if k_norm_H is not None:
        k_TKH = rms_norm(k_TKH, k_norm_H, eps)
    store_kv(
        rope(k_TKH, cos_sin_MH, pos_T),
        v_TKH,
        k_cache_CBKH,
        v_cache_CBKH,
        slot_T,
        k_scale_K,
        v_scale_K,
    )
    return rope(q_TNH, cos_sin_MH, pos_T)
