"""Attention over the paged cache, and what writes to it: kernels of `attention.h`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.cpu.library import ATTENTION, DTYPE_CODES, QK_NORM_ROPE_STORE, load
from nanovllm.kernels.reference.latent_attention import Parts


def paged_attention(
    q_TNH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    max_q_len: int,
    scale: float,
    window: int,
    k_scale_K: Tensor | None = None,
    v_scale_K: Tensor | None = None,
    sinks_N: Tensor | None = None,
    end_T: Tensor | None = None,
    *,
    ordered: bool = False,
) -> Tensor:
    """`reference.attention.paged_attention`, which reads the pages in place, for fp32, bf16 and
    fp16. `ordered` is that of `kernels.cpp`.

    Queries and cache may differ in dtype. The blocks of an fp8 cache that the rows hold are first
    converted to fp32: this is correct, but no faster than a cache of a wider dtype.
    """
    if k_scale_K is not None and v_scale_K is not None:
        num_columns = -(-int(seq_len_R.max()) // k_cache_CBKH.shape[1])
        held, index = block_table_RP[:, :num_columns].long().unique(return_inverse=True)
        k_cache_CBKH = k_cache_CBKH[held].float() * k_scale_K[:, None]
        v_cache_CBKH = v_cache_CBKH[held].float() * v_scale_K[:, None]
        block_table_RP = index.int()
    q_dtype, kv_dtype = DTYPE_CODES.get(q_TNH.dtype), DTYPE_CODES.get(k_cache_CBKH.dtype)
    k_strides, v_strides = k_cache_CBKH.stride(), v_cache_CBKH.stride()
    if (
        q_dtype is None
        or kv_dtype is None
        or v_cache_CBKH.dtype is not k_cache_CBKH.dtype
        or k_strides[3] != 1
        or v_strides[3] != 1
    ):
        return reference.attention.paged_attention(
            q_TNH,
            k_cache_CBKH,
            v_cache_CBKH,
            block_table_RP,
            seq_len_R,
            q_start_S,
            max_q_len,
            scale,
            window,
            sinks_N=sinks_N,
            end_T=end_T,
        )
    if q_TNH.stride(2) != 1:
        q_TNH = q_TNH.contiguous()
    sinks_N = None if sinks_N is None else sinks_N.float().contiguous()
    end_T = None if end_T is None else _int32(end_T)
    q_strides = q_TNH.stride()
    if block_table_RP.dtype is not torch.int32 or block_table_RP.stride(1) != 1:
        block_table_RP = _int32(block_table_RP)
    seq_len_R, q_start_S = _int32(seq_len_R), _int32(q_start_S)
    num_tokens, num_heads, head_dim = q_TNH.shape
    out_TNH = q_TNH.new_empty((num_tokens, num_heads, head_dim))
    load().nanovllm_paged_attention(
        ATTENTION.pack(
            out_TNH.data_ptr(),
            q_TNH.data_ptr(),
            k_cache_CBKH.data_ptr(),
            v_cache_CBKH.data_ptr(),
            block_table_RP.data_ptr(),
            seq_len_R.data_ptr(),
            q_start_S.data_ptr(),
            0 if sinks_N is None else sinks_N.data_ptr(),
            0 if end_T is None else end_T.data_ptr(),
            q_strides[0],
            q_strides[1],
            *k_strides[:3],
            *v_strides[:3],
            block_table_RP.stride(0),
            num_tokens,
            block_table_RP.shape[0],
            num_heads,
            k_cache_CBKH.shape[2],
            head_dim,
            k_cache_CBKH.shape[1],
            max_q_len,
            window,
            q_dtype,
            kv_dtype,
            ordered,
            torch.get_num_threads(),
            scale,
        )
    )
    return out_TNH


def latent_attention(
    q_TNZ: Tensor,
    cache_CBZ: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    max_q_len: int,
    scale: float,
    latent_size: int,
) -> Tensor:
    """`reference.latent_attention.latent_attention` by the same kernel: it also sums the rotated
    keys, a small part of an entry."""
    entries = cache_CBZ.unsqueeze(2)
    out_TNZ = paged_attention(
        q_TNZ, entries, entries, block_table_RP, seq_len_R, q_start_S, max_q_len, scale, 0
    )
    return out_TNZ.narrow(2, 0, latent_size).contiguous()


def latent_span_attention(*args: Any) -> Tensor:
    """`reference.latent_attention.latent_span_attention` by the same kernel."""
    parts = Parts(latent_attention, paged_attention)
    meaning: Any = reference.latent_attention.latent_span_attention
    result: Tensor = meaning(*args, parts)
    return result


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
    """`reference.rope_store.qk_norm_rope_store` in one pass over qkv.

    With scales, keys and values go to a cache of qkv's dtype first, and from there to that in fp8.
    """
    if k_scale_K is not None:
        shape, num_tokens = k_cache_CBKH.shape[2:], len(qkv_TE)
        k_TKH, v_TKH = qkv_TE.new_empty((2, num_tokens, *shape))
        own = k_TKH.unsqueeze(1), v_TKH.unsqueeze(1)
        of_token_T = torch.arange(num_tokens)
        q_TNH = qk_norm_rope_store(
            qkv_TE, q_norm_H, k_norm_H, cos_sin_MH, pos_T, of_token_T, *own, num_heads, eps
        )
        reference.rope_store.store_kv(
            k_TKH, v_TKH, k_cache_CBKH, v_cache_CBKH, slot_T, k_scale_K, v_scale_K
        )
        return q_TNH
    dtype, code = qkv_TE.dtype, DTYPE_CODES.get(qkv_TE.dtype)
    num_kv_heads, head_dim = k_cache_CBKH.shape[2:]
    k_strides, v_strides = k_cache_CBKH.stride(), v_cache_CBKH.stride()
    if (
        code is None
        or k_cache_CBKH.dtype is not dtype
        or v_cache_CBKH.dtype is not dtype
        or k_strides[3] != 1
        or v_strides[3] != 1
        or (q_norm_H is not None and q_norm_H.dtype is not dtype)
        or (k_norm_H is not None and k_norm_H.dtype is not dtype)
        or cos_sin_MH.dtype is not torch.float32
        or cos_sin_MH.shape[1] != head_dim
        or cos_sin_MH.stride(1) != 1
    ):
        return reference.rope_store.qk_norm_rope_store(
            qkv_TE,
            q_norm_H,
            k_norm_H,
            cos_sin_MH,
            pos_T,
            slot_T,
            k_cache_CBKH,
            v_cache_CBKH,
            num_heads,
            eps,
        )
    if qkv_TE.stride(1) != 1:
        qkv_TE = qkv_TE.contiguous()
    pos_T, slot_T = _index(pos_T), _index(slot_T)
    q_norm_H = None if q_norm_H is None else q_norm_H.contiguous()
    k_norm_H = None if k_norm_H is None else k_norm_H.contiguous()
    num_tokens = qkv_TE.shape[0]
    q_TNH = qkv_TE.new_empty((num_tokens, num_heads, head_dim))
    load().nanovllm_qk_norm_rope_store(
        QK_NORM_ROPE_STORE.pack(
            q_TNH.data_ptr(),
            qkv_TE.data_ptr(),
            0 if q_norm_H is None else q_norm_H.data_ptr(),
            0 if k_norm_H is None else k_norm_H.data_ptr(),
            cos_sin_MH.data_ptr(),
            pos_T.data_ptr(),
            slot_T.data_ptr(),
            k_cache_CBKH.data_ptr(),
            v_cache_CBKH.data_ptr(),
            qkv_TE.stride(0),
            cos_sin_MH.stride(0),
            *k_strides[:3],
            *v_strides[:3],
            num_tokens,
            num_heads,
            num_kv_heads,
            head_dim,
            k_cache_CBKH.shape[1],
            pos_T.element_size(),
            slot_T.element_size(),
            code,
            torch.get_num_threads(),
            eps,
        )
    )
    return q_TNH


def _int32(x: Tensor) -> Tensor:
    return x if x.dtype is torch.int32 and x.is_contiguous() else x.to(torch.int32).contiguous()


def _index(x: Tensor) -> Tensor:
    return (
        x if x.dtype in (torch.int32, torch.int64) and x.is_contiguous() else x.long().contiguous()
    )
