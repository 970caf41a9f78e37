"""Checks of the Triton kernels against the reference: each returns its relative error."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.triton.attention_decode import paged_attention_decode
from nanovllm.kernels.triton.attention_prefill import PrefillTile, paged_attention_prefill
from nanovllm.kernels.triton.decode_tiles import DecodeTile
from nanovllm.kernels.triton.norm_act import add_rms_norm, rms_norm, silu_mul
from nanovllm.kernels.triton.rope_store import qk_norm_rope_store, rope, store_kv
from scripts.bench import mixer_cases
from scripts.bench.kernel_inputs import (
    BLOCK,
    DECODE_VARIANTS,
    DTYPE,
    HEAD,
    PREFILL_VARIANTS,
    QWEN3,
    ROPE_VARIANTS,
    SHAPES,
    make_cache,
    random_lens,
    relative_error,
    rope_inputs,
    some,
)

Check = tuple[str, Callable[[], float]]


def poison_unowned(cache: Tensor, block_table: Tensor, seq_lens: list[int]) -> None:
    """Write NaN to all cache slots without a token of a row."""
    block_size = cache.shape[2]
    owned_CB = torch.zeros(cache.shape[1:3], dtype=torch.bool, device="cuda")
    for row, seq_len in enumerate(seq_lens):
        token = torch.arange(seq_len, device="cuda")
        owned_CB[block_table[row, token // block_size].long(), token % block_size] = True
    cache[:, ~owned_CB] = float("nan")


def check_decode(
    launch: DecodeTile | None, shape: str, rows: int, block_size: int = BLOCK, window: int = 0
) -> float:
    num_heads, num_kv_heads, head_dim = SHAPES[shape]
    seq_lens = random_lens(rows, 1, 900)
    seq_lens[0] = 3000
    seq_lens[1:2] = [0] * (rows > 1)
    (cache,), table = make_cache(1, seq_lens, num_kv_heads, block_size, head_dim)
    poison_unowned(cache, table, seq_lens)
    seq_len = torch.tensor(seq_lens, dtype=torch.int32, device="cuda")
    q = torch.randn(rows, num_heads, head_dim, dtype=DTYPE, device="cuda")
    q_start = torch.arange(rows + 1, dtype=torch.int32, device="cuda")
    cache32 = cache.float()
    expected = [
        reference.attention.paged_attention(
            q[i : i + 32].float(),
            *cache32,
            table[i : i + 32],
            seq_len[i : i + 32],
            q_start,
            1,
            head_dim**-0.5,
            window,
        )
        for i in range(0, rows, 32)  # the reference gathers whole rows: 32 at a time
    ]
    outputs = [
        paged_attention_decode(q, *cache, table, seq_len, head_dim**-0.5, window, launch)
        for _ in range(20)
    ]
    if not all(torch.equal(output, outputs[0]) for output in outputs):
        return float("inf")
    return relative_error(outputs[0], torch.cat(expected))


def check_prefill(
    launch: PrefillTile | None, shape: str, block_size: int = BLOCK, window: int = 0
) -> float:
    num_heads, num_kv_heads, head_dim = SHAPES[shape]
    q_lens, old_lens = [1, 19, 300, 0, 989, 64], [99, 500, 0, 77, 11, 64]
    seq_lens = [q + old for q, old in zip(q_lens, old_lens, strict=True)]
    (cache,), table = make_cache(1, seq_lens, num_kv_heads, block_size, head_dim)
    poison_unowned(cache, table, seq_lens)
    q = torch.randn(sum(q_lens) + 33, num_heads, head_dim, dtype=DTYPE, device="cuda")
    q_start = torch.tensor([0, *q_lens], device="cuda").cumsum(0).int()
    arguments = (
        table,
        torch.tensor(seq_lens, dtype=torch.int32, device="cuda"),
        q_start,
        989,
        head_dim**-0.5,
        window,
    )
    expected = reference.attention.paged_attention(q.float(), *cache.float(), *arguments)
    return relative_error(paged_attention_prefill(q, *cache, *arguments, launch), expected)


def check_rope(launch: tuple[int, int] | None, shape: str, num_tokens: int) -> float:
    num_heads, num_kv_heads, _ = SHAPES[shape]
    qkv, q_norm, k_norm, table, pos, slot, caches = rope_inputs(
        num_tokens, num_heads, num_kv_heads, 2
    )
    expected_cache, actual_cache = caches
    expected_cache.zero_()
    actual_cache.zero_()
    expected = reference.rope_store.qk_norm_rope_store(
        qkv, q_norm, k_norm, table, pos, slot, *expected_cache, num_heads, 1e-6
    )
    actual = qk_norm_rope_store(
        qkv, q_norm, k_norm, table, pos, slot, *actual_cache, num_heads, 1e-6, launch=launch
    )
    return max(relative_error(actual, expected), relative_error(actual_cache, expected_cache))


def check_pointwise() -> float:
    x, residual, weight = (torch.randn(n, 4096, dtype=DTYPE, device="cuda") for n in (989, 989, 1))
    gate_up = torch.randn(989, 6144, dtype=DTYPE, device="cuda")
    errors = [
        relative_error(
            rms_norm(x, weight[0], 1e-6), reference.norm_act.rms_norm(x, weight[0], 1e-6)
        ),
        *map(
            relative_error,
            add_rms_norm(x, residual, weight[0], 1e-6),
            reference.norm_act.add_rms_norm(x, residual, weight[0], 1e-6),
        ),
        relative_error(silu_mul(gate_up), reference.norm_act.silu_mul(gate_up)),
    ]
    qkv, _, _, table, pos, slot, (a, b) = rope_inputs(989, 16, 8, 2)
    q, k, v = qkv.view(989, 32, HEAD).split([16, 8, 8], dim=1)
    errors.append(relative_error(rope(q, table, pos), reference.rope_store.rope(q, table, pos)))
    a.zero_()
    b.zero_()
    store_kv(k, v, *a, slot)
    reference.rope_store.store_kv(k, v, *b, slot)
    errors.append(relative_error(a, b))
    return max(errors)


def all_checks(only: list[str], variants: bool) -> list[Check]:
    """(name, check) of the kinds in `only`: of every variant, or of the ops' own choices."""
    checks: list[Check] = []
    if "decode" in only:
        checks += _decode_checks(variants)
    if "prefill" in only:
        checks += _prefill_checks(variants)
    if "rope" in only:
        checks += [
            (f"rope {shape} {launch}", partial(check_rope, launch, shape, 989))
            for launch in some(ROPE_VARIANTS, variants)
            for shape in QWEN3
        ]
    if "norm" in only:
        checks.append(("pointwise", check_pointwise))
    if "mixer" in only:
        checks += mixer_cases.all_checks()
    return checks


def _decode_checks(variants: bool) -> list[Check]:
    checks: list[Check] = [
        (f"decode {shape} {rows} {launch}", partial(check_decode, launch, shape, rows))
        for launch in some(DECODE_VARIANTS, variants)
        for shape in SHAPES
        for rows in (1, 8, 64, 256)
    ]
    for args in (("0.6b", 64, 16, 0), ("0.6b", 8, 48, 0), ("0.6b", 8, 64, 100), ("8b", 8, 16, 7)):
        checks.append((f"decode {args}", partial(check_decode, None, *args)))
    return checks


def _prefill_checks(variants: bool) -> list[Check]:
    checks: list[Check] = [
        (f"prefill {shape} {launch}", partial(check_prefill, launch, shape))
        for launch in some(PREFILL_VARIANTS, variants)
        for shape in SHAPES
    ]
    for args in (("0.6b", 16, 0), ("0.6b", 48, 0), ("0.6b", 64, 100), ("8b", 16, 7)):
        checks.append((f"prefill {args}", partial(check_prefill, None, *args)))
    return checks
