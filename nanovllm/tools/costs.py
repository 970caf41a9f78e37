"""The minimum bytes that a call reads and writes, and the flops of its products."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Calls that gather: they read as many bytes as they write, not the whole table. (The engine counts
# the experts that the last two copy over the bus: see `ExpertTraffic`.)
_PICKING = {
    "embedding", "index", "index_select", "gather",
    "decode_inputs", "span_inputs", "sampling_inputs", "fetch_experts", "stream_experts",
}  # fmt: skip

# arguments with the matrices of experts, and those with the experts that are not resident
_STACKS = {
    "gate_up", "down", "weight", "slots_gate_up", "slots_down", "code", "scale", "offset",
    "down_code", "down_scale", "down_offset",
}  # fmt: skip
# of these: codes of so many bits, and what is not multiplied
_CODES = {"code": "bits", "down_code": "down_bits"}
_SCALES = {"scale", "offset", "down_scale", "down_offset"}
_ELSEWHERE = {"others_gate_up", "others_down"}


def cost(
    op: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    result: Any,
    seq_lens: Sequence[int] | None = None,
) -> tuple[int, int]:
    """(bytes, flops) of one call of an operator with these arguments. Views are free.

    Of caches and rotation tables, only the entries of the call's rows count; of experts, those that
    its tokens choose and that this rank has. `seq_lens` replaces the lengths of rows that attention
    is called with.
    """
    if op is operator.getitem or op.is_view:
        return 0, 0
    name = op._schema.name.partition("::")[2]
    named = _named(op, args, kwargs)
    out_bytes = sum(tensor.nbytes for tensor in _tensors(result))
    if name in ("paged_attention", "latent_attention"):
        return _attention(name, named, out_bytes, seq_lens)
    if name == "qk_norm_rope_store":
        num_tokens = named["qkv"].shape[0]
        stored = num_tokens * _slot_bytes(named)
        table = num_tokens * named["cos_sin"].shape[1] * named["cos_sin"].element_size()
        return named["qkv"].nbytes + out_bytes + stored + table, 0
    if name in _OF_LATENTS:
        return _OF_LATENTS[name](named, out_bytes)
    if name == "store_kv":
        stored = named["k"].shape[0] * _slot_bytes(named)
        return named["k"].nbytes + named["v"].nbytes + stored, 0
    if name == "rope":
        table = named["pos"].shape[0] * named["cos_sin"].shape[1] * 4
        return named["x"].nbytes + out_bytes + table, 0
    if name == "advance":
        return 5 * named["row_idx"].nbytes, 0
    if name in _PICKING:
        return 2 * out_bytes, 0
    if "expert" in named:
        return _experts(named, out_bytes)
    arguments = _tensors([list(args), list(kwargs.values())])
    read = {tensor.data_ptr(): tensor.nbytes for tensor in arguments}
    return sum(read.values()) + _written_over(op, named) + out_bytes, _product_flops(named)


def _named(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {argument.name: value for argument, value in zip(op._schema.arguments, args)} | kwargs


def _written_over(op: Any, named: dict[str, Any]) -> int:
    """Bytes of the arguments that the call changes in place."""
    changed = [a.name for a in op._schema.arguments if a.alias_info and a.alias_info.is_write]
    return sum(tensor.nbytes for tensor in _tensors([named.get(name) for name in changed]))


def _product_flops(named: dict[str, Any]) -> int:
    """2 · rows · weight, for nanovllm's linear ops and torch's matrix products; else 0."""
    left: Any = named.get("x", named.get("mat1", named.get("self")))
    weight: Any = named.get("weight", named.get("mat2", named.get("router")))
    if all(isinstance(factor, Tensor) and factor.dim() == 2 for factor in (left, weight)):
        return 2 * int(left.shape[0]) * int(weight.numel())
    return 0


def tokens_per_expert(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """The number of tokens of each expert in a call that multiplies by experts; empty otherwise.

    Experts of other ranks count as well: all ranks choose the same.
    """
    named = _named(op, args, kwargs)
    if "expert" not in named:
        return ()
    all_X = named.get("local")
    if all_X is None:
        all_X = next(iter(_stacks(named).values()), ())
    num_experts = named.get("num_experts") or len(all_X)
    return tuple(named["expert"].flatten().bincount(minlength=num_experts).tolist())


def _stacks(named: dict[str, Any]) -> dict[str, Tensor]:
    """The arguments that hold matrices of experts, [E, O, D]."""
    given = {name: named[name] for name in named if name in _STACKS}
    return {name: one for name, one in given.items() if isinstance(one, Tensor) and one.dim() == 3}


def _experts(named: dict[str, Any], out_bytes: int) -> tuple[int, int]:
    """Of stacked matrices, the bytes of those that the call's tokens choose, each once, and two
    flops for each number of a token's own. Experts of other ranks cost nothing."""
    expert_P, stacks = named["expert"].flatten(), _stacks(named)
    if named.get("local") is not None:
        local_P = named["local"][expert_P.long()]
        expert_P = local_P[local_P >= 0]
    rest = [one for name, one in named.items() if name not in {*stacks, *_ELSEWHERE}]
    numbers = sum(
        stack[0].numel() * (8 // named[_CODES[name]] if name in _CODES else 1)
        for name, stack in stacks.items()
        if name not in _SCALES
    )
    matrices_bytes = sum(stack[0].nbytes for stack in stacks.values())
    others_bytes = sum(tensor.nbytes for tensor in _tensors(rest))
    num_bytes = others_bytes + len(expert_P.unique()) * matrices_bytes + out_bytes
    return num_bytes, 2 * expert_P.numel() * numbers


def _attention(
    name: str, named: dict[str, Any], out_bytes: int, lengths: Sequence[int] | None
) -> tuple[int, int]:
    """Bytes of q, the output and what the cache has of each visible token once; 2 flops per (query,
    key) pair and element of the query heads, and 2 per element of their values."""
    q_TNH, window = named["q"], named.get("window", 0)
    keys, pairs = _keys_and_pairs(named, lengths, window)
    value_size = named["latent_size"] if name == "latent_attention" else q_TNH.shape[2]
    num_bytes = q_TNH.nbytes + out_bytes + keys * _slot_bytes(named)
    return num_bytes, 2 * pairs * q_TNH.shape[1] * (q_TNH.shape[2] + value_size)


def _latent_inputs(named: dict[str, Any], out_bytes: int) -> tuple[int, int]:
    """Bytes of the inputs, of the rows of the table, and of the results, of which entries are
    written twice; 2 flops for each number of a head's key matrix and token."""
    num_tokens, key_NPL = named["q"].shape[0], named["key"]
    read = sum(named[name].nbytes for name in ("q", "key", "kv", "norm"))
    table = named["cos_sin"].shape[1] * named["cos_sin"].element_size()
    num_bytes = read + out_bytes + num_tokens * (_slot_bytes(named) + table)
    return num_bytes, 2 * num_tokens * key_NPL.numel()


def _head_linear(named: dict[str, Any], out_bytes: int) -> tuple[int, int]:
    x_TNI, weight_NOI = named["x"], named["weight"]
    return x_TNI.nbytes + weight_NOI.nbytes + out_bytes, 2 * x_TNI.shape[0] * weight_NOI.numel()


def _latent_span(named: dict[str, Any], out_bytes: int) -> tuple[int, int]:
    """Bytes of the inputs and of each visible entry once; flops of the expanded form: a product
    with the heads' matrices for each token, and H + V for each pair of a query and a key."""
    q_TNH, matrices = named["q"], (named["key"], named["value"])
    keys, pairs = _keys_and_pairs(named, None, 0)
    read = sum(one.nbytes for one in (q_TNH, named["absorbed_q"], named["entry"], *matrices))
    products = q_TNH.shape[0] * sum(one.numel() for one in matrices)
    per_pair = q_TNH.shape[1] * (q_TNH.shape[2] + named["value"].shape[1])
    num_bytes = read + out_bytes + keys * _slot_bytes(named)
    return num_bytes, 2 * (products + pairs * per_pair)


_OF_LATENTS: dict[str, Callable[[dict[str, Any], int], tuple[int, int]]] = {
    "head_linear": _head_linear,
    "latent_inputs": _latent_inputs,
    "latent_span_attention": _latent_span,
}


def _keys_and_pairs(
    named: dict[str, Any], lengths: Sequence[int] | None, window: int
) -> tuple[int, int]:
    """The visible keys of all rows, and the pairs of a query and a key that it sees."""
    seq_lens = named["seq_len"].tolist() if lengths is None else lengths
    num_queries = [1] * len(seq_lens)
    if named["max_q_len"] != 1:
        num_queries = torch.diff(named["q_start"]).tolist()
    keys = pairs = 0
    for num, seq_len in zip(num_queries, seq_lens):
        if num:
            seen = seq_len if window <= 0 else min(seq_len, window + num - 1)
            keys += seen
            pairs += num * seen - num * (num - 1) // 2
    return keys, pairs


def _slot_bytes(named: dict[str, Any]) -> int:
    """Bytes of one token in the caches that the call names."""
    caches = (named[name] for name in ("k_cache", "v_cache", "cache") if name in named)
    return sum(int(cache[0, 0].nbytes) for cache in caches)


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, (tuple, list)):
        return [tensor for value in tree for tensor in _tensors(value)]
    return []
