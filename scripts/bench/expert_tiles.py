"""Times experts with packed weights on this GPU, and tiles of their products.

    python scripts/bench/expert_tiles.py --out tiles.json [--cases gpt-oss-20b:e2m1 ...]

Times are microseconds of one layer's launch from replays of a CUDA graph, over weights larger than
the L2. "bytes" is the time of reading the chosen experts once at the copy bandwidth. Each tile's
result is compared with that of the tile which the engine takes. The kernels of all tiles in CUDA
C++ are compiled first, several at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm.kernels import reference
from nanovllm.kernels.cuda import nvrtc, packed_linear, packed_wgmma, wgmma_groups
from nanovllm.kernels.cuda.packed_groups import packed_groups
from nanovllm.kernels.cuda.packed_linear import Tile
from nanovllm.kernels.triton import packed_tiles
from nanovllm.kernels.triton.common import NO_CLAMP, Clamp, shared_memory_bytes
from nanovllm.kernels.triton.grouped_gemm import BY_PAIR, BY_PLACE, BY_TOKEN
from nanovllm.kernels.triton.moe_sort import gather, sort_pairs
from nanovllm.kernels.triton.packed_codes import Codes, of_packed
from nanovllm.kernels.triton.packed_experts import run_experts
from nanovllm.kernels.triton.packed_grouped import packed_grouped
from nanovllm.tools import command_line
from nanovllm.tools.device_limits import measure_limits
from nanovllm.tools.shapes import CONFIGS
from scripts.bench.gpu_timing import time_launches
from scripts.bench.packed_cases import num_bytes, random_codes

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
CASES = ("gpt-oss-20b:e2m1", "Qwen3-30B-A3B:int4", "Qwen3-30B-A3B:fp8")
ALPHA, LIMIT = 1.702, 7.0  # of gpt-oss
LAYERS, NUM_THREADS, MOST_ERROR = 4, 16, 2e-2
# (units, depth warps, stages, row warps) by the pairs of a program
SHARED = [(1, 4, 2, 2), (1, 4, 2, 4), (2, 4, 2, 2), (2, 4, 1, 2), (2, 2, 2, 4)]
TILES = {
    8: [
        (4, 4, 1), (4, 2, 1), (4, 2, 1, 2), (4, 8, 1), (2, 4, 2), (2, 2, 2, 2), (2, 2, 3, 2),
        (3, 4, 1), (6, 4, 1),
    ],
    16: [*SHARED, (1, 8, 2, 2), (1, 4, 3)],
    32: [*SHARED, (1, 2, 2, 4), (2, 2, 2, 2)],
    64: [*SHARED, (1, 2, 2, 4), (2, 2, 2, 2), (2, 2, 1, 4)],
}  # fmt: skip


class Layer(NamedTuple):
    gate_up: Codes
    down: Codes
    clamp: Clamp


class Sizes(NamedTuple):
    hidden: int
    inner: int
    experts: int
    top_k: int

    @classmethod
    def of(cls, shape: str) -> Sizes:
        config = CONFIGS[shape]
        inner = config.get("moe_intermediate_size") or config["intermediate_size"]
        experts = config.get("num_experts") or config["num_local_experts"]
        return cls(config["hidden_size"], inner, experts, config["num_experts_per_tok"])


def e2m1_codes(num_rows: int, depth: int, outer: tuple[int, ...]) -> Codes:
    code = torch.randint(256, (*outer, num_rows, depth // 2), dtype=torch.uint8, device=DEVICE)
    power = torch.randint(-8, -5, (*outer, num_rows, depth // 32), device=DEVICE)
    return of_packed(code, (2.0**power).to(DTYPE), None, reference.packed.e2m1_table(DEVICE), 4, 32)


def random_layer(kind: str, sizes: Sizes) -> Layer:
    hidden, inner, experts, _ = sizes
    make = e2m1_codes if kind == "e2m1" else partial(random_codes, kind)
    clamp = NO_CLAMP
    if kind == "e2m1":
        biases = (torch.randn(experts, n, device=DEVICE).to(DTYPE) for n in (2 * inner, hidden))
        clamp = Clamp(*biases, ALPHA, LIMIT)
    return Layer(make(2 * inner, hidden, (experts,)), make(hidden, inner, (experts,)), clamp)


def depth_of(codes: Codes) -> int:
    return codes.code.shape[-1] * 8 // codes.bits


def all_tiles(pairs_each: float, codes: Codes) -> Iterator[Any]:
    yield from tiles(pairs_each, codes)
    yield from wgmma_tiles(
        pairs_each, torch.empty(1, depth_of(codes), device=DEVICE, dtype=DTYPE), codes
    )


class Rows:
    """The inputs of so many rows, and the calls of both products: in Triton, or with a tile in CUDA
    C++."""

    def __init__(self, layers: list[Layer], sizes: Sizes, num_rows: int) -> None:
        self.layers, self.sizes = layers, sizes
        logits = torch.randn(num_rows, sizes.experts, device=DEVICE)
        self.weight, self.expert = reference.experts.topk_softmax(logits, sizes.top_k, True)
        self.x = torch.randn(num_rows, sizes.hidden, device=DEVICE).to(DTYPE)
        self.inner = torch.randn(num_rows * sizes.top_k, sizes.inner, device=DEVICE).to(DTYPE)
        self.groups = sort_pairs(self.expert, sizes.experts)
        self.share = len(self.expert.unique()) / sizes.experts

    def all(self, i: int) -> Tensor:
        gate_up, down, clamp = self.layers[i]
        found = run_experts(self.x, self.weight, self.expert, gate_up, down, None, None, clamp)
        assert found is not None
        return found

    def gate_up(self, i: int, launch: Any) -> Tensor:
        codes, _, (bias, _, alpha, limit) = self.layers[i]
        if isinstance(launch, packed_tiles.PackedGemmTile):
            return packed_grouped(
                self.x, codes, self.groups, self.sizes.top_k, x_by=BY_TOKEN.value,
                out_by=BY_PLACE.value, bias_EO=bias, silu_mul=True, alpha=alpha, limit=limit,
                launch=launch,
            )  # fmt: skip
        known = {"silu_mul": True, "bias_EO": bias, "clamp": (alpha, limit) if limit else None}
        if isinstance(launch, wgmma_groups.Tile):
            x_PD = gather(self.x, self.groups, self.sizes.top_k)
            return wgmma_groups.wgmma_groups(
                x_PD, codes, self.groups, tile=launch, by_place=True, **known
            )
        return packed_groups(
            self.x, codes, self.groups, tile=launch, x_shared_by=self.sizes.top_k, by_place=True,
            **known,
        )  # fmt: skip

    def down(self, i: int, launch: Any) -> Tensor:
        _, codes, (_, bias, *_) = self.layers[i]
        if isinstance(launch, packed_tiles.PackedGemmTile):
            return packed_grouped(
                self.inner, codes, self.groups, self.sizes.top_k, self.weight, x_by=BY_PLACE.value,
                out_by=BY_PAIR.value, bias_EO=bias, launch=launch,
            )  # fmt: skip
        known = {"factor_TK": self.weight, "bias_EO": bias}
        if isinstance(launch, wgmma_groups.Tile):
            return wgmma_groups.wgmma_groups(self.inner, codes, self.groups, tile=launch, **known)
        return packed_groups(self.inner, codes, self.groups, tile=launch, **known)


def wgmma_tiles(pairs_each: float, x: Tensor, codes: Codes) -> Iterator[wgmma_groups.Tile]:
    """Tiles of packed_wgmma.cu for so many pairs of an expert."""
    if not wgmma_groups.takes(x, codes):
        return
    for rows in wgmma_groups.ROWS:
        if rows / 4 <= pairs_each <= 2 * rows or rows == wgmma_groups.ROWS[-1] < pairs_each:
            for sizes in ((1, 3), (1, 4), (1, 6), (2, 3), (2, 4), (2, 6), (3, 3), (3, 4)):
                yield wgmma_groups.Tile(rows, *sizes)


def tiles(pairs_each: float, codes: Codes) -> Iterator[tuple[int, Tile]]:
    """Tiles of packed_linear.cu for so many pairs of an expert."""
    for most, sizes in TILES.items():
        if most / 8 <= max(1.0, pairs_each) * 2 and pairs_each <= 4 * most:
            for one in sizes:
                if packed_linear.shared_bytes(Tile(*one), most, codes, 0) <= 200 << 10:
                    yield most, Tile(*one)


def compile_all(layer: Layer, sizes: Sizes, pairs_each: float) -> None:
    def compile_one(job: tuple[Codes, bool, Any]) -> None:
        codes, is_gate_up, tile = job
        x = torch.empty(1, depth_of(codes), device=DEVICE, dtype=DTYPE)
        form = {
            "SILU": is_gate_up,
            "CLAMP": is_gate_up and layer.clamp is not NO_CLAMP,
            "OUT_BY_PLACE": is_gate_up,
        }
        if isinstance(tile, wgmma_groups.Tile):
            shape = packed_wgmma.Tile(tile.groups, 1, tile.num_stages)
            function = packed_wgmma.function_of(x, codes, shape, tile.rows, EXPERTS=1, **form)
        else:
            form |= {"PAIRS": 3, "X_BY_PLACE": not is_gate_up}
            function = packed_linear.function_of(x, codes, tile[1], tile[0] // 8, **form)
        nvrtc.compile_function(function, torch.cuda.get_device_capability())

    parts = (layer.gate_up, True), (layer.down, False)
    jobs = [(*part, tile) for part in parts for tile in all_tiles(pairs_each, part[0])]
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        list(threads.map(compile_one, jobs))


def bench(rows: Rows, name: str, bandwidth: float) -> dict[str, Any]:
    """The times of a layer and of all tiles of its products; prints the best."""
    calls = [(i % LAYERS,) for i in range(28)]
    layer = rows.layers[0]
    limit = rows.share * sum(map(num_bytes, layer[:2])) / bandwidth * 1e6
    all_us = time_launches(rows.all, calls)
    found: dict[str, Any] = {"layer": all_us, "bytes": limit}
    print(f"{name}: {all_us:.1f} µs, bytes {limit:.1f} ({limit / all_us:.0%})")
    pairs_each, shared = rows.groups.pairs_each, shared_memory_bytes(DEVICE)
    for part, run, codes in (("gate_up", rows.gate_up, layer[0]), ("down", rows.down, layer[1])):
        chosen = packed_tiles.grouped_tile(pairs_each, codes, depth_of(codes), shared)
        wanted = run(0, chosen).float()
        times = {f"triton {tuple(chosen)}": time_launches(run, [(i, chosen) for (i,) in calls])}
        for tile in all_tiles(pairs_each, codes):
            if isinstance(tile, wgmma_groups.Tile):
                what = f"wgmma {tuple(tile)}"
            else:
                what = f"linear {tile[0]} {tuple(tile[1])}"
            try:
                error = float((run(0, tile).float() - wanted).norm() / wanted.norm())
                us = time_launches(run, [(i, tile) for (i,) in calls])
            except (RuntimeError, torch.OutOfMemoryError) as problem:
                print(f"FAILED {what}: {str(problem)[:80]}")
                continue
            times[what if error < MOST_ERROR else f"WRONG {error:.2g} {what}"] = us
        best = sorted(times.items(), key=lambda one: one[1])
        found[part] = dict(best)
        share = rows.share * num_bytes(codes) / bandwidth * 1e6
        print(f"  {part}: bytes {share:.1f}; {next(iter(times.items()))}", flush=True)
        for what, us in best[:4]:
            print(f"    {us:.1f} {what}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=CASES, help="SHAPE:KIND")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--seconds", type=float, default=200.0, help="for all")
    parser.add_argument("--out", type=Path, help="times as JSON")
    args = parser.parse_args()
    end = time.perf_counter() + args.seconds
    bandwidth = measure_limits(DEVICE, DTYPE, torch.cuda.synchronize).bandwidth
    print(torch.cuda.get_device_name(), f"copy {bandwidth / 1e12:.2f} TB/s")
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "bandwidth": bandwidth}
    for case in args.cases:
        shape, _, kind = case.partition(":")
        sizes = Sizes.of(shape)
        layers = [random_layer(kind, sizes) for _ in range(LAYERS)]
        for num_rows in args.rows:
            if time.perf_counter() > end:
                print(f"NO TIME for {case}, {num_rows} rows")
                break
            rows = Rows(layers, sizes, num_rows)
            compile_all(layers[0], sizes, rows.groups.pairs_each)
            report[f"{case} {num_rows}"] = bench(rows, f"{case} {num_rows} rows", bandwidth)
            if args.out is not None:
                args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
