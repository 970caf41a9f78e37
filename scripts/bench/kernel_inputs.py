"""Inputs of the kernels that bench_kernels.py checks and times, and the variants of each kernel."""

from __future__ import annotations

import math
import random
from typing import Any, TypeVar

import torch
from torch import Tensor

from nanovllm.kernels.triton.attention_prefill import PrefillTile
from nanovllm.kernels.triton.decode_tiles import DecodeTile
from nanovllm.tools.shapes import CONFIGS

DTYPE = torch.bfloat16
HEAD = 128
BLOCK = 64


def _heads(name: str) -> tuple[int, int, int]:
    config = CONFIGS[name]
    return config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]


# (query heads, key-value heads, head size); 0.5b: Qwen2.5-0.5B
SHAPES = {"0.6b": _heads("Qwen3-0.6B"), "8b": _heads("Qwen3-8B"), "0.5b": (14, 2, 64)}
QWEN3 = ("0.6b", "8b")

# The first variant of each kind, None, is the op's own choice.
DECODE_VARIANTS: list[DecodeTile | None] = [
    None,
    DecodeTile(64, 4, 3, 2, 8),
    DecodeTile(64, 4, 3, 2, 4),
    DecodeTile(64, 4, 4, 1, 16),
    DecodeTile(32, 4, 3, 4, 8),
    DecodeTile(64, 4, 3, 4, 8),
]
DECODE_FP8_VARIANTS: list[DecodeTile | None] = [
    None,
    DecodeTile(128, 4, 3, 2, 8),
    DecodeTile(128, 8, 3, 2, 8),
    DecodeTile(64, 4, 3, 3, 8),
    DecodeTile(64, 4, 3, 2, 8),
    DecodeTile(64, 4, 4, 2, 8),
    DecodeTile(64, 8, 3, 3, 8),
]
PREFILL_VARIANTS: list[PrefillTile | None] = [
    None,
    PrefillTile(64, 64, 4, 3),
    PrefillTile(64, 32, 4, 3),
    PrefillTile(128, 64, 8, 3),
]
ROPE_VARIANTS: list[tuple[int, int] | None] = [None, (32, 4), (16, 4), (8, 4)]


T = TypeVar("T")


def some(variants: list[T], are_all: bool) -> list[T]:
    """All variants, or only the op's own choice."""
    return variants if are_all else variants[:1]


def random_lens(num_rows: int, low: int, high: int) -> list[int]:
    return [random.Random(row).randint(low, high) for row in range(num_rows)]


def make_cache(
    num_layers: int, seq_lens: list[int], num_kv_heads: int, block_size: int, head_dim: int = HEAD
) -> tuple[Tensor, Tensor]:
    """Random caches [layers, 2, C, B, K, H], and a block table in random order."""
    num_blocks = [-(-seq_len // block_size) for seq_len in seq_lens]
    shape = (num_layers, 2, sum(num_blocks) + 1, block_size, num_kv_heads, head_dim)
    cache = torch.empty(shape, dtype=DTYPE, device="cuda")
    for layer in cache:
        layer.normal_()
    table = torch.zeros(len(seq_lens), max(num_blocks), dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    order = (torch.randperm(sum(num_blocks), generator=generator) + 1).int()
    for row, blocks in enumerate(order.split(num_blocks)):
        table[row, : len(blocks)] = blocks
    return cache, table.cuda()


def rope_inputs(
    num_tokens: int, num_heads: int, num_kv_heads: int, num_layers: int
) -> tuple[Any, ...]:
    """(qkv, q norm, k norm, rotation table, positions, slots, caches) of qk_norm_rope_store."""
    cache, _ = make_cache(num_layers, [max(num_tokens, 64) * 2], num_kv_heads, BLOCK)
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * HEAD, dtype=DTYPE, device="cuda")
    q_norm, k_norm = torch.randn(2, HEAD, device="cuda").to(DTYPE)
    angle = torch.arange(40960, device="cuda")[:, None] / 1e6 ** (
        torch.arange(HEAD // 2, device="cuda") / (HEAD // 2)
    )
    pos = torch.randint(2000, (num_tokens,), device="cuda", dtype=torch.int32)
    slot = torch.randperm(cache.shape[2] * BLOCK, device="cuda")[:num_tokens].int()
    return qkv, q_norm, k_norm, torch.cat((angle.cos(), angle.sin()), -1), pos, slot, cache


def relative_error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.float() - expected.float()).norm()
    error = (difference / expected.float().norm().clamp(min=1e-9)).item()
    return float("inf") if math.isnan(error) else error
