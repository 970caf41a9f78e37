"""The meaning of Ascend's ops for mixtures of experts in plain torch, from their documentation.

As in semantics.py, nothing here comes from `kernels/reference/`. Sources: torch_npu's API pages
of npu_moe_gating_top_k_softmax, npu_moe_init_routing_v2, npu_grouped_matmul and
npu_moe_finalize_routing, and CANN's pages of the aclnn functions behind them. Asserts hold the
limits of these pages. What the pages leave open is chosen so that code which relies on it fails,
except for the order of equal probabilities.

T tokens | K experts per token | P = T·K pairs, token by token | E experts | H hidden
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def moe_gating_top_k_softmax(
    x: Tensor, finished: Tensor | None = None, k: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """MoeGatingTopKSoftmax: the k largest of softmax(x) in x's dtype, and their columns, int32.

    row_idx[t, j] = j · T + t. The weights are not divided by their sum. The pages do not say which
    of two equal values comes first: here the smaller column. They say nothing about NaN: here such
    a row gives columns that are not there.
    """
    assert x.dim() == 2 and x.dtype in FLOATS and finished is None
    assert 0 < k <= x.shape[1] and k <= 1024 and x.shape[1] <= 1024, (k, x.shape)
    shifted = torch.exp(x.float() - x.float().amax(-1, keepdim=True))
    probability = shifted / shifted.sum(-1, keepdim=True)
    column = torch.arange(x.shape[1])
    y, expert_idx = torch.zeros(len(x), k), torch.full((len(x), k), -1, dtype=torch.int32)
    for row, values in enumerate(probability):
        if not values.isnan().any():
            best = sorted(column.tolist(), key=lambda c: (-float(values[c]), c))[:k]
            y[row], expert_idx[row] = values[best], torch.tensor(best, dtype=torch.int32)
    row_idx = torch.arange(len(x) * k, dtype=torch.int32).view(k, len(x)).T.contiguous()
    return y.to(x.dtype), expert_idx, row_idx


def moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """MoeInitRoutingV3 without quantisation, dropping or padding, for all experts.

    The pairs are sorted by expert: expanded_x[i] = x[token of the i-th pair], and with
    row_idx_type 0 expanded_row_idx[pair] = i. With expert_tokens_num_type 1 the third result is the
    number of pairs of each expert, int64. The order within an expert is open: here the last pair
    comes first. The fourth result is undefined without `scale`: here NaN.
    """
    assert scale is None and offset is None and quant_mode == -1 and x_dtype is None
    assert x.dim() == expert_idx.dim() == 2 and x.dtype in FLOATS
    assert expert_idx.dtype == torch.int32 and expert_idx.shape[0] == x.shape[0]
    num_pairs, top_k = expert_idx.numel(), expert_idx.shape[1]
    assert drop_pad_mode == 0 and active_num in (-1, 0, num_pairs), active_num
    assert expert_tokens_num_type == 1 and expert_tokens_num_flag and row_idx_type == 0
    assert 0 < expert_num <= 10240 and list(active_expert_range) == [0, expert_num]
    experts = expert_idx.flatten().tolist()
    assert all(0 <= expert < expert_num for expert in experts), f"experts {experts}"
    pairs = sorted(range(num_pairs), key=lambda pair: (experts[pair], -pair))
    expanded_row_idx = torch.empty(num_pairs, dtype=torch.int32)
    expanded_row_idx[pairs] = torch.arange(num_pairs, dtype=torch.int32)
    counts = torch.tensor([experts.count(expert) for expert in range(expert_num)])
    expanded_x = x[[pair // top_k for pair in pairs]]
    return expanded_x, expanded_row_idx, counts, torch.full((num_pairs,), float("nan"))


def grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    group_list: Tensor,
    split_item: int = 0,
    group_type: int | None = None,
    group_list_type: int = 0,
    **other: Any,
) -> list[Tensor]:
    """GroupedMatmul of one x [P, A], one weight [E, A, B] and one result, grouped by rows of x.

    group_list_type 0: running ends of the groups; 1: their sizes. Rows behind the last group are
    not written: here NaN. The product is summed in fp32 and rounded to x's dtype.
    """
    assert not any(other.values()), f"not modelled: {other}"
    ((rows,), (matrices,)) = x, weight
    assert rows.dim() == 2 and matrices.dim() == 3 and rows.shape[1] == matrices.shape[1]
    assert rows.dtype == matrices.dtype and rows.dtype in FLOATS, (rows.dtype, matrices.dtype)
    assert group_type == 0 and split_item in (2, 3), (group_type, split_item)
    inner = {matrices.shape[1], matrices.shape[2], rows.shape[1]}
    assert max(inner) < 65536 and 1 < len(matrices) <= 1024, matrices.shape
    assert group_list.dtype == torch.int64 and group_list.shape == (len(matrices),)
    sizes = group_list if group_list_type == 1 else group_list.diff(prepend=torch.tensor([0]))
    num_rest = len(rows) - int(sizes.sum())
    assert int(sizes.min()) >= 0 and num_rest >= 0, f"groups {sizes.tolist()}"
    parts = [
        part.float() @ matrix.float() if len(part) else part.new_empty(0, matrices.shape[2]).float()
        for part, matrix in zip(rows.split([*sizes.tolist(), num_rest])[:-1], matrices, strict=True)
    ]
    parts.append(torch.full((num_rest, matrices.shape[2]), float("nan")))
    return [torch.cat(parts).to(rows.dtype)]


def moe_finalize_routing(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None = None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> Tensor:
    """MoeFinalizeRoutingV2 without dropped pairs: out[t] = Σ_j scales[t, j] · rows[index[t, j]].

    drop_pad_mode 2: the index holds the pairs token by token; 0: all first experts, then all second
    ones, and so on. skip1 and skip2 are added if both are given.
    """
    rows, index = expanded_permuted_rows, expanded_src_to_dst_row
    assert bias is None and scales is not None and drop_pad_mode in (0, 2)
    assert rows.dtype in FLOATS and scales.dtype == rows.dtype, (rows.dtype, scales.dtype)
    assert index.dtype == torch.int32 and rows.shape[0] == scales.numel() == index.numel()
    assert (skip1 is None) == (skip2 is None)
    table = index.view(scales.shape) if drop_pad_mode == 2 else index.view(scales.shape[::-1]).T
    out = (rows[table.long()].float() * scales.float().unsqueeze(-1)).sum(1)
    for skip in (skip1, skip2):
        out = out if skip is None else out + skip.float()
    return out.to(rows.dtype)
