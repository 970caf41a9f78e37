"""Checks the fused products and the sampler against fp64 on this GPU, then times tiles against cuBLAS and Inductor.

    python scripts/bench/bench_linear.py --out linear.json [--only tiles layer sample] [--rows 1 8 16] [--tune]

Times are µs of one launch from replays of a CUDA graph of many launches, each with weights of its own, so that the L2
does not help. "layer" is a chain as in a model's decode step: norm + qkv, rope and cache write, attention, out, norm + gate
+ up + SiLU, down, with as many layers as the model has. Shares are of the copy bandwidth measured in the same run.
Compiles run in several processes first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).parents[2]))

from gpu_timing import time_launches

from nanovllm.kernels import reference
from nanovllm.kernels.triton import filter as triton_filter
from nanovllm.kernels.triton import linear_few as triton_linear_few
from nanovllm.kernels.triton import linear_gated as triton_linear_gated
from nanovllm.kernels.triton import linear_many as triton_linear_many
from nanovllm.kernels.triton import sample as triton_sample
from nanovllm.kernels.triton.attention_decode import paged_attention_decode
from nanovllm.kernels.triton.linear import fused_linear
from nanovllm.kernels.triton.linear_few import LinearTile, few_rows_linear
from nanovllm.kernels.triton.linear_gated import GatedTile, gated_linear
from nanovllm.kernels.triton.linear_many import GemmTile, many_rows_linear
from nanovllm.kernels.triton.norm_act import add_rms_norm, rms_norm, silu_mul
from nanovllm.kernels.triton.rope_store import qk_norm_rope_store

DTYPE = torch.bfloat16
VOCAB = 151936
ROTATED_BYTES = 400 << 20  # weights of one kind, together, at least
# name: (outputs, depth, norm before, silu·up after)
SHAPES = {
    "0.6b qkv": (4096, 1024, True, False),
    "0.6b out": (1024, 2048, False, False),
    "0.6b gate_up": (3072, 1024, True, True),
    "0.6b down": (1024, 3072, False, False),
    # the norm in a kernel of its own
    "0.6b qkv bare": (4096, 1024, False, False),
    "0.6b gate_up bare": (3072, 1024, False, True),
    "8b qkv": (6144, 4096, True, False),
    "8b out": (4096, 4096, False, False),
    "8b gate_up": (12288, 4096, True, True),
    "8b down": (4096, 12288, False, False),
    "8b qkv bare": (6144, 4096, False, False),
    "8b gate_up bare": (12288, 4096, False, True),
}
HEADS = {"0.6b": (VOCAB, 1024, True, False), "8b": (VOCAB, 4096, True, False)}
MODELS = {
    "0.6b": (1024, 16, 8, 28),
    "8b": (4096, 32, 8, 36),
}  # hidden, query heads, kv heads, layers
NUM_WORKERS = 14


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, reads and writes counted."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    return 8 * source.numel() / (time_launches(partial(torch.neg, out=target), [(source,)]) * 1e-6)


Tile = LinearTile | GatedTile | GemmTile


def gated_tiles(num_rows: int, num_outs: int, depth: int) -> list[Tile]:
    """Of all that are there for so many rows or more."""
    found = [
        tile
        for rows, tiles in triton_linear_gated.TILES.items()
        if rows >= num_rows
        for tile in tiles
    ]
    return [
        tile
        for tile in found
        if 2 * num_outs % (tile.first + tile.second) == 0 and depth % tile.columns == 0
    ]


def gemm_tiles(shape: tuple[int, int, bool, bool], num_rows: int, tune: bool) -> list[Tile]:
    """Candidates: the op's own choice first."""
    num_outs, depth, _, silu = shape
    found: list[Tile] = [triton_linear_many.gemm_tile(num_rows, num_outs, depth, silu, 227 << 10)]
    if silu and num_outs * depth > triton_linear_many.SMALL_WEIGHT:
        found = gated_tiles(num_rows, num_outs, depth) + found
    for rows, outs, columns, splits, stages in product(
        (32, 64, 128), (32, 64, 128, 256), (64, 128), (1, 2, 4), (3, 4, 6)
    ):
        programs = -(-num_rows // rows) * -(-num_outs // outs) * splits
        area, shared = rows * outs * (1 + silu), (rows + outs * (1 + silu)) * columns * 2 * stages
        if (
            tune
            and rows < 2 * num_rows
            and (rows <= 32 if num_rows <= 32 else rows >= 64)
            and (rows >= 128 or num_rows < 192 or num_outs < 2048)
            and 1024 <= area <= 32768
            and outs <= 2 * rows
            and depth % (columns * splits) == 0
            and depth // (columns * splits) >= stages
            and 48 <= programs <= 800
            and (splits == 1 or programs <= 280)
            and 72 << 10 <= shared <= 220 << 10
        ):
            found.append(GemmTile(rows, outs, columns, splits, stages, 8 if area >= 16384 else 4))
    return list(dict.fromkeys(found))


def tiles(shape: tuple[int, int, bool, bool], num_rows: int, tune: bool) -> Sequence[Tile]:
    """Candidates: the op's own choice first."""
    if num_rows > triton_linear_few.MAX_ROWS:
        return gemm_tiles(shape, num_rows, tune)
    num_outs, depth, norm, silu = shape
    found = [triton_linear_few.linear_tile(num_rows, num_outs, depth, silu)]
    silu_factor = 2 if silu else 1
    if not tune:
        return found
    if num_rows == 1:
        for num_warps in (4, 8):
            for each in (1, 2, 4) if depth < 4096 else (1, 2):
                for ahead in (2, 4, 8):
                    registers = each * ahead * 4 * silu_factor + ahead * (12 if norm else 4)
                    chunks = -(-depth // 256)
                    if (
                        registers <= 150
                        and (ahead <= chunks or ahead == 4)
                        and num_outs // (each * num_warps) >= 100
                    ):
                        found.append(LinearTile(each * num_warps, 1, 256, ahead, num_warps))
                        if ahead < chunks <= 12:
                            found.append(
                                LinearTile(each * num_warps, 1, 256, ahead, num_warps, True)
                            )
    else:
        for outs in (16, 32):
            for slices, columns in ((4, 64), (4, 128), (4, 256), (8, 128)):
                for ahead in (1, 2, 4):
                    chunk = slices * columns
                    tile_bytes = outs * chunk * 2 * silu_factor
                    if (
                        chunk * ahead <= depth
                        and 8 << 10 <= tile_bytes <= (64 << 10) // ahead
                        and num_outs // outs >= 60
                    ):
                        found.append(LinearTile(outs, slices, columns, ahead, slices))
                        if chunk * ahead < depth < 4096:
                            found.append(LinearTile(outs, slices, columns, ahead, slices, True))
    return list(dict.fromkeys(found))


class Case:
    """Inputs of one shape, with enough weights to rotate over."""

    def __init__(
        self, shape: tuple[int, int, bool, bool], num_rows: int, weights: list[Tensor] | None = None
    ) -> None:
        num_outs, depth, norm, self.silu = shape
        self.shape, self.num_rows = shape, num_rows
        rows = 2 * num_outs if self.silu else num_outs
        self.weight_bytes = rows * depth * 2
        copies = max(3, min(28, -(-ROTATED_BYTES // self.weight_bytes)))
        self.weights = weights or [
            (torch.randn(rows, depth, device="cuda") / depth**0.5).to(DTYPE) for _ in range(copies)
        ]
        self.x = torch.randn(num_rows, depth, device="cuda").to(DTYPE)
        # as in a model: products of the residual stream are normed, those into it are added
        self.residual = (
            None
            if num_outs > depth or self.silu
            else torch.randn(num_rows, num_outs, device="cuda").to(DTYPE)
        )
        self.norms = (
            [(torch.rand(depth, device="cuda") + 0.5).to(DTYPE) for _ in self.weights]
            if norm
            else None
        )

    def fused(self, idx: int, tile: Tile, pdl: bool | None = None) -> Tensor:
        norm = self.norms[idx] if self.norms else None
        if isinstance(tile, GatedTile):
            return gated_linear(self.x, self.weights[idx], None, launch=tile, pdl=pdl)
        if isinstance(tile, GemmTile):
            return many_rows_linear(
                self.x, self.weights[idx], None, self.residual, self.silu, launch=tile, pdl=pdl
            )
        return few_rows_linear(
            self.x,
            norm,
            self.weights[idx],
            None,
            self.residual,
            1e-6,
            self.silu,
            launch=tile,
            pdl=pdl,
        )

    def apart(self, idx: int) -> Tensor:
        x = rms_norm(self.x, self.norms[idx], 1e-6) if self.norms else self.x
        if self.residual is not None:
            return torch.addmm(self.residual, x, self.weights[idx].t())
        y = linear(x, self.weights[idx])
        return silu_mul(y) if self.silu else y

    def launches(self) -> list[int]:
        return [i % len(self.weights) for i in range(28)]

    @cached_property
    def exact(self) -> Tensor:
        x = self.x.double()
        if self.norms:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.norms[0].double()
        exact = x @ self.weights[0].double().T
        exact = reference.silu_mul(exact) if self.silu else exact
        return exact if self.residual is None else exact + self.residual.double()

    def error(self, y: Tensor) -> float:
        return float((y.double() - self.exact).norm() / self.exact.norm())


def bench_tiles(
    names: list[str], rows: list[int], tune: bool, bandwidth: float, only: tuple[int, int] | None
) -> list[dict[str, Any]]:
    """`only` = (worker, workers): compile one share of the tiles and time nothing."""
    results, counter = [], 0
    shapes = SHAPES | {f"{model} head": shape for model, shape in HEADS.items()}
    for name in names:
        weights = None
        for num_rows in rows:
            case = (
                Case(shapes[name], num_rows, weights)
                if only is None
                else Small(shapes[name], num_rows)
            )
            weights = case.weights
            best: dict[str, Any] | None = None
            found = tiles(shapes[name], num_rows, tune)
            for tile in found:
                counter += 1
                if only is not None:
                    if counter % only[1] == only[0]:
                        case.fused(0, tile)
                    continue
                try:
                    error = case.error(case.fused(0, tile))
                    if not error < 1e-2:
                        print(f"WRONG {name} rows {num_rows} {tuple(tile)}: error {error:.3g}")
                        continue
                    us = [
                        time_launches(case.fused, [(i, tile, pdl) for i in case.launches()])
                        for pdl in ((None, False) if tile == found[0] else (None,))
                    ]
                except Exception as problem:
                    print(f"FAILED {name} rows {num_rows} {tuple(tile)}: {str(problem)[:200]}")
                    continue
                row = {
                    "shape": name,
                    "rows": num_rows,
                    "tile": tile,
                    "us": us[0],
                    "us_no_pdl": us[-1],
                    "error": error,
                }
                results.append(row)
                if best is None or row["us"] < best["us"]:
                    best = row
            if best is None:
                continue
            if isinstance(best["tile"], GemmTile):
                ahead = best["tile"]._replace(prefetch=True)
                best["us_prefetch"] = time_launches(
                    case.fused, [(i, ahead) for i in case.launches()]
                )
                best["us_no_pdl"] = time_launches(
                    case.fused, [(i, best["tile"], False) for i in case.launches()]
                )
            cublas = time_launches(linear, [(case.x, case.weights[i]) for i in case.launches()])
            apart = time_launches(case.apart, [(i,) for i in case.launches()])
            chosen = next(
                row for row in results if row["shape"] == name and row["rows"] == num_rows
            )
            chosen |= {"cublas": cublas, "apart": apart, "chosen": True}
            for row in sorted(
                (r for r in results if r["shape"] == name and r["rows"] == num_rows),
                key=lambda r: r["us"],
            )[:6]:
                print(f"    {row['us']:6.2f} {row['us_no_pdl']:6.2f} {tuple(row['tile'])}")
            share = case.weight_bytes / (best["us"] * 1e-6) / bandwidth
            print(
                f"{name:13} rows {num_rows:2}: chosen {chosen['us']:6.2f} ({chosen['us_no_pdl']:6.2f} without PDL), "
                f"best {best['us']:6.2f} ({best['us_no_pdl']:6.2f}) {share:4.0%} of copy bandwidth | "
                f"cuBLAS {cublas:6.2f}, with its neighbours {apart:6.2f} | {tuple(best['tile'])} "
                f"| prefetch {best.get('us_prefetch', 0):6.2f}",
                flush=True,
            )
    return results


class Small(Case):
    """The same launch on a few bytes, for the compiler alone: a kernel depends on shapes, not on contents."""

    def __init__(self, shape: tuple[int, int, bool, bool], num_rows: int) -> None:
        num_outs, depth, norm, self.silu = shape
        rows = 2 * num_outs if self.silu else num_outs
        self.weights = [torch.zeros(rows, depth, device="cuda", dtype=DTYPE)]
        self.x = torch.zeros(num_rows, depth, device="cuda", dtype=DTYPE)
        self.residual = (
            None
            if num_outs > depth or self.silu
            else torch.zeros(num_rows, num_outs, device="cuda", dtype=DTYPE)
        )
        self.norms = [torch.zeros(depth, device="cuda", dtype=DTYPE)] if norm else None


def bench_layer(model: str, num_rows: int, seq_len: int = 512) -> dict[str, float]:
    """µs of one layer of a chain of layers: fused with and without PDL, and apart (cuBLAS)."""
    hidden, num_heads, num_kv_heads, num_layers = MODELS[model]
    shapes = [SHAPES[f"{model} {part}"] for part in ("qkv", "out", "gate_up", "down")]
    layers = [
        [
            (torch.randn(2 * o if silu else o, d, device="cuda", dtype=DTYPE) / d**0.5)
            for o, d, _, silu in shapes
        ]
        for _ in range(num_layers)
    ]
    norms = [torch.rand(2, hidden, device="cuda").to(DTYPE) + 0.5 for _ in range(num_layers)]
    heads = torch.rand(2, 128, device="cuda").to(DTYPE) + 0.5
    blocks = -(-(seq_len + 1) // 64)
    cache_shape = (2, num_rows * blocks + 1, 64, num_kv_heads, 128)
    caches = [torch.randn(cache_shape, device="cuda", dtype=DTYPE) for _ in range(num_layers)]
    table = (torch.arange(num_rows * blocks, device="cuda", dtype=torch.int32) + 1).view(
        num_rows, blocks
    )
    pos = torch.full((num_rows,), seq_len, device="cuda")
    slot = table[:, seq_len // 64].long() * 64 + seq_len % 64
    seq_lens = (pos + 1).int()
    cos_sin = torch.randn(1024, 128, device="cuda")
    x0 = torch.randn(num_rows, hidden, device="cuda").to(DTYPE)

    def attention(qkv: Tensor, cache: Tensor) -> Tensor:
        q = qk_norm_rope_store(
            qkv, heads[0], heads[1], cos_sin, pos, slot, cache[0], cache[1], num_heads, 1e-6
        )
        return paged_attention_decode(q, cache[0], cache[1], table, seq_lens, 128**-0.5, 0).flatten(
            1
        )

    def fused(first: Tensor) -> Tensor:
        h = first
        for (qkv, out, gate_up, down), norm, cache in zip(layers, norms, caches, strict=True):
            y = fused_linear(h, norm[0], qkv, None, None, 1e-6, False)
            h = fused_linear(attention(y, cache), None, out, None, h, 1e-6, False)
            y = fused_linear(h, norm[1], gate_up, None, None, 1e-6, True)
            h = fused_linear(y, None, down, None, h, 1e-6, False)
        return h

    def apart(first: Tensor) -> Tensor:
        x, h = torch.zeros_like(first), first
        for (qkv, out, gate_up, down), norm, cache in zip(layers, norms, caches, strict=True):
            x, h = add_rms_norm(x, h, norm[0], 1e-6)
            x, h = add_rms_norm(linear(attention(linear(x, qkv), cache), out), h, norm[1], 1e-6)
            x = linear(silu_mul(linear(x, gate_up)), down)
        return x + h

    h, h_apart = fused(x0), apart(x0)
    drift = float((h.float() - h_apart.float()).norm() / h_apart.float().norm())
    again = torch.equal(fused(x0), h)
    qkv0 = torch.randn(num_rows, shapes[0][0], device="cuda").to(DTYPE)
    result = {
        "fused": time_launches(fused, [(x0,)]) / num_layers,
        "apart": time_launches(apart, [(x0,)]) / num_layers,
        "attention": time_launches(attention, [(qkv0, cache) for cache in caches]),
    }
    print(
        f"layer {model} rows {num_rows:2}: fused {result['fused']:6.2f} µs, "
        f"apart {result['apart']:6.2f}, rope + attention alone {result['attention']:6.2f} | "
        f"after {num_layers} layers the streams differ by {drift:.1e}, same bits again: {again}",
        flush=True,
    )
    return result


def bench_sample(rows: list[int], inductor_rows: list[int]) -> list[dict[str, float]]:
    results = []
    compiled = torch.compile(reference.sample, dynamic=False)
    for num_rows in rows:
        logits = [(4 * torch.randn(num_rows, VOCAB, device="cuda")).to(DTYPE) for _ in range(4)]
        seed, pos = torch.randint(2**62, (2, num_rows), device="cuda")
        for temperature in (0.0, 0.8):
            given = (torch.full((num_rows,), temperature, device="cuda"), seed, pos)
            actual, expected = (
                triton_sample.sample(logits[0], *given),
                reference.sample(logits[0], *given),
            )
            wrong = int((actual != expected).sum())
            if temperature == 0:
                top = logits[0].float()
                wrong = int((top.gather(1, actual[:, None])[:, 0] != top.max(-1).values).sum())
            row = {
                "rows": num_rows,
                "temperature": temperature,
                "us": time_launches(triton_sample.sample, [(x, *given) for x in logits * 4]),
                "inductor": time_launches(compiled, [(x, *given) for x in logits])
                if num_rows in inductor_rows
                else 0.0,
            }
            results.append(row)
            print(
                f"sample rows {num_rows:3} temperature {temperature}: {row['us']:6.2f} µs, Inductor {row['inductor']:6.2f}, "
                f"{wrong} tokens differ",
                flush=True,
            )
        given = [torch.full((num_rows,), value, device="cuda") for value in (0.6, 20.0, 0.95, 0.0)]
        different = triton_filter.keep_likely(logits[0], *given) != reference.keep_likely(
            logits[0], *given
        )
        row = {
            "rows": num_rows,
            "filter": time_launches(triton_filter.keep_likely, [(x, *given) for x in logits * 4]),
            "sorting": time_launches(reference.keep_likely, [(x, *given) for x in logits]),
        }
        results.append(row)
        print(
            f"top_k 20, top_p 0.95, rows {num_rows:3}: {row['filter']:6.2f} µs, by sorting {row['sorting']:6.2f}, "
            f"{int(different.any(1).sum())} rows differ",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("linear.json"))
    parser.add_argument("--only", nargs="+", default=["tiles", "layer", "sample"])
    parser.add_argument("--shapes", nargs="+", default=[*SHAPES, "0.6b head", "8b head"])
    parser.add_argument("--models", nargs="+", default=["0.6b"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument(
        "--tune", action="store_true", help="all candidate tiles, not only the op's choice"
    )
    parser.add_argument("--worker", type=int, help="compile this share of the tiles only")
    args = parser.parse_args()
    if args.worker is not None:
        bench_tiles(args.shapes, args.rows, args.tune, 1.0, (args.worker, NUM_WORKERS))
        return
    started = time.perf_counter()
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    if "tiles" in args.only:
        report["copy"] = copy_bandwidth()
        print(f"copy: {report['copy'] / 1e12:.2f} TB/s")
        workers = [
            subprocess.Popen([sys.executable, *sys.argv, "--worker", str(i)])
            for i in range(NUM_WORKERS)
        ]
    if "sample" in args.only:
        report["sample"] = bench_sample([1, 8, 64, 256], [1, 256] if args.tune else [])
    if "layer" in args.only:
        report["layer"] = {f"{m} {r}": bench_layer(m, r) for m in args.models for r in args.rows}
    if "tiles" in args.only:
        for worker in workers:
            worker.wait()
        print(f"compiled after {time.perf_counter() - started:.0f} s", flush=True)
        report["tiles"] = []
        for name in args.shapes:
            report["tiles"] += bench_tiles([name], args.rows, args.tune, report["copy"], None)
            args.out.write_text(json.dumps(report, indent=1))
    args.out.write_text(json.dumps(report, indent=1))
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
