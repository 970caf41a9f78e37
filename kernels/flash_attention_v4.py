"""Paged attention by FlashAttention 4 (`flash_attn.cute`, package flash-attn-4).

Its kernels are compiled when a combination of heads, dtype and options is first used, some seconds
each. Pages may have any size: those of a key tile are read by the copy engine, others token by
token. On Hopper it does not split the keys of a row among multiprocessors, so decode of few rows is
slow. Read in 4.0.0b36.

Shapes as in `reference`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

MOST_HEAD = 128  # all multiples of 8 up to this one, and WIDE_HEAD
WIDE_HEAD = 256
KEY_TILE = {MOST_HEAD: 128, WIDE_HEAD: 80}  # Hopper's, causal and without a window


def takes_head(head_dim: int) -> bool:
    """Hopper alone would take more sizes between the two."""
    return head_dim % 8 == 0 and (head_dim <= MOST_HEAD or head_dim == WIDE_HEAD)


def fast_page(head_dim: int) -> int:
    """Tokens of the pages that the copy engine reads."""
    return KEY_TILE[MOST_HEAD if head_dim <= MOST_HEAD else WIDE_HEAD]


def paged_attention(
    module: Any,
    q_TNH: Tensor,
    caches: tuple[Tensor, Tensor],
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    max_q_len: int,
    options: dict[str, Any],
) -> Tensor:
    """`reference.attention.paged_attention`, but tokens of no row are not written.

    With max_q_len > 1, rows with queries must have keys.
    """
    attend, options = module.flash_attn_varlen_func, {**options, "page_table": block_table_RP}
    if max_q_len > 1:
        out_TNH: Tensor = attend(
            q_TNH,
            *caches,
            cu_seqlens_q=q_start_S,
            max_seqlen_q=max_q_len,
            seqused_k=seq_len_R,
            **options,
        )[0]
        return out_TNH
    # without keys it would read the entry before the row's block table
    length_R = seq_len_R.clamp(min=1)
    out_R1NH: Tensor = attend(q_TNH.unsqueeze(1), *caches, seqused_k=length_R, **options)[0]
    return out_R1NH.squeeze(1).masked_fill_((seq_len_R == 0).view(-1, 1, 1), 0)
