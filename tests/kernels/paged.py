"""A paged cache with NaN in all slots that no row may read, and the formula of attention."""

from __future__ import annotations

import torch
from torch import Tensor

device = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def paged_cache(
    seq_lens: list[int],
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    window: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """K and V caches, block table and lengths.

    Blocks are shuffled with gaps. Slots that no row may read are NaN.
    """
    generator = torch.Generator().manual_seed(sum(seq_lens) + head_dim)
    num_blocks = [-(-seq_len // block_size) for seq_len in seq_lens]
    cache = torch.full(
        (2, 2 * sum(num_blocks) + 3, block_size, num_kv_heads, head_dim), float("nan")
    )
    # block 0 belongs to no row
    block_table = torch.zeros(len(seq_lens), max(num_blocks) + 2, dtype=torch.int32)
    owned = (torch.randperm(cache.shape[1] - 1, generator=generator) + 1)[: sum(num_blocks)].split(
        num_blocks
    )
    for row, (seq_len, blocks) in enumerate(zip(seq_lens, owned, strict=True)):
        block_table[row, : len(blocks)] = blocks
        values = torch.randn(2, seq_len, num_kv_heads, head_dim, generator=generator)
        if 0 < window < seq_len:
            values[:, : seq_len - window] = float("nan")
        for i, block in enumerate(blocks.tolist()):
            piece = values[:, i * block_size : (i + 1) * block_size]
            cache[:, block, : piece.shape[1]] = piece
    k_cache, v_cache = cache.to(device, dtype)
    return (
        k_cache,
        v_cache,
        block_table.to(device),
        torch.tensor(seq_lens, dtype=torch.int32, device=device),
    )


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert not actual.isnan().any()
    error = (actual.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-6)
    assert error < TOLERANCE[actual.dtype], f"relative error {error:.2e}"


def exact_attention(
    q_TNH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_len: Tensor,
    q_start: Tensor,
    scale: float,
    window: int,
    sinks_N: Tensor | None = None,
    end_T: Tensor | None = None,
) -> Tensor:
    """Attention in fp64, one query at a time, so that no mask is needed.

    Queries of no row and queries without keys give zeros.
    """
    out_TNH = torch.zeros(q_TNH.shape, dtype=torch.float64, device=q_TNH.device)
    group = q_TNH.shape[1] // k_cache.shape[2]
    starts = q_start.tolist()
    for row, length in enumerate(seq_len.tolist()):
        k_LKH, v_LKH = (
            cache[block_table[row].long()].flatten(0, 1).double() for cache in (k_cache, v_cache)
        )
        for token in range(starts[row], starts[row + 1]):
            end = length - (starts[row + 1] - 1 - token)  # of the keys that it sees
            first = max(0, end - window) if window > 0 else 0
            if end_T is not None:
                end = max(end, min(int(end_T[token]), length))
            if end > 0:
                k, v = (x[first:end].repeat_interleave(group, dim=1) for x in (k_LKH, v_LKH))
                weight_LN = ((q_TNH[token].double() * k).sum(-1) * scale).exp()
                others_N = 0.0 if sinks_N is None else sinks_N.double().exp()
                weight_LN = weight_LN / (weight_LN.sum(0) + others_N)
                out_TNH[token] = (weight_LN.unsqueeze(-1) * v).sum(0)
    return out_TNH
