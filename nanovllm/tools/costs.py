"""What a call must at least move and compute: bytes of the tensors it reads and writes, flops of its products."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Calls that copy what they pick out: they read as much as they write, not all they pick from.
_PICKING = (
    "embedding",
    "index",
    "index_select",
    "gather",
    "decode_inputs",
    "span_inputs",
    "sampling_inputs",
)


def cost(
    op: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    result: Any,
    seq_lens: Sequence[int] | None = None,
) -> tuple[int, int]:
    """(bytes, flops) of one call of an operator with these arguments. Views are free.

    A cache is read and written as far as the call's rows need it; a table of rotations likewise. `seq_lens` stands for the
    rows' lengths where the call's own are not those that are meant.
    """
    if op is operator.getitem or op.is_view:
        return 0, 0
    name = op._schema.name.partition("::")[2]
    named = {argument.name: value for argument, value in zip(op._schema.arguments, args)} | kwargs
    out_bytes = sum(tensor.nbytes for tensor in _tensors(result))
    if name == "paged_attention":
        return _attention(named, out_bytes, seq_lens)
    if name == "qk_norm_rope_store":
        num_tokens, kv_width = (
            named["qkv"].shape[0],
            named["k_cache"].shape[2] * named["k_cache"].shape[3],
        )
        stored = 2 * num_tokens * kv_width * named["k_cache"].element_size()
        table = num_tokens * named["cos_sin"].shape[1] * named["cos_sin"].element_size()
        return named["qkv"].nbytes + out_bytes + stored + table, 0
    if name == "store_kv":
        stored = (named["k"].numel() + named["v"].numel()) * named["k_cache"].element_size()
        return named["k"].nbytes + named["v"].nbytes + stored, 0
    if name == "rope":
        return named["x"].nbytes + out_bytes + named["pos"].shape[0] * named["cos_sin"].shape[
            1
        ] * 4, 0
    if name == "advance":
        return 5 * named["row_idx"].nbytes, 0
    if name in _PICKING:
        return 2 * out_bytes, 0
    read = {
        tensor.data_ptr(): tensor.nbytes for tensor in _tensors([list(args), list(kwargs.values())])
    }
    return sum(read.values()) + _written_over(op, named) + out_bytes, _product_flops(named)


def _written_over(op: Any, named: dict[str, Any]) -> int:
    """Bytes of the arguments that the call changes."""
    changed = [
        argument.name
        for argument in op._schema.arguments
        if argument.alias_info and argument.alias_info.is_write
    ]
    return sum(tensor.nbytes for tensor in _tensors([named.get(name) for name in changed]))


def _product_flops(named: dict[str, Any]) -> int:
    """2 · rows · weight for `linear` and its kin, and for products of torch's library."""
    left = named.get("x", named.get("mat1", named.get("self")))
    weight = named.get("weight", named.get("mat2"))
    if (
        not isinstance(left, Tensor)
        or not isinstance(weight, Tensor)
        or weight.dim() != 2
        or left.dim() != 2
    ):
        return 0
    return 2 * left.shape[0] * weight.numel()


def _attention(
    named: dict[str, Any], out_bytes: int, lengths: Sequence[int] | None
) -> tuple[int, int]:
    """Keys and values of every row's tokens once; 4 flops for each of them, query and lane that sees it."""
    q_TNH, k_CBKH = named["q"], named["k_cache"]
    seq_lens, window = named["seq_len"].tolist() if lengths is None else lengths, named["window"]
    num_queries = [1] * len(seq_lens)
    if named["max_q_len"] != 1:
        num_queries = torch.diff(named["q_start"]).tolist()
    keys = pairs = 0
    for num, seq_len in zip(num_queries, seq_lens):
        if num:
            seen = seq_len if window <= 0 else min(seq_len, window + num - 1)
            keys += seen
            pairs += num * seen - num * (num - 1) // 2
    num_bytes = (
        q_TNH.nbytes
        + out_bytes
        + 2 * keys * k_CBKH.shape[2] * k_CBKH.shape[3] * k_CBKH.element_size()
    )
    return num_bytes, 4 * pairs * q_TNH.shape[1] * q_TNH.shape[2]


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, (tuple, list)):
        return [tensor for value in tree for tensor in _tensors(value)]
    return []
