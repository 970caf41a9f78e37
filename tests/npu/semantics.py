"""The meaning of Ascend's fused ops in plain torch, from their documentation.

Nothing here comes from `kernels/reference/`. Sources: the operator pages of CANN ("AI framework
operator support", Ascend IR operator specifications) and torch_npu's API pages of the same names.
Everything is computed in fp32 by the pages' formulas and rounded once at the end.

B rows | S tokens of a row | T tokens of all rows | N query heads | K key-value heads
D head size | H = N·D
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """RmsNorm: rstd = (mean(x²) + epsilon)^(−1/2) over gamma's dims, y = x · rstd · gamma.

    Returns (y, rstd).
    """
    dims = tuple(range(x.dim() - gamma.dim(), x.dim()))
    assert x.shape[dims[0] :] == gamma.shape, (x.shape, gamma.shape)
    x32 = x.to(torch.float32)
    rstd = ((x32 * x32).sum(dims, keepdim=True) / gamma.numel() + epsilon).pow(-0.5)
    return (x32 * rstd * gamma.to(torch.float32)).to(x.dtype), rstd


def add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """AddRmsNorm: x = x1 + x2, normed as in RmsNorm; (y, rstd, x)."""
    assert x1.shape == x2.shape and x1.dtype == x2.dtype, (x1.shape, x2.shape, x1.dtype, x2.dtype)
    x = x1 + x2
    y, rstd = rms_norm(x, gamma, epsilon)
    return y, rstd, x


def rotary_mul(x: Tensor, r1: Tensor, r2: Tensor) -> Tensor:
    """RotaryMul, mode half: x · r1 + rotate(x) · r2.

    rotate swaps the halves of the last dim and negates the second half.
    """
    assert x.dim() == 4 and r1.shape == r2.shape and x.dtype == r1.dtype == r2.dtype
    assert all(a in (1, b) for a, b in zip(r1.shape, x.shape)) and r1.shape[-1] == x.shape[-1], (
        r1.shape,
        x.shape,
    )
    middle = x.shape[-1] // 2
    rotated = torch.cat((x[..., middle:].neg(), x[..., :middle]), dim=-1)
    return (x.float() * r1.float() + rotated.float() * r2.float()).to(x.dtype)


def swiglu(x: Tensor, dim: int = -1) -> Tensor:
    """SwiGlu: Swish(A) · B of the halves A and B of `dim`, with Swish(a) = a / (1 + exp(−a))."""
    a, b = x.float().tensor_split(2, dim=dim)
    return (a / (1 + torch.exp(-a)) * b).to(x.dtype)


def scatter_nd_update(var: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """ScatterNdUpdate: var[indices[i]] = updates[i] in place; an index may be partial."""
    depth = indices.shape[-1]
    assert updates.shape == (*indices.shape[:-1], *var.shape[depth:]), (
        var.shape,
        indices.shape,
        updates.shape,
    )
    assert updates.dtype == var.dtype, (updates.dtype, var.dtype)
    targets = indices.reshape(-1, depth).tolist()
    for target, update in zip(
        targets, updates.reshape(len(targets), *var.shape[depth:]), strict=True
    ):
        assert all(0 <= i < size for i, size in zip(target, var.shape)), (
            f"index {target} is outside {tuple(var.shape)}"
        )
        var[tuple(target)].copy_(update)
    return var


@cache
def _causal_mask() -> Tensor:
    return torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int],
    block_table: Tensor | None = None,
    num_heads: int = 1,
    num_key_value_heads: int = 0,
    scale: float = 1.0,
    input_layout: str = "BSH",
    sparse_mode: int = 0,
    block_size: int = 0,
) -> Tensor:
    """FusedInferAttentionScore on a paged cache [blocks, block_size, K·D] in two layouts; without a
    block_table see `packed_attention`.

    BSH, query [B, S, N·D] with S = 1: each row sees its first actual_seq_lengths_kv keys.
    TND, query [T, N, D]: actual_seq_lengths are cumulative token counts that end in T. sparse_mode
    3 with the 2048 × 2048 upper triangle as mask is causal from the lower right: of q tokens over
    s keys, token i sees keys j <= i + s − q. A token that sees no key gives 0.
    """
    num_key_value_heads = num_key_value_heads or num_heads
    if block_table is None:
        assert (input_layout, sparse_mode, block_size, atten_mask) == ("TND", 0, 0, None)
        assert num_heads == num_key_value_heads == query.shape[1] and actual_seq_lengths is not None
        lengths = actual_seq_lengths, actual_seq_lengths_kv
        return packed_attention(query, key, value, *lengths, scale)
    assert key.dim() == 3 and key.shape == value.shape and key.shape[1] == block_size, (
        key.shape,
        block_size,
    )
    assert key.dtype == value.dtype == query.dtype, (query.dtype, key.dtype, value.dtype)
    assert block_table.dtype == torch.int32 and block_table.dim() == 2
    head_dim = key.shape[2] // num_key_value_heads
    group = num_heads // num_key_value_heads
    assert group * num_key_value_heads == num_heads and key.shape[2] % num_key_value_heads == 0
    if input_layout == "BSH":
        assert (
            sparse_mode == 0 and atten_mask is None and query.shape[1:] == (1, num_heads * head_dim)
        ), query.shape
        ends = list(range(1, query.shape[0] + 1))
        tokens = query.reshape(-1, num_heads, head_dim)
    else:
        assert input_layout == "TND" and query.shape[1:] == (num_heads, head_dim), (
            input_layout,
            query.shape,
        )
        assert block_size % 128 == 0 and sparse_mode == 3 and actual_seq_lengths is not None
        assert atten_mask is not None and atten_mask.shape == (2048, 2048)
        assert torch.equal(atten_mask.bool(), _causal_mask())
        ends, tokens = list(actual_seq_lengths), query
        assert ends == sorted(ends) and ends[-1] == query.shape[0], (
            f"running token counts {ends} do not end in T"
        )
    assert len(ends) == len(actual_seq_lengths_kv) == block_table.shape[0], (
        "one length and one row of blocks per row"
    )
    out = torch.zeros_like(tokens)
    start = 0
    for end, kv_len, blocks in zip(ends, actual_seq_lengths_kv, block_table):
        assert 0 <= kv_len <= blocks.numel() * block_size, (
            f"{kv_len} keys do not fit {blocks.numel()} blocks"
        )
        used = blocks[: -(-kv_len // block_size)].long()
        keys = key[used].reshape(-1, num_key_value_heads, head_dim)[:kv_len].float()
        values = value[used].reshape(-1, num_key_value_heads, head_dim)[:kv_len].float()
        queries = (
            tokens[start:end].float().reshape(end - start, num_key_value_heads, group, head_dim)
        )
        # the last key that token i sees; the token of BSH and the last one of TND see all keys
        last_seen = torch.arange(end - start) + kv_len - (end - start)
        unseen = torch.arange(kv_len) > last_seen[:, None]
        score = torch.einsum("tkgd,skd->tkgs", queries, keys) * scale
        weight = torch.softmax(score.masked_fill(unseen[:, None, None], float("-inf")), dim=-1)
        weight = weight.masked_fill((last_seen < 0)[:, None, None, None], 0.0)
        out[start:end] = torch.einsum("tkgs,skd->tkgd", weight, values).reshape(
            end - start, num_heads, head_dim
        )
        start = end
    return out.reshape(query.shape)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    actual_seq_lengths: Sequence[int],
    actual_seq_lengths_kv: Sequence[int],
    scale: float,
) -> Tensor:
    """FusedInferAttentionScore without pages in layout TND, sparse_mode 0 and no mask: q, k and v
    are [T, N, D], both lengths are running counts that do not fall, at most 4,096 of them. Each
    query sees all keys of its row.
    """
    assert query.dim() == 3 and query.shape == key.shape == value.shape, (query.shape, key.shape)
    assert query.dtype == key.dtype == value.dtype and all(x.is_contiguous() for x in (query, key))
    ends = list(actual_seq_lengths)
    assert ends == list(actual_seq_lengths_kv) == sorted(ends) and 1 <= len(ends) <= 4096
    assert ends[0] >= 0 and ends[-1] == query.shape[0], f"counts {ends[-9:]} do not end in T"
    assert query.shape[2] % 64 == 0, f"head size {query.shape[2]}"
    out, start = torch.zeros_like(query), 0
    for end in ends:
        q, k, v = (x[start:end].float().transpose(0, 1) for x in (query, key, value))
        weight = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
        out[start:end] = (weight @ v).transpose(0, 1).to(out.dtype)
        start = end
    return out


def layer_norm(
    x: Tensor, normalized_shape: Sequence[int], gamma: Tensor, beta: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNormV4: y = (x − E(x)) · rstd · gamma + beta with rstd = (Var(x) + epsilon)^(−1/2) over
    the last dims; (y, mean, rstd)."""
    dims = tuple(range(x.dim() - len(normalized_shape), x.dim()))
    assert list(x.shape[dims[0] :]) == list(normalized_shape) == list(gamma.shape)
    x32 = x.float()
    mean = x32.mean(dims, keepdim=True)
    rstd = (((x32 - mean) ** 2).mean(dims, keepdim=True) + epsilon).pow(-0.5)
    return ((x32 - mean) * rstd * gamma.float() + beta.float()).to(x.dtype), mean, rstd


def gelu(x: Tensor) -> Tensor:
    """Gelu: x / (1 + exp(−√(8/π) · (x + 0.044715 · x³)))."""
    x32 = x.float()
    inner = math.sqrt(8 / math.pi) * (x32 + 0.044715 * x32**3)
    return (x32 / (1 + torch.exp(-inner))).to(x.dtype)
