"""Head norm, rotary embedding and the write into the cache, in Triton.

The fused kernel replaces three with one read of the projection's output: at batch 1 it saves
launches, in a full prefill memory traffic. Each program takes one token and some of its heads. A
head is held as two halves, because the rotation pairs element i with element i + H/2.

Shapes: T tokens | N query heads | K key-value heads | H head size | E = (N + 2K)·H | M positions in
the rotary table | C blocks in the cache | B block size in tokens | A heads of one program | h =
H/2, "p" after a letter: padded to a power of two
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import launch_options, to_fp8, wait_for_earlier_kernels


@triton.jit
def _normed(x1_Ah, x2_Ah, w1_h, w2_h, eps, HEAD: tl.constexpr, dtype: tl.constexpr):
    """RMS norm of whole heads, rounded before and after the weight, as the reference does."""
    mean_A1 = (tl.sum(x1_Ah * x1_Ah, 1) + tl.sum(x2_Ah * x2_Ah, 1))[:, None] / HEAD
    factor_A1 = tl.rsqrt(mean_A1 + eps)
    y1_Ah = (x1_Ah * factor_A1).to(dtype).to(tl.float32) * w1_h
    y2_Ah = (x2_Ah * factor_A1).to(dtype).to(tl.float32) * w2_h
    return y1_Ah.to(dtype).to(tl.float32), y2_Ah.to(dtype).to(tl.float32)


@triton.jit
def _stored(x, scale, dtype: tl.constexpr):
    """x in the cache's dtype; in fp8 it is divided by its head's scale."""
    if dtype == tl.float8e4nv:
        return to_fp8(x, scale)
    else:
        return x.to(dtype)


@triton.jit(do_not_specialize=["qkv_stride", "block_size"])
def qk_norm_rope_store_kernel(
    qkv_ptr,  # [T, E]
    q_norm_ptr,  # [H]
    k_norm_ptr,  # [H]
    cos_sin_ptr,  # [M, H] fp32
    pos_ptr,  # [T]
    slot_ptr,  # [T]
    k_ptr,  # [C, B, K, H], written
    v_ptr,  # [C, B, K, H], written
    q_out_ptr,  # [T, N, H], written
    k_scale_ptr,  # [K] fp32, read for an fp8 cache
    v_scale_ptr,  # [K] fp32, read for an fp8 cache
    qkv_stride,
    cos_sin_stride,
    block_size,
    k_stride_block,
    k_stride_slot,
    k_stride_head,
    v_stride_block,
    v_stride_slot,
    v_stride_head,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HALF_P: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL, EARLY=ONE_TOKEN)
    HALF: tl.constexpr = HEAD // 2
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    token_idx = tl.program_id(0).to(tl.int64)
    head_A = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    h_h = tl.arange(0, HALF_P)
    h_mask = (h_h < HALF)[None, :]
    mask_Ah = (head_A < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & h_mask

    pos = tl.load(pos_ptr + token_idx).to(tl.int64)
    slot = tl.load(slot_ptr + token_idx).to(tl.int64)
    at_Ah = qkv_ptr + token_idx * qkv_stride + head_A[:, None] * HEAD + h_h[None, :]
    raw1_Ah = tl.load(at_Ah, mask=mask_Ah, other=0.0)
    raw2_Ah = tl.load(at_Ah + HALF, mask=mask_Ah, other=0.0)
    cos_h = tl.load(cos_sin_ptr + pos * cos_sin_stride + h_h, mask=h_h < HALF, other=0.0)[None, :]
    sin_h = tl.load(cos_sin_ptr + pos * cos_sin_stride + HALF + h_h, mask=h_h < HALF, other=0.0)[
        None, :
    ]

    is_q_A1 = (head_A < NUM_HEADS)[:, None]
    is_k_A1 = ((head_A >= NUM_HEADS) & (head_A < NUM_HEADS + NUM_KV_HEADS))[:, None]
    x1_Ah, x2_Ah = raw1_Ah.to(tl.float32), raw2_Ah.to(tl.float32)
    if HAS_Q_NORM:
        w1_h = tl.load(q_norm_ptr + h_h, mask=h_h < HALF, other=0.0).to(tl.float32)[None, :]
        w2_h = tl.load(q_norm_ptr + HALF + h_h, mask=h_h < HALF, other=0.0).to(tl.float32)[None, :]
        y1_Ah, y2_Ah = _normed(x1_Ah, x2_Ah, w1_h, w2_h, eps, HEAD, dtype)
        x1_Ah, x2_Ah = tl.where(is_q_A1, y1_Ah, x1_Ah), tl.where(is_q_A1, y2_Ah, x2_Ah)
    if HAS_K_NORM:
        w1_h = tl.load(k_norm_ptr + h_h, mask=h_h < HALF, other=0.0).to(tl.float32)[None, :]
        w2_h = tl.load(k_norm_ptr + HALF + h_h, mask=h_h < HALF, other=0.0).to(tl.float32)[None, :]
        y1_Ah, y2_Ah = _normed(x1_Ah, x2_Ah, w1_h, w2_h, eps, HEAD, dtype)
        x1_Ah, x2_Ah = tl.where(is_k_A1, y1_Ah, x1_Ah), tl.where(is_k_A1, y2_Ah, x2_Ah)
    r1_Ah = (x1_Ah * cos_h - x2_Ah * sin_h).to(dtype)
    r2_Ah = (x2_Ah * cos_h + x1_Ah * sin_h).to(dtype)

    q_at = q_out_ptr + (token_idx * NUM_HEADS + head_A)[:, None] * HEAD + h_h[None, :]
    tl.store(q_at, r1_Ah, mask=is_q_A1 & h_mask)
    tl.store(q_at + HALF, r2_Ah, mask=is_q_A1 & h_mask)
    k_scale_A1 = 1.0
    v_scale_A1 = 1.0
    if k_ptr.dtype.element_ty == tl.float8e4nv:
        k_scale_A1 = tl.load(k_scale_ptr + (head_A - NUM_HEADS)[:, None], mask=is_k_A1, other=1.0)
        v_head_A1 = (head_A - NUM_HEADS - NUM_KV_HEADS)[:, None]
        v_scale_A1 = tl.load(
            v_scale_ptr + v_head_A1, mask=(v_head_A1 >= 0) & (v_head_A1 < NUM_KV_HEADS), other=1.0
        )
    block, offset = slot // block_size, slot % block_size
    k_at = k_ptr + block * k_stride_block + offset * k_stride_slot
    k_at = k_at + (head_A - NUM_HEADS)[:, None] * k_stride_head + h_h[None, :]
    tl.store(k_at, _stored(r1_Ah, k_scale_A1, k_ptr.dtype.element_ty), mask=is_k_A1 & h_mask)
    tl.store(k_at + HALF, _stored(r2_Ah, k_scale_A1, k_ptr.dtype.element_ty), mask=is_k_A1 & h_mask)
    v_at = v_ptr + block * v_stride_block + offset * v_stride_slot
    v_at = v_at + (head_A - NUM_HEADS - NUM_KV_HEADS)[:, None] * v_stride_head + h_h[None, :]
    v_mask = mask_Ah & (head_A >= NUM_HEADS + NUM_KV_HEADS)[:, None]
    tl.store(v_at, _stored(raw1_Ah, v_scale_A1, v_ptr.dtype.element_ty), mask=v_mask)
    tl.store(v_at + HALF, _stored(raw2_Ah, v_scale_A1, v_ptr.dtype.element_ty), mask=v_mask)


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
    launch: tuple[int, int] | None = None,
) -> Tensor:
    """Returns rope(norm(q)) and writes rope(norm(k)) and v to their slots.

    See `reference.rope_store.qk_norm_rope_store`. `launch` overrides (heads of one program, warps),
    for measurements.
    """
    block_size, num_kv_heads, head_dim = k_cache_CBKH.shape[1:]
    num_tokens = qkv_TE.shape[0]
    if qkv_TE.stride(1) != 1:
        qkv_TE = qkv_TE.contiguous()
    q_TNH = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv_TE.dtype, device=qkv_TE.device)
    if num_tokens == 0:
        return q_TNH
    heads, num_warps = launch or rope_store_tile(head_dim, num_heads + 2 * num_kv_heads, num_tokens)
    qk_norm_rope_store_kernel[(num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, heads))](
        qkv_TE,
        qkv_TE if q_norm_H is None else q_norm_H,
        qkv_TE if k_norm_H is None else k_norm_H,
        cos_sin_MH,
        pos_T,
        slot_T,
        k_cache_CBKH,
        v_cache_CBKH,
        q_TNH,
        cos_sin_MH if k_scale_K is None else k_scale_K,
        cos_sin_MH if v_scale_K is None else v_scale_K,
        qkv_TE.stride(0),
        cos_sin_MH.stride(0),
        block_size,
        k_cache_CBKH.stride(0),
        k_cache_CBKH.stride(1),
        k_cache_CBKH.stride(2),
        v_cache_CBKH.stride(0),
        v_cache_CBKH.stride(1),
        v_cache_CBKH.stride(2),
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD=head_dim,
        HALF_P=triton.next_power_of_2(head_dim // 2),
        HEADS=heads,
        HAS_Q_NORM=q_norm_H is not None,
        HAS_K_NORM=k_norm_H is not None,
        ONE_TOKEN=num_tokens == 1,
        num_warps=num_warps,
        **launch_options(qkv_TE.device),
    )
    return q_TNH


def rope_store_tile(head_dim: int, num_heads: int, num_tokens: int) -> tuple[int, int]:
    """(heads of one program, warps): about 2048 elements a program.

    With many tokens 4096, if that divides the heads evenly: measured on an H200.
    """
    heads = max(1, 2048 // triton.next_power_of_2(head_dim))
    return (2 * heads if num_tokens > 16 and num_heads % (2 * heads) == 0 else heads), 4


@triton.jit
def rope_kernel(
    x_ptr,  # [T, N, H]
    cos_sin_ptr,  # [M, H] fp32
    pos_ptr,  # [T]
    out_ptr,  # [T, N, H], written
    x_stride_token,
    x_stride_head,
    cos_sin_stride,
    NUM_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HALF_P: tl.constexpr,
    HEADS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    HALF: tl.constexpr = HEAD // 2
    token_idx = tl.program_id(0).to(tl.int64)
    head_A = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    h_h = tl.arange(0, HALF_P)
    mask_Ah = (head_A < NUM_HEADS)[:, None] & (h_h < HALF)[None, :]
    pos = tl.load(pos_ptr + token_idx).to(tl.int64)
    at_Ah = x_ptr + token_idx * x_stride_token + head_A[:, None] * x_stride_head + h_h[None, :]
    x1_Ah = tl.load(at_Ah, mask=mask_Ah, other=0.0).to(tl.float32)
    x2_Ah = tl.load(at_Ah + HALF, mask=mask_Ah, other=0.0).to(tl.float32)
    cos_h = tl.load(cos_sin_ptr + pos * cos_sin_stride + h_h, mask=h_h < HALF, other=0.0)[None, :]
    sin_h = tl.load(cos_sin_ptr + pos * cos_sin_stride + HALF + h_h, mask=h_h < HALF, other=0.0)[
        None, :
    ]
    out_at = out_ptr + (token_idx * NUM_HEADS + head_A)[:, None] * HEAD + h_h[None, :]
    tl.store(out_at, (x1_Ah * cos_h - x2_Ah * sin_h).to(out_ptr.dtype.element_ty), mask=mask_Ah)
    tl.store(
        out_at + HALF, (x2_Ah * cos_h + x1_Ah * sin_h).to(out_ptr.dtype.element_ty), mask=mask_Ah
    )


def rope(x_TNH: Tensor, cos_sin_MH: Tensor, pos_T: Tensor) -> Tensor:
    """[x1·cos − x2·sin | x2·cos + x1·sin]; see `reference.rope_store.rope`."""
    num_tokens, num_heads, head_dim = x_TNH.shape
    if x_TNH.stride(2) != 1:
        x_TNH = x_TNH.contiguous()
    out_TNH = torch.empty((num_tokens, num_heads, head_dim), dtype=x_TNH.dtype, device=x_TNH.device)
    if num_tokens == 0:
        return out_TNH
    heads, num_warps = rope_store_tile(head_dim, num_heads, num_tokens)
    rope_kernel[(num_tokens, triton.cdiv(num_heads, heads))](
        x_TNH,
        cos_sin_MH,
        pos_T,
        out_TNH,
        x_TNH.stride(0),
        x_TNH.stride(1),
        cos_sin_MH.stride(0),
        NUM_HEADS=num_heads,
        HEAD=head_dim,
        HALF_P=triton.next_power_of_2(head_dim // 2),
        HEADS=heads,
        num_warps=num_warps,
        **launch_options(x_TNH.device),
    )
    return out_TNH


@triton.jit(do_not_specialize=["block_size"])
def store_kv_kernel(
    k_in_ptr,  # [T, K, H]
    v_in_ptr,  # [T, K, H]
    k_ptr,  # [C, B, K, H], written
    v_ptr,  # [C, B, K, H], written
    slot_ptr,  # [T]
    k_scale_ptr,  # [K] fp32, read for an fp8 cache
    v_scale_ptr,  # [K] fp32, read for an fp8 cache
    block_size,
    k_in_stride_token,
    k_in_stride_head,
    v_in_stride_token,
    v_in_stride_head,
    k_stride_block,
    k_stride_slot,
    k_stride_head,
    v_stride_block,
    v_stride_slot,
    v_stride_head,
    NUM_KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_P: tl.constexpr,
    HEADS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    token_idx = tl.program_id(0).to(tl.int64)
    head_A = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    h_Hp = tl.arange(0, HEAD_P)
    mask_AHp = (head_A < NUM_KV_HEADS)[:, None] & (h_Hp < HEAD)[None, :]
    slot = tl.load(slot_ptr + token_idx).to(tl.int64)
    block, offset = slot // block_size, slot % block_size
    k_from = (
        k_in_ptr
        + token_idx * k_in_stride_token
        + head_A[:, None] * k_in_stride_head
        + h_Hp[None, :]
    )
    v_from = (
        v_in_ptr
        + token_idx * v_in_stride_token
        + head_A[:, None] * v_in_stride_head
        + h_Hp[None, :]
    )
    k_AHp = tl.load(k_from, mask=mask_AHp, other=0.0)
    v_AHp = tl.load(v_from, mask=mask_AHp, other=0.0)
    k_to = (
        k_ptr
        + block * k_stride_block
        + offset * k_stride_slot
        + head_A[:, None] * k_stride_head
        + h_Hp[None, :]
    )
    v_to = (
        v_ptr
        + block * v_stride_block
        + offset * v_stride_slot
        + head_A[:, None] * v_stride_head
        + h_Hp[None, :]
    )
    k_scale_A1 = 1.0
    v_scale_A1 = 1.0
    if k_ptr.dtype.element_ty == tl.float8e4nv:
        k_scale_A1 = tl.load(k_scale_ptr + head_A, mask=head_A < NUM_KV_HEADS, other=1.0)[:, None]
        v_scale_A1 = tl.load(v_scale_ptr + head_A, mask=head_A < NUM_KV_HEADS, other=1.0)[:, None]
    tl.store(k_to, _stored(k_AHp, k_scale_A1, k_ptr.dtype.element_ty), mask=mask_AHp)
    tl.store(v_to, _stored(v_AHp, v_scale_A1, v_ptr.dtype.element_ty), mask=mask_AHp)


def store_kv(
    k_TKH: Tensor,
    v_TKH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    slot_T: Tensor,
    k_scale_K: Tensor | None = None,
    v_scale_K: Tensor | None = None,
) -> None:
    """Writes token t's key and value into slot slot_T[t] = block · B + offset, in place.

    See `reference.rope_store.store_kv`.
    """
    num_tokens, num_kv_heads, head_dim = k_TKH.shape
    if num_tokens == 0:
        return
    k_TKH = k_TKH if k_TKH.stride(2) == 1 else k_TKH.contiguous()
    v_TKH = v_TKH if v_TKH.stride(2) == 1 else v_TKH.contiguous()
    heads, num_warps = rope_store_tile(head_dim, num_kv_heads, num_tokens)
    store_kv_kernel[(num_tokens, triton.cdiv(num_kv_heads, heads))](
        k_TKH,
        v_TKH,
        k_cache_CBKH,
        v_cache_CBKH,
        slot_T,
        slot_T if k_scale_K is None else k_scale_K,
        slot_T if v_scale_K is None else v_scale_K,
        k_cache_CBKH.shape[1],
        k_TKH.stride(0),
        k_TKH.stride(1),
        v_TKH.stride(0),
        v_TKH.stride(1),
        k_cache_CBKH.stride(0),
        k_cache_CBKH.stride(1),
        k_cache_CBKH.stride(2),
        v_cache_CBKH.stride(0),
        v_cache_CBKH.stride(1),
        v_cache_CBKH.stride(2),
        NUM_KV_HEADS=num_kv_heads,
        HEAD=head_dim,
        HEAD_P=triton.next_power_of_2(head_dim),
        HEADS=heads,
        num_warps=num_warps,
        **launch_options(k_TKH.device),
    )
