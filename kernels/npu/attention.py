"""Attention over the paged cache by Ascend's fused_infer_attention_score.

Shapes: T tokens | R rows | P blocks per row | C blocks in the cache | B block size | N query heads
K key-value heads | H head size | A = K · H
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels import ops, reference

# fused_infer_attention_score reads a causal mask of this size for any lengths (its sparse mode 3).
# It takes block sizes of the paged cache that are multiples of 128 if a row has several query
# tokens, and of at most 512 if it has one.
CAUSAL_MASK_SIZE = 2048
RIGHT_DOWN_CAUSAL = 3
BLOCK_SIZE_STEP, MAX_BLOCK_SIZE = 128, 512


def causal_mask(device: torch.device) -> Tensor:
    """[2048, 2048] bool, true where a key must not be seen: the mask of sparse mode 3."""
    position = torch.arange(CAUSAL_MASK_SIZE, device=device)
    return position > position.unsqueeze(1)


def check_attention(block_size: int, max_q_len: int, window: int) -> None:
    """ValueError for what fused_infer_attention_score does not support on a paged cache."""
    if window > 0:
        raise ValueError(
            f"the checkpoint has a sliding window of {window} tokens: attention windows are not "
            "supported on an NPU"
        )
    if block_size % BLOCK_SIZE_STEP or block_size > MAX_BLOCK_SIZE:
        raise ValueError(
            f"kvcache_block_size is {block_size}: on an NPU it must be a multiple of "
            f"{BLOCK_SIZE_STEP}, at most {MAX_BLOCK_SIZE}"
        )


def _check_inputs(
    q_TNH: Tensor, k_cache_CBKH: Tensor, block_table_RP: Tensor, seq_len_R: Tensor, num_rows: int
) -> None:
    """Asserts shapes and dtypes: torchair accepts any, and the op would then read wrong memory."""
    assert q_TNH.dtype == k_cache_CBKH.dtype, (q_TNH.dtype, k_cache_CBKH.dtype)
    assert (
        q_TNH.shape[2] == k_cache_CBKH.shape[3] and q_TNH.shape[1] % k_cache_CBKH.shape[2] == 0
    ), (q_TNH.shape, k_cache_CBKH.shape)
    assert block_table_RP.dtype == torch.int32, block_table_RP.dtype
    assert block_table_RP.shape[0] == seq_len_R.shape[0] == num_rows, (
        block_table_RP.shape,
        seq_len_R.shape,
        num_rows,
    )


def paged_attention_in_graph(
    q_TNH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    max_q_len: int,
    scale: float,
    window: int,
) -> Tensor:
    """`reference.attention.paged_attention` with the lengths as tensors: one graph serves all
    lengths.

    It runs in graph mode of GE only.

    Decode uses layout BSH with one token a row. Prefill uses layout TND, in which the last running
    token count must be T: tokens that belong to no row become one more row, on the padding block.
    """
    from torchair.ops import npu_fused_infer_attention_score as attend

    check_attention(k_cache_CBKH.shape[1], max_q_len, window)
    num_tokens, num_heads, head_dim = q_TNH.shape
    _check_inputs(
        q_TNH,
        k_cache_CBKH,
        block_table_RP,
        seq_len_R,
        num_tokens if max_q_len == 1 else q_start_S.shape[0] - 1,
    )
    block_size, num_kv_heads = k_cache_CBKH.shape[1:3]
    settings: dict[str, Any] = {
        "num_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "scale": scale,
        "block_size": block_size,
    }
    k_CBA, v_CBA = k_cache_CBKH.flatten(2), v_cache_CBKH.flatten(2)
    if max_q_len == 1:
        out, _ = attend(
            q_TNH.reshape(num_tokens, 1, -1),
            k_CBA,
            v_CBA,
            block_table=block_table_RP,
            actual_seq_lengths_kv=seq_len_R.long(),
            input_layout="BSH",
            **settings,
        )
        return out.view(num_tokens, num_heads, head_dim)
    capacity = block_table_RP.shape[1] * block_size
    q_end_R = q_start_S[1:].long()
    num_left_1 = (q_end_R[-1:] * -1 + num_tokens).clamp(1, capacity)
    out, _ = attend(
        q_TNH,
        k_CBA,
        v_CBA,
        atten_mask=causal_mask(q_TNH.device),
        block_table=torch.cat((block_table_RP, torch.zeros_like(block_table_RP[:1]))),
        actual_seq_lengths=torch.cat((q_end_R, torch.full_like(num_left_1, num_tokens))),
        actual_seq_lengths_kv=torch.cat((seq_len_R.long(), num_left_1)),
        input_layout="TND",
        sparse_mode=RIGHT_DOWN_CAUSAL,
        **settings,
    )
    return out


def paged_attention_eager(
    q_TNH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    max_q_len: int,
    scale: float,
    window: int,
    k_scale_K: None = None,
    v_scale_K: None = None,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """The same op outside a graph. It takes lengths as numbers, so it waits for the device.

    With sinks, a window, or pages beside others in a tensor it is plain torch.
    """
    if sinks_N is not None or window > 0 or not k_cache_CBKH.is_contiguous():
        return reference.attention.paged_attention(
            q_TNH, k_cache_CBKH, v_cache_CBKH, block_table_RP, seq_len_R, q_start_S, max_q_len,
            scale, window, sinks_N=sinks_N,
        )  # fmt: skip
    check_attention(k_cache_CBKH.shape[1], max_q_len, window)
    num_tokens, num_heads = q_TNH.shape[:2]
    block_size, num_kv_heads = k_cache_CBKH.shape[1:3]
    seq_lens = seq_len_R.tolist()
    if max_q_len == 1:
        return _decode_attention(q_TNH, k_cache_CBKH, v_cache_CBKH, block_table_RP, seq_lens, scale)
    # rows without tokens and tokens without a row are left out: the op gets no padding
    starts = q_start_S.tolist()
    rows = [row for row in range(len(seq_lens)) if starts[row + 1] > starts[row]]
    if not rows:
        return torch.zeros_like(q_TNH)
    num_used = starts[-1]
    row_idx = torch.tensor(rows, device=q_TNH.device)
    out, _ = torch.ops.npu.npu_fused_infer_attention_score(
        q_TNH[:num_used].contiguous(),
        k_cache_CBKH.flatten(2),
        v_cache_CBKH.flatten(2),
        atten_mask=causal_mask(q_TNH.device),
        block_table=block_table_RP.index_select(0, row_idx),
        actual_seq_lengths=[starts[row + 1] for row in rows],
        actual_seq_lengths_kv=[seq_lens[row] for row in rows],
        input_layout="TND",
        sparse_mode=RIGHT_DOWN_CAUSAL,
        num_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        scale=scale,
        block_size=block_size,
    )
    return torch.nn.functional.pad(out, (0, 0, 0, 0, 0, num_tokens - num_used))


def paged_attention_captured(
    q_TNH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    max_q_len: int,
    scale: float,
    window: int,
) -> Tensor:
    """For captured graphs: decode uses a length of 1 a row, which is replaced before each replay.

    Outside GE the op takes lengths as numbers on the host. Prefill steps are not captured and keep
    our op.
    """
    if max_q_len > 1:
        return ops.paged_attention(
            q_TNH,
            k_cache_CBKH,
            v_cache_CBKH,
            block_table_RP,
            seq_len_R,
            q_start_S,
            max_q_len,
            scale,
            window,
        )
    check_attention(k_cache_CBKH.shape[1], max_q_len, window)
    return _decode_attention(
        q_TNH, k_cache_CBKH, v_cache_CBKH, block_table_RP, [1] * q_TNH.shape[0], scale
    )


def _decode_attention(
    q_RNH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    block_table_RP: Tensor,
    seq_lens: list[int],
    scale: float,
) -> Tensor:
    num_rows, num_heads, head_dim = q_RNH.shape
    out, _ = torch.ops.npu.npu_fused_infer_attention_score(
        q_RNH.reshape(num_rows, 1, -1),
        k_cache_CBKH.flatten(2),
        v_cache_CBKH.flatten(2),
        block_table=block_table_RP,
        actual_seq_lengths_kv=seq_lens,
        input_layout="BSH",
        num_heads=num_heads,
        num_key_value_heads=k_cache_CBKH.shape[2],
        scale=scale,
        block_size=k_cache_CBKH.shape[1],
    )
    return out.view(num_rows, num_heads, head_dim)
