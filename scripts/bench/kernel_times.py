"""Timings of the Triton kernels: rows of a table, with shares of the device's limits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.triton import common as triton_common
from nanovllm.kernels.triton.attention_decode import paged_attention_decode
from nanovllm.kernels.triton.attention_prefill import paged_attention_prefill
from nanovllm.kernels.triton.norm_act import add_rms_norm, rms_norm, silu_mul
from nanovllm.kernels.triton.rope_store import qk_norm_rope_store
from nanovllm.tools.device_limits import DeviceLimits, measure_limits
from scripts.bench.gpu_timing import time_launches
from scripts.bench.kernel_inputs import (
    BLOCK,
    DECODE_FP8_VARIANTS,
    DECODE_VARIANTS,
    DTYPE,
    HEAD,
    PREFILL_VARIANTS,
    ROPE_VARIANTS,
    SHAPES,
    make_cache,
    random_lens,
    relative_error,
    rope_inputs,
    some,
)

L2_BYTES = 128 << 20  # more than any L2 has: launches rotate over at least this much memory


class Table:
    """Prints rows as they are added and keeps them for the file."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        cells = [f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()]
        print("  ".join(cells), flush=True)


def time_ceilings(table: Table) -> DeviceLimits:
    limits = measure_limits(torch.device("cuda"), DTYPE, torch.cuda.synchronize)
    table.add(
        kind="ceilings", copy_tb_s=limits.bandwidth / 1e12, bf16_matmul_tflop_s=limits.flops / 1e12
    )
    return limits


def time_decode(table: Table, limits: DeviceLimits, variants: bool) -> None:
    for shape, num_rows, lens, block_size in (
        ("0.6b", 256, (100, 2000), BLOCK),
        ("0.6b", 64, (100, 2000), BLOCK),
        ("0.6b", 64, (100, 2000), 16),
        ("0.6b", 32, (100, 2000), BLOCK),
        ("0.6b", 16, (100, 2000), BLOCK),
        ("0.6b", 8, (100, 2000), BLOCK),
        ("0.6b", 2, (600, 600), BLOCK),
        ("0.6b", 1, (600, 600), BLOCK),
        ("0.6b", 1, (4000, 4000), BLOCK),
        ("0.6b", 1, (32000, 32000), BLOCK),
        ("8b", 256, (100, 2000), BLOCK),
        ("8b", 64, (100, 2000), BLOCK),
        ("8b", 8, (100, 2000), BLOCK),
        ("8b", 1, (600, 600), BLOCK),
        ("0.5b", 256, (100, 2000), BLOCK),
        ("0.5b", 8, (100, 2000), BLOCK),
    ):
        num_heads, num_kv_heads, head_dim = SHAPES[shape]
        seq_lens = random_lens(num_rows, *lens)
        num_bytes = sum(seq_lens) * 2 * num_kv_heads * head_dim * 2
        num_layers = max(4, -(-L2_BYTES // num_bytes))
        cache, block_table = make_cache(num_layers, seq_lens, num_kv_heads, block_size, head_dim)
        # an engine's table is wide enough for 40k tokens: the width must not matter
        block_table = torch.nn.functional.pad(
            block_table, (0, 40960 // block_size - block_table.shape[1])
        )
        seq_len = torch.tensor(seq_lens, dtype=torch.int32, device="cuda")
        q = torch.randn(num_rows, num_heads, head_dim, dtype=DTYPE, device="cuda")
        row = {"shape": shape, "rows": num_rows, "tokens": sum(seq_lens), "block_size": block_size}
        for launch in some(DECODE_VARIANTS, variants):
            calls = [
                (q, *layer, block_table, seq_len, head_dim**-0.5, 0, launch) for layer in cache
            ]
            us = time_launches(paged_attention_decode, calls)
            rate = num_bytes / us / 1e6
            chosen, share = launch and tuple(launch), rate * 1e12 / limits.bandwidth
            table.add(kind="decode", **row, launch=chosen, us=us, tb_s=rate, share=share)


def time_decode_fp8(table: Table, limits: DeviceLimits, variants: bool) -> None:
    """Decode attention over an fp8 cache. Up to 64 rows, checks the result too."""
    for shape, num_rows, lens, block_size in (
        ("0.6b", 256, (100, 2000), 128),
        ("0.6b", 256, (100, 2000), BLOCK),
        ("0.6b", 64, (100, 2000), 128),
        ("0.6b", 8, (100, 2000), 128),
        ("0.6b", 1, (600, 600), 128),
        ("0.6b", 1, (32000, 32000), 128),
        ("8b", 256, (100, 2000), 128),
        ("8b", 1, (600, 600), 128),
    ):
        num_heads, num_kv_heads, head_dim = SHAPES[shape]
        seq_lens = random_lens(num_rows, *lens)
        num_bytes = sum(seq_lens) * 2 * num_kv_heads * head_dim
        plain, block_table = make_cache(
            max(4, -(-L2_BYTES // num_bytes)), seq_lens, num_kv_heads, block_size, head_dim
        )
        cache = (plain * 16).to(torch.float8_e4m3fn)
        del plain
        seq_len = torch.tensor(seq_lens, dtype=torch.int32, device="cuda")
        scale = torch.full((num_kv_heads,), 1 / 16, device="cuda")
        q = torch.randn(num_rows, num_heads, head_dim, dtype=DTYPE, device="cuda")
        row = {"shape": shape, "rows": num_rows, "tokens": sum(seq_lens), "block_size": block_size}
        for launch in some(DECODE_FP8_VARIANTS, variants):
            if launch is not None and block_size % launch.tile:
                continue
            rest = (block_table, seq_len, head_dim**-0.5, 0, launch, scale, scale)
            if num_rows <= 64:
                q_start = torch.arange(num_rows + 1, dtype=torch.int32, device="cuda")
                arguments = (block_table, seq_len, q_start, 1, head_dim**-0.5, 0, scale, scale)
                expected = reference.attention.paged_attention(q.float(), *cache[0], *arguments)
                error = relative_error(paged_attention_decode(q, *cache[0], *rest), expected)
                if not error < 1e-2:
                    raise ValueError(
                        f"{shape}, {num_rows} rows, {launch}: relative error {error:.2e}"
                    )
            us = time_launches(paged_attention_decode, [(q, *layer, *rest) for layer in cache])
            rate = num_bytes / us / 1e6
            chosen, share = launch and tuple(launch), rate * 1e12 / limits.bandwidth
            table.add(kind="decode fp8", **row, launch=chosen, us=us, tb_s=rate, share=share)


def time_prefill(table: Table, limits: DeviceLimits, variants: bool) -> None:
    short = random_lens(15, 100, 1024)
    for shape, q_lens, old in (
        ("0.6b", [8192], 0),
        ("0.6b", short, 0),
        ("0.6b", [2048], 6144),
        ("8b", [8192], 0),
        ("8b", short, 0),
    ):
        num_heads, num_kv_heads, head_dim = SHAPES[shape]
        seq_lens = [q_len + old for q_len in q_lens]
        cache, block_table = make_cache(4, seq_lens, num_kv_heads, BLOCK, head_dim)
        seq_len = torch.tensor(seq_lens, dtype=torch.int32, device="cuda")
        q = torch.randn(sum(q_lens), num_heads, head_dim, dtype=DTYPE, device="cuda")
        q_start = torch.tensor([0, *q_lens], device="cuda").cumsum(0).int()
        pairs = sum(q_len * old + q_len * (q_len + 1) // 2 for q_len in q_lens)
        row = {"shape": shape, "rows": len(q_lens), "tokens": sum(q_lens), "old": old}
        for launch in some(PREFILL_VARIANTS, variants):
            rest = (block_table, seq_len, q_start, max(q_lens), head_dim**-0.5, 0, launch)
            us = time_launches(paged_attention_prefill, [(q, *layer, *rest) for layer in cache])
            rate = 4 * pairs * head_dim * num_heads / us / 1e6
            chosen = launch and tuple(launch)
            table.add(
                kind="prefill",
                **row,
                launch=chosen,
                us=us,
                tflop_s=rate,
                share=rate * 1e12 / limits.flops,
            )
        # for comparison: torch's kernel on contiguous keys
        if len(q_lens) == 1 and old == 0:
            qkv = torch.randn(3, 1, num_heads, q_lens[0], head_dim, dtype=DTYPE, device="cuda")
            us = time_launches(
                torch.nn.functional.scaled_dot_product_attention, [(*qkv, None, 0.0, True)] * 4
            )
            rate = 4 * pairs * head_dim * num_heads / us / 1e6
            table.add(
                kind="prefill",
                **row,
                launch="torch sdpa",
                us=us,
                tflop_s=rate,
                share=rate * 1e12 / limits.flops,
            )


def time_rope(table: Table, limits: DeviceLimits, variants: bool) -> None:
    for shape, num_tokens in (
        ("0.6b", 1),
        ("0.6b", 256),
        ("0.6b", 16384),
        ("8b", 1),
        ("8b", 16384),
    ):
        num_heads, num_kv_heads, _ = SHAPES[shape]
        num_layers = 32 if num_tokens <= 256 else 4
        qkv, *shared, caches = rope_inputs(num_tokens, num_heads, num_kv_heads, num_layers)
        num_bytes = 2 * qkv.numel() * 2 + num_tokens * (HEAD * 4 + 8)
        for launch in some(ROPE_VARIANTS, variants):
            calls = [
                (qkv.clone(), *shared, *cache, num_heads, 1e-6, None, None, launch)
                for cache in caches
            ]
            us = time_launches(qk_norm_rope_store, calls)
            rate = num_bytes / us / 1e6
            row = {"shape": shape, "tokens": num_tokens, "launch": launch}
            table.add(
                kind="rope_store", **row, us=us, tb_s=rate, share=rate * 1e12 / limits.bandwidth
            )


def time_norm(table: Table, limits: DeviceLimits) -> None:
    for num_tokens, dim in ((1, 1024), (1, 4096), (256, 1024), (16384, 1024), (16384, 4096)):
        num_layers = 32 if num_tokens <= 256 else 4
        x, residual = torch.randn(2, num_layers, num_tokens, dim, device="cuda").to(DTYPE)
        weight = torch.randn(dim, device="cuda").to(DTYPE)
        gate_up = torch.randn(num_layers, num_tokens, 6 * dim, device="cuda").to(DTYPE)
        for function, num_bytes, calls in (
            (rms_norm, 4 * x[0].numel(), [(a, weight, 1e-6) for a in x]),
            (
                add_rms_norm,
                8 * x[0].numel(),
                [(a, b, weight, 1e-6) for a, b in zip(x, residual, strict=True)],
            ),
            (silu_mul, 3 * gate_up[0].numel(), [(a,) for a in gate_up]),
        ):
            us = time_launches(function, calls)
            rate = num_bytes / us / 1e6
            row = {"tokens": num_tokens, "dim": dim}
            table.add(
                kind=function.__name__,
                **row,
                us=us,
                tb_s=rate,
                share=rate * 1e12 / limits.bandwidth,
            )


def rope_store_then_decode(
    qkv: Tensor, shared: list[Tensor], cache: Tensor, block_table: Tensor, seq_len: Tensor
) -> None:
    q = qk_norm_rope_store(qkv, *shared, *cache, 16, 1e-6)
    paged_attention_decode(q, *cache, block_table, seq_len, HEAD**-0.5, 0)


def time_programmatic_launch(table: Table) -> None:
    """Alternate cache write and attention, with and without programmatic dependent launch."""
    options = triton_common.launch_options(torch.device("cuda", torch.cuda.current_device()))
    kept = dict(options)
    for num_rows in (1, 8):
        caches, block_table = make_cache(64, [600] * num_rows, 8, BLOCK)
        seq_len = torch.tensor([600] * num_rows, dtype=torch.int32, device="cuda")
        qkv, *shared, _ = rope_inputs(num_rows, 16, 8, 1)
        shared[4] %= 128
        for on in (True, False) if kept["PDL"] else (False,):
            options.clear()
            options.update(kept if on else {"PDL": False})
            us = time_launches(
                rope_store_then_decode,
                [(qkv, shared, cache, block_table, seq_len) for cache in caches],
            )
            table.add(kind="rope_store + decode", rows=num_rows, len=600, programmatic=on, us=us)
        options.update(kept)
