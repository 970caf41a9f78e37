"""Checks the Triton kernels against the reference on this GPU, then times their variants.

    python scripts/bench/bench_kernels.py --out kernels.json [--only decode prefill rope norm] [--variants]

Times are per launch, from replays of a CUDA graph in which each launch works on a cache of its own, as the layers of a
model do: with 28 or more megabytes of keys the L2 does not help. Shares are of the ceilings measured in the same run.
The first variant of each kind is the one the ops choose. Checks and compiles run in several processes at first, because
a compile takes seconds.
"""

import argparse
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from gpu_timing import time_launches

from nanovllm.kernels import reference
from nanovllm.kernels.triton import common as triton_common
from nanovllm.kernels.triton.attention_decode import DecodeTile, paged_attention_decode
from nanovllm.kernels.triton.attention_prefill import PrefillTile, paged_attention_prefill
from nanovllm.kernels.triton.norm_act import add_rms_norm, rms_norm, silu_mul
from nanovllm.kernels.triton.rope_store import qk_norm_rope_store, rope, store_kv

DTYPE = torch.bfloat16
HEAD = 128
BLOCK = 64
# query heads, key-value heads, head size
SHAPES = {"0.6b": (16, 8, 128), "8b": (32, 8, 128), "0.5b": (14, 2, 64)}
QWEN3 = ("0.6b", "8b")
L2_BYTES = 128 << 20  # more than any L2: as much memory as launches must rotate over

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


def random_lens(num_rows: int, low: int, high: int) -> list[int]:
    return [random.Random(row).randint(low, high) for row in range(num_rows)]


def make_cache(
    num_layers: int, seq_lens: list[int], num_kv_heads: int, block_size: int, head_dim: int = HEAD
) -> tuple[Tensor, Tensor]:
    """Random caches [layers, 2, C, B, K, H] and a shuffled block table."""
    num_blocks = [-(-seq_len // block_size) for seq_len in seq_lens]
    shape = (num_layers, 2, sum(num_blocks) + 1, block_size, num_kv_heads, head_dim)
    cache = torch.empty(shape, dtype=DTYPE, device="cuda")
    for layer in cache:
        layer.normal_()
    table = torch.zeros(len(seq_lens), max(num_blocks), dtype=torch.int32)
    order = (
        (torch.randperm(sum(num_blocks), generator=torch.Generator().manual_seed(0)) + 1)
        .int()
        .split(num_blocks)
    )
    for row, blocks in enumerate(order):
        table[row, : len(blocks)] = blocks
    return cache, table.cuda()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    error = (
        (actual.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-9)
    ).item()
    return float("inf") if math.isnan(error) else error


# --- checks


def poison_unowned(cache: Tensor, block_table: Tensor, seq_lens: list[int]) -> None:
    """NaN wherever no row has a token."""
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
        reference.paged_attention(
            q[i : i + 32].float(),
            *cache32,
            table[i : i + 32],
            seq_len[i : i + 32],
            q_start,
            1,
            head_dim**-0.5,
            window,
        )
        for i in range(0, rows, 32)  # the reference gathers whole rows: some at a time
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
    expected = reference.paged_attention(q.float(), *cache.float(), *arguments)
    return relative_error(paged_attention_prefill(q, *cache, *arguments, launch), expected)


def check_rope(launch: tuple[int, int] | None, shape: str, num_tokens: int) -> float:
    num_heads, num_kv_heads, _ = SHAPES[shape]
    qkv, q_norm, k_norm, table, pos, slot, caches = rope_inputs(
        num_tokens, num_heads, num_kv_heads, 2
    )
    expected_cache, actual_cache = caches
    expected_cache.zero_()
    actual_cache.zero_()
    expected = reference.qk_norm_rope_store(
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
        relative_error(rms_norm(x, weight[0], 1e-6), reference.rms_norm(x, weight[0], 1e-6)),
        *map(
            relative_error,
            add_rms_norm(x, residual, weight[0], 1e-6),
            reference.add_rms_norm(x, residual, weight[0], 1e-6),
        ),
        relative_error(silu_mul(gate_up), reference.silu_mul(gate_up)),
    ]
    qkv, _, _, table, pos, slot, (a, b) = rope_inputs(989, 16, 8, 2)
    q, k, v = qkv.view(989, 32, HEAD).split([16, 8, 8], dim=1)
    errors.append(relative_error(rope(q, table, pos), reference.rope(q, table, pos)))
    a.zero_()
    b.zero_()
    store_kv(k, v, *a, slot)
    reference.store_kv(k, v, *b, slot)
    errors.append(relative_error(a, b))
    return max(errors)


def all_checks(only: list[str], variants: bool) -> list[tuple[str, Callable[[], float]]]:
    checks: list[tuple[str, Callable[[], float]]] = []
    if "decode" in only:
        for launch in DECODE_VARIANTS if variants else DECODE_VARIANTS[:1]:
            for shape in SHAPES:
                for rows in (1, 8, 64, 256):
                    checks.append(
                        (
                            f"decode {shape} {rows} {launch}",
                            lambda a=(launch, shape, rows): check_decode(*a),
                        )
                    )
        for args in (
            (None, "0.6b", 64, 16, 0),
            (None, "0.6b", 8, 48, 0),
            (None, "0.6b", 8, 64, 100),
            (None, "8b", 8, 16, 7),
        ):
            checks.append((f"decode {args}", lambda a=args: check_decode(*a)))
    if "prefill" in only:
        for launch in PREFILL_VARIANTS if variants else PREFILL_VARIANTS[:1]:
            for shape in SHAPES:
                checks.append(
                    (f"prefill {shape} {launch}", lambda a=(launch, shape): check_prefill(*a))
                )
        for args in (
            (None, "0.6b", 16, 0),
            (None, "0.6b", 48, 0),
            (None, "0.6b", 64, 100),
            (None, "8b", 16, 7),
        ):
            checks.append((f"prefill {args}", lambda a=args: check_prefill(*a)))
    if "rope" in only:
        for launch in ROPE_VARIANTS if variants else ROPE_VARIANTS[:1]:
            for shape in QWEN3:
                checks.append(
                    (f"rope {shape} {launch}", lambda a=(launch, shape, 989): check_rope(*a))
                )
    if "norm" in only:
        checks.append(("pointwise", check_pointwise))
    return checks


# --- timings


def rope_inputs(
    num_tokens: int, num_heads: int, num_kv_heads: int, num_layers: int
) -> tuple[Any, ...]:
    cache, _ = make_cache(num_layers, [max(num_tokens, 64) * 2], num_kv_heads, BLOCK)
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * HEAD, dtype=DTYPE, device="cuda")
    q_norm, k_norm = torch.randn(2, HEAD, device="cuda").to(DTYPE)
    angle = torch.arange(40960, device="cuda")[:, None] / 1e6 ** (
        torch.arange(HEAD // 2, device="cuda") / (HEAD // 2)
    )
    pos = torch.randint(2000, (num_tokens,), device="cuda", dtype=torch.int32)
    slot = torch.randperm(cache.shape[2] * BLOCK, device="cuda")[:num_tokens].int()
    return qkv, q_norm, k_norm, torch.cat((angle.cos(), angle.sin()), -1), pos, slot, cache


class Table:
    """Prints rows as they come and keeps them for the file."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        print(
            "  ".join(
                f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()
            ),
            flush=True,
        )


def time_ceilings(table: Table) -> tuple[float, float]:
    source, target = torch.randn(2, 1 << 28, device="cuda")
    # a kernel, because a copy in a graph goes to the copy engine, which is slower
    copy_us = time_launches(lambda x, y: torch.neg(x, out=y), [(source, target)] * 4)
    a, b = torch.randn(2, 8192, 8192, device="cuda").to(DTYPE)
    matmul_us = time_launches(torch.matmul, [(a, b)] * 4)
    bandwidth, rate = 8 * source.numel() / copy_us / 1e6, 2 * 8192**3 / matmul_us / 1e6
    table.add(kind="ceilings", copy_tb_s=bandwidth, bf16_matmul_tflop_s=rate)
    return bandwidth, rate


def time_decode(table: Table, bandwidth: float, variants: bool) -> None:
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
        # a table wide enough for 40k tokens, as an engine has one: its width must not matter
        block_table = torch.nn.functional.pad(
            block_table, (0, 40960 // block_size - block_table.shape[1])
        )
        seq_len = torch.tensor(seq_lens, dtype=torch.int32, device="cuda")
        q = torch.randn(num_rows, num_heads, head_dim, dtype=DTYPE, device="cuda")
        for launch in DECODE_VARIANTS if variants else DECODE_VARIANTS[:1]:
            calls = [
                (q, *layer, block_table, seq_len, head_dim**-0.5, 0, launch) for layer in cache
            ]
            us = time_launches(paged_attention_decode, calls)
            rate = num_bytes / us / 1e6
            row = {
                "shape": shape,
                "rows": num_rows,
                "tokens": sum(seq_lens),
                "block_size": block_size,
            }
            table.add(
                kind="decode",
                **row,
                launch=launch and tuple(launch),
                us=us,
                tb_s=rate,
                share=rate / bandwidth,
            )


def time_decode_fp8(table: Table, bandwidth: float, variants: bool) -> None:
    """Decode attention over an fp8 cache, against the bytes of that cache; its result is compared with the reference once."""
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
        launches = DECODE_FP8_VARIANTS if variants else DECODE_FP8_VARIANTS[:1]
        for launch in [one for one in launches if one is None or block_size % one.tile == 0]:
            rest = (block_table, seq_len, head_dim**-0.5, 0, launch, scale, scale)
            if num_rows <= 64:
                q_start = torch.arange(num_rows + 1, dtype=torch.int32, device="cuda")
                arguments = (block_table, seq_len, q_start, 1, head_dim**-0.5, 0, scale, scale)
                expected = reference.paged_attention(q.float(), *cache[0], *arguments)
                error = relative_error(paged_attention_decode(q, *cache[0], *rest), expected)
                if not error < 1e-2:
                    raise ValueError(
                        f"{shape}, {num_rows} rows, {launch}: relative error {error:.2e}"
                    )
            us = time_launches(paged_attention_decode, [(q, *layer, *rest) for layer in cache])
            rate = num_bytes / us / 1e6
            row = {
                "shape": shape,
                "rows": num_rows,
                "tokens": sum(seq_lens),
                "block_size": block_size,
            }
            table.add(
                kind="decode fp8",
                **row,
                launch=launch and tuple(launch),
                us=us,
                tb_s=rate,
                share=rate / bandwidth,
            )


def time_prefill(table: Table, matmul_rate: float, variants: bool) -> None:
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
        for launch in PREFILL_VARIANTS if variants else PREFILL_VARIANTS[:1]:
            rest = (block_table, seq_len, q_start, max(q_lens), head_dim**-0.5, 0, launch)
            us = time_launches(paged_attention_prefill, [(q, *layer, *rest) for layer in cache])
            rate = 4 * pairs * head_dim * num_heads / us / 1e6
            chosen = launch and tuple(launch)
            table.add(
                kind="prefill", **row, launch=chosen, us=us, tflop_s=rate, share=rate / matmul_rate
            )
        if (
            len(q_lens) == 1 and old == 0
        ):  # the library's kernel, on keys that lie together, as a mark to measure against
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
                share=rate / matmul_rate,
            )


def time_rope(table: Table, bandwidth: float, variants: bool) -> None:
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
        for launch in ROPE_VARIANTS if variants else ROPE_VARIANTS[:1]:
            calls = [
                (qkv.clone(), *shared, *cache, num_heads, 1e-6, None, None, launch)
                for cache in caches
            ]
            us = time_launches(qk_norm_rope_store, calls)
            rate = num_bytes / us / 1e6
            row = {"shape": shape, "tokens": num_tokens, "launch": launch}
            table.add(kind="rope_store", **row, us=us, tb_s=rate, share=rate / bandwidth)


def time_norm(table: Table, bandwidth: float) -> None:
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
            table.add(kind=function.__name__, **row, us=us, tb_s=rate, share=rate / bandwidth)


def rope_store_then_decode(
    qkv: Tensor, shared: list[Tensor], cache: Tensor, block_table: Tensor, seq_len: Tensor
) -> None:
    q = qk_norm_rope_store(qkv, *shared, *cache, 16, 1e-6)
    paged_attention_decode(q, *cache, block_table, seq_len, HEAD**-0.5, 0)


def time_programmatic_launch(table: Table) -> None:
    """Cache write and attention in turn, with and without programmatic dependent launch."""
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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--only", nargs="+", default=["decode", "decode_fp8", "prefill", "rope", "norm"]
    )
    parser.add_argument(
        "--variants", action="store_true", help="time every variant, not only the ops' choice"
    )
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--check-part", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    checks = all_checks(arguments.only, arguments.variants)

    if arguments.check_part is not None:
        for name, check in checks[arguments.check_part :: arguments.processes]:
            try:
                print(json.dumps([name, check()]), flush=True)
            except (
                RuntimeError,
                ValueError,
                triton.TritonError,
            ) as error:  # one variant that does not compile must not hide the others
                print(json.dumps([name, f"{type(error).__name__}: {str(error)[:300]}"]), flush=True)
        return 0

    command = [sys.executable, *sys.argv, "--processes", str(arguments.processes), "--check-part"]
    parts = [
        subprocess.Popen([*command, str(part)], stdout=subprocess.PIPE, text=True)
        for part in range(arguments.processes)
    ]
    errors = dict(
        json.loads(line)
        for part in parts
        for line in part.communicate()[0].splitlines()
        if line[:2] == '["'
    )
    bad = {
        name: error
        for name, error in errors.items()
        if not isinstance(error, float) or error > 1e-2
    }
    bad |= {name: "no answer" for name, _ in checks if name not in errors}
    print(f"{len(errors) - len(bad)} checks passed, {len(bad)} failed", flush=True)
    for name, error in bad.items():
        print("FAILED", name, error, flush=True)

    table = Table()
    bandwidth, rate = time_ceilings(table)
    timers: dict[str, Callable[[], Any]] = {
        "decode": lambda: time_decode(table, bandwidth, arguments.variants),
        "decode_fp8": lambda: time_decode_fp8(table, bandwidth, arguments.variants),
        "prefill": lambda: time_prefill(table, rate, arguments.variants),
        "rope": lambda: (
            time_rope(table, bandwidth, arguments.variants),
            time_programmatic_launch(table),
        ),
        "norm": lambda: time_norm(table, bandwidth),
    }
    for name in arguments.only:
        try:
            timers[name]()
        except (RuntimeError, ValueError, triton.TritonError) as error:
            print("FAILED timing", name, type(error).__name__, str(error)[:500], flush=True)
            bad[f"timing {name}"] = str(error)
        if arguments.out:
            arguments.out.write_text(json.dumps({"checks": errors, "times": table.rows}, indent=1))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
