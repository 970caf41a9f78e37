"""Multi-head latent attention over a paged cache of latents (DeepSeek-AI 2024,
https://arxiv.org/abs/2405.04434).

A token's cache entry is [latent | rotated key], which all heads share: L + r = Z numbers. Head n
has the key [K_n · latent | rotated key] and the value V_n · latent. Queries that are multiplied by
K_n meet entries as they are: they are *absorbed*. In prompts keys and values may be *expanded*.

Shapes: L latent size | r rotated size | Z = L + r | N heads | P size of a head's key before its
rotated part | H = P + r | V size of a head's value | E the larger of H and V; others: see the
package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from nanovllm.kernels.reference.attention import paged_attention
from nanovllm.kernels.reference.norm_act import rms_norm
from nanovllm.kernels.reference.rope_store import rope

EXPANDS_FROM = 32  # the most new tokens of a row of a step; with fewer all rows are absorbed
LARGEST_HEAD = 256  # of the attention of expanded keys and values


def head_linear(x_TNI: Tensor, weight_NOI: Tensor) -> Tensor:
    """Each head's part of x times the transposed matrix of the head: [T, N, O]."""
    out_NTO = torch.bmm(x_TNI.transpose(0, 1), weight_NOI.transpose(1, 2))
    return out_NTO.transpose(0, 1).contiguous()


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
    """Absorb and rotate queries; normalise latents, rotate their keys, and write both to the slots
    of their tokens, in place.

    Returns the queries [T, N, Z], [K_nᵀ · q[:P] | rope(q[P:])], and what is written, [T, Z],
    [rms_norm(kv[:L]) | rope(kv[L:])]. The rotation is that of `rope_store.rope`.
    """
    plain_size, latent_size = key_NPL.shape[1:]
    latent_TL, key_Tr = kv_TZ.split([latent_size, kv_TZ.shape[1] - latent_size], dim=-1)
    key_Tr = rope(key_Tr.unsqueeze(1), cos_sin_Mr, pos_T).squeeze(1)
    entry_TZ = torch.cat((rms_norm(latent_TL, norm_L, eps), key_Tr), dim=-1)
    cache_CBZ.view(-1, cache_CBZ.shape[-1]).index_copy_(
        0, slot_T.long(), entry_TZ.to(cache_CBZ.dtype)
    )
    plain_TNP, rotated_TNr = q_TNH.split([plain_size, q_TNH.shape[2] - plain_size], dim=-1)
    absorbed_TNL = head_linear(plain_TNP, key_NPL.transpose(1, 2))
    return torch.cat((absorbed_TNL, rope(rotated_TNr, cos_sin_Mr, pos_T)), dim=-1), entry_TZ


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
    """softmax(q · entryᵀ · scale) · latent for each head, with absorbed queries: [T, N, L].

    It is `attention.paged_attention` with one key-value head, whose keys are the cache's entries
    and whose values are their first `latent_size` numbers.
    """
    entries_CB1Z = cache_CBZ.unsqueeze(2)
    out_TNZ = paged_attention(
        q_TNZ, entries_CB1Z, entries_CB1Z, block_table_RP, seq_len_R, q_start_S, max_q_len, scale, 0
    )
    return out_TNZ.narrow(2, 0, latent_size).contiguous()


class Parts(NamedTuple):
    """The functions of a device that make up `latent_span_attention`."""

    absorbed: Callable[..., Tensor] = latent_attention
    paged: Callable[..., Tensor] = paged_attention
    head_linear: Callable[[Tensor, Tensor], Tensor] = head_linear


PARTS = Parts()


def latent_span_attention(
    q_TNH: Tensor,
    q_TNZ: Tensor,
    entry_TZ: Tensor,
    key_NPL: Tensor,
    value_NVL: Tensor,
    cache_CBZ: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    max_q_len: int,
    scale: float,
    parts: Parts = PARTS,
) -> Tensor:
    """Attention of several new tokens a row, times the heads' value matrices: [T, N, V].

    `q_TNH` are the queries that `latent_inputs` got, `q_TNZ` and `entry_TZ` its results. It is
    head_linear(latent_attention(q_TNZ, …), value).

    A query meets an expanded key and value in H + V products, and an entry in L + Z: three times as
    many for the sizes of DeepSeek. So rows whose tokens are all new are expanded, and their keys
    are those of this step's tokens: the shapes are static. Rows with older tokens are absorbed. To
    expand those costs as much as 170 queries save, and memory for the longest context of every
    row. Each form gets length 0 for the other's rows, and gives zeros for them.
    """
    (plain_size, latent_size), value_size = key_NPL.shape[1:], value_NVL.shape[1]
    table, attend = (cache_CBZ, block_table_RP), parts.absorbed
    is_large = max(q_TNH.shape[2], value_size) > LARGEST_HEAD
    if max_q_len < EXPANDS_FROM or is_large:
        o_TNL = attend(q_TNZ, *table, seq_len_R, q_start_S, max_q_len, scale, latent_size)
        return parts.head_linear(o_TNL, value_NVL)
    num_new_R = q_start_S.diff()
    num_R = num_new_R * (seq_len_R == num_new_R)
    o_TNL = attend(q_TNZ, *table, seq_len_R - num_R, q_start_S, max_q_len, scale, latent_size)
    latent_TL, rotated_Tr = entry_TZ.split([latent_size, entry_TZ.shape[1] - latent_size], dim=-1)
    plain_TNP, value_TNV = (
        torch.nn.functional.linear(latent_TL, one.flatten(0, 1)).unflatten(1, (len(one), -1))
        for one in (key_NPL, value_NVL)
    )
    rotated_TNr = rotated_Tr.unsqueeze(1).expand(-1, q_TNH.shape[1], -1)
    q_rotated_TNr = q_TNZ.narrow(2, latent_size, rotated_Tr.shape[1])
    o_TNV = causal_attention(
        torch.cat((q_TNH.narrow(2, 0, plain_size), q_rotated_TNr), dim=-1),
        torch.cat((plain_TNP, rotated_TNr), dim=-1),
        value_TNV, num_R, q_start_S, max_q_len, scale, parts.paged,
    )  # fmt: skip
    return o_TNV + parts.head_linear(o_TNL, value_NVL)


def causal_attention(
    q_TNH: Tensor,
    k_TNH: Tensor,
    v_TNV: Tensor,
    num_R: Tensor,
    q_start_S: Tensor,
    max_q_len: int,
    scale: float,
    paged: Callable[..., Tensor] = paged_attention,
) -> Tensor:
    """Causal attention of each row's tokens to each other, without a cache: [T, N, V].

    Row r owns tokens q_start_S[r] .. q_start_S[r + 1] − 1. num_R[r] is their number, or 0 for a row
    that is left out. The output is zero for its tokens, and for those of no row.

    It is `attention.paged_attention`, or `paged` in its place, over a cache whose blocks have one
    token. Keys and values are padded to one size.
    """
    (num_tokens, _, key_size), value_size = q_TNH.shape, v_TNV.shape[2]
    size = max(key_size, value_size)
    q_TNE, k_TNE = (pad(x_TNH, (0, size - key_size)) for x_TNH in (q_TNH, k_TNH))
    v_TNE = pad(v_TNV, (0, size - value_size))
    token_T = torch.arange(num_tokens, device=q_TNH.device, dtype=torch.int32)
    table_RT = q_start_S.narrow(0, 0, len(num_R)).unsqueeze(1).int() + token_T
    out_TNE = paged(
        q_TNE, k_TNE.unsqueeze(1), v_TNE.unsqueeze(1), table_RT, num_R, q_start_S, max_q_len,
        scale, 0,
    )  # fmt: skip
    return out_TNE.narrow(2, 0, value_size)
