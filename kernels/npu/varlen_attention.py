"""Attention of a vision tower on an NPU: each segment by itself, by fused_infer_attention_score.

In layout TND the op takes packed rows with running counts of their queries and of their keys. Here
rows are segments. Patches behind the last segment are one more row, since the last count must be T;
their results mean nothing.

T patches | N heads | H head size | S = segments + 1
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# The op's documentation: at most so many rows in layout TND. It names few head sizes; those of
# towers are filled up with zeros to multiples of 64, which engines on Ascend are known to use.
MAX_ROWS, HEAD_STEP = 4096, 64


def varlen_attention_in_graph(
    q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, start_S: Tensor, max_len: int, scale: float
) -> Tensor:
    """`reference.attention.varlen_attention` with the counts as a tensor: one graph serves all
    sizes of images. It runs in graph mode of GE only."""
    from torchair.ops import npu_fused_infer_attention_score as attend

    num_patches, num_heads, head_dim = q_TNH.shape
    _check(q_TNH, k_TNH, v_TNH, len(start_S))
    end_S = torch.cat((start_S[1:].long(), torch.full_like(start_S[:1], num_patches).long()))
    out_TNP, _ = attend(
        *map(_filled_up, (q_TNH, k_TNH, v_TNH)),
        actual_seq_lengths=end_S,
        actual_seq_lengths_kv=end_S,
        **_settings(num_heads, scale),
    )
    return out_TNP[:, :, :head_dim].contiguous()  # as the meaning gives it, for views of it


def varlen_attention_eager(
    q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, start_S: Tensor, max_len: int, scale: float
) -> Tensor:
    """The same outside a graph, where the op takes numbers: it waits for the device. It gets
    no padding, whose results are zeros."""
    num_patches, num_heads, head_dim = q_TNH.shape
    ends = sorted({end for end in start_S[1:].tolist() if end})
    _check(q_TNH, k_TNH, v_TNH, len(ends))
    if not ends:
        return torch.zeros_like(q_TNH)
    out_tNP, _ = torch.ops.npu.npu_fused_infer_attention_score(
        *(_filled_up(x_TNH[: ends[-1]]) for x_TNH in (q_TNH, k_TNH, v_TNH)),
        actual_seq_lengths=ends,
        actual_seq_lengths_kv=ends,
        **_settings(num_heads, scale),
    )
    rest = (0, 0, 0, 0, 0, num_patches - ends[-1])
    return torch.nn.functional.pad(out_tNP[:, :, :head_dim], rest)


def _settings(num_heads: int, scale: float) -> dict[str, Any]:
    return {
        "num_heads": num_heads,
        "num_key_value_heads": num_heads,
        "scale": scale,
        "input_layout": "TND",
    }


def _check(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, num_rows: int) -> None:
    """ValueError for too many segments. Asserts shapes and dtypes: torchair accepts any."""
    if num_rows > MAX_ROWS:
        raise ValueError(
            f"a call of the vision tower has {num_rows} segments: on an NPU attention takes at "
            f"most {MAX_ROWS}. Lower vision_patch_budgets"
        )
    assert q_TNH.shape == k_TNH.shape == v_TNH.shape, (q_TNH.shape, k_TNH.shape, v_TNH.shape)
    assert q_TNH.dtype == k_TNH.dtype == v_TNH.dtype, (q_TNH.dtype, k_TNH.dtype, v_TNH.dtype)


def _filled_up(x_TNH: Tensor) -> Tensor:
    """With zeros behind each head, which change neither products nor other results."""
    missing = -x_TNH.shape[2] % HEAD_STEP
    if not missing:
        return x_TNH.contiguous()
    return torch.cat((x_TNH, x_TNH.new_zeros((*x_TNH.shape[:2], missing))), dim=2)
