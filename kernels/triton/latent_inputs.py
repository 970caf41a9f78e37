"""The inputs of latent attention in Triton: a norm, the rotations, and the write into the cache.

A program takes one token. It rotates the keys and queries as two halves each. cuBLAS multiplies
queries by the heads' key matrices, and writes to the other part of the same result.

Shapes: T tokens | N heads | P size of a head's query before its rotated part | L latent size | r
rotated size | Z = L + r | M positions in the rotary table | C blocks in the cache | B block size in
tokens | h = r/2; "p" after a letter: padded to a power of two
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common import launch_options, wait_for_earlier_kernels


@triton.jit(do_not_specialize=["block_size"])
def latent_inputs_kernel(
    q_ptr,  # [T, N, r], the rotated part of queries
    kv_ptr,  # [T, Z]
    norm_ptr,  # [L]
    cos_sin_ptr,  # [M, r] fp32
    pos_ptr,  # [T]
    slot_ptr,  # [T]
    cache_ptr,  # [C, B, Z], written
    q_out_ptr,  # [T, N, Z], of which [L:] is written
    entry_ptr,  # [T, Z], written
    q_stride_token,
    q_stride_head,
    kv_stride,
    cos_sin_stride,
    block_size,
    cache_stride_block,
    cache_stride_slot,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_HEADS_P: tl.constexpr,
    LATENT: tl.constexpr,
    LATENT_P: tl.constexpr,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    dtype: tl.constexpr = kv_ptr.dtype.element_ty
    ENTRY: tl.constexpr = LATENT + 2 * HALF
    token_idx = tl.program_id(0).to(tl.int64)
    l_Lp, h_hp, head_Np = tl.arange(0, LATENT_P), tl.arange(0, HALF_P), tl.arange(0, NUM_HEADS_P)
    mask_Lp, mask_hp = l_Lp < LATENT, h_hp < HALF
    pos = tl.load(pos_ptr + token_idx).to(tl.int64)
    slot = tl.load(slot_ptr + token_idx).to(tl.int64)
    table_at = cos_sin_ptr + pos * cos_sin_stride + h_hp
    cos_hp = tl.load(table_at, mask=mask_hp, other=0.0)
    sin_hp = tl.load(table_at + HALF, mask=mask_hp, other=0.0)

    x_at = kv_ptr + token_idx * kv_stride
    x_Lp = tl.load(x_at + l_Lp, mask=mask_Lp, other=0.0).to(tl.float32)
    w_Lp = tl.load(norm_ptr + l_Lp, mask=mask_Lp, other=0.0)
    # rounded before and after the weight, as the reference does
    normed_Lp = (x_Lp * tl.rsqrt(tl.sum(x_Lp * x_Lp, 0) / LATENT + eps)).to(dtype)
    latent_Lp = (normed_Lp.to(tl.float32) * w_Lp.to(tl.float32)).to(dtype)
    x1_hp = tl.load(x_at + LATENT + h_hp, mask=mask_hp, other=0.0).to(tl.float32)
    x2_hp = tl.load(x_at + LATENT + HALF + h_hp, mask=mask_hp, other=0.0).to(tl.float32)
    r1_hp = (x1_hp * cos_hp - x2_hp * sin_hp).to(dtype)
    r2_hp = (x2_hp * cos_hp + x1_hp * sin_hp).to(dtype)
    block, offset = slot // block_size, slot % block_size
    cache_at = cache_ptr + block * cache_stride_block + offset * cache_stride_slot
    for i in tl.static_range(2):
        at = entry_ptr + token_idx * ENTRY if i == 0 else cache_at
        tl.store(at + l_Lp, latent_Lp, mask=mask_Lp)
        tl.store(at + LATENT + h_hp, r1_hp, mask=mask_hp)
        tl.store(at + LATENT + HALF + h_hp, r2_hp, mask=mask_hp)

    mask_Nphp = (head_Np < NUM_HEADS)[:, None] & mask_hp[None, :]
    q_at = q_ptr + token_idx * q_stride_token + head_Np[:, None] * q_stride_head + h_hp[None, :]
    q1_Nphp = tl.load(q_at, mask=mask_Nphp, other=0.0).to(tl.float32)
    q2_Nphp = tl.load(q_at + HALF, mask=mask_Nphp, other=0.0).to(tl.float32)
    out_at = q_out_ptr + (token_idx * NUM_HEADS + head_Np)[:, None] * ENTRY + h_hp[None, :]
    cos_1hp, sin_1hp = cos_hp[None, :], sin_hp[None, :]
    tl.store(out_at + LATENT, (q1_Nphp * cos_1hp - q2_Nphp * sin_1hp).to(dtype), mask=mask_Nphp)
    tl.store(
        out_at + LATENT + HALF, (q2_Nphp * cos_1hp + q1_Nphp * sin_1hp).to(dtype), mask=mask_Nphp
    )


def inputs_constants(num_heads: int, latent_size: int, rotated_size: int) -> dict[str, int]:
    """The kernel's compile-time constants."""
    half = rotated_size // 2
    return {
        "NUM_HEADS": num_heads,
        "NUM_HEADS_P": triton.next_power_of_2(num_heads),
        "LATENT": latent_size,
        "LATENT_P": triton.next_power_of_2(latent_size),
        "HALF": half,
        "HALF_P": triton.next_power_of_2(half),
    }


def latent_inputs(
    q_TNH: Tensor,
    key_NPL: Tensor,
    kv_TZ: Tensor,
    norm_L: Tensor,
    cos_sin_Mr: Tensor,
    pos_T: Tensor,
    slot_T: Tensor,
    cache_CBZ: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See `reference.latent_attention.latent_inputs`."""
    kv_TZ = kv_TZ if kv_TZ.stride(1) == 1 else kv_TZ.contiguous()
    q_TNH = q_TNH if q_TNH.stride(2) == 1 else q_TNH.contiguous()
    (num_heads, plain_size, latent_size), (num_tokens, entry_size) = key_NPL.shape, kv_TZ.shape
    q_TNZ = q_TNH.new_empty((num_tokens, num_heads, entry_size))
    entry_TZ = kv_TZ.new_empty((num_tokens, entry_size))
    if num_tokens == 0:
        return q_TNZ, entry_TZ
    plain_TNP, rotated_TNr = q_TNH.split([plain_size, q_TNH.shape[2] - plain_size], dim=-1)
    latent_inputs_kernel[(num_tokens,)](
        rotated_TNr,
        kv_TZ,
        norm_L,
        cos_sin_Mr,
        pos_T,
        slot_T,
        cache_CBZ,
        q_TNZ,
        entry_TZ,
        *rotated_TNr.stride()[:2],
        kv_TZ.stride(0),
        cos_sin_Mr.stride(0),
        cache_CBZ.shape[1],
        *cache_CBZ.stride()[:2],
        eps,
        **inputs_constants(num_heads, latent_size, entry_size - latent_size),
        num_warps=4,
        **launch_options(kv_TZ.device),
    )
    absorbed_NTL = q_TNZ.narrow(2, 0, latent_size).transpose(0, 1)
    torch.bmm(plain_TNP.transpose(0, 1), key_NPL, out=absorbed_NTL)
    return q_TNZ, entry_TZ


def head_linear(x_TNI: Tensor, weight_NOI: Tensor) -> Tensor:
    """See `reference.latent_attention.head_linear`: cuBLAS writes the result in its order."""
    out_TNO = x_TNI.new_empty((*x_TNI.shape[:2], weight_NOI.shape[1]))
    torch.bmm(x_TNI.transpose(0, 1), weight_NOI.transpose(1, 2), out=out_TNO.transpose(0, 1))
    return out_TNO
