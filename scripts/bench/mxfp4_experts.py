"""Times the experts of gpt-oss-20b in MXFP4 on this GPU, and tiles of their products.

    python scripts/bench/mxfp4_experts.py [--rows 1 16 64 256] [--seconds 60]

Times are microseconds of one layer's launch from replays of a CUDA graph, over weights larger than
the L2. "bytes" is the time of reading the chosen experts once at the copy bandwidth. Each tile's
result is compared with that of the tile which the engine takes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm.kernels import reference
from nanovllm.kernels.cuda import packed_linear
from nanovllm.kernels.triton import packed_gemv, packed_tiles
from nanovllm.kernels.triton.common import Clamp
from nanovllm.kernels.triton.grouped_gemm import BY_PAIR, BY_PLACE, BY_TOKEN
from nanovllm.kernels.triton.moe_sort import sort_pairs
from nanovllm.kernels.triton.packed_codes import Codes, of_packed
from nanovllm.kernels.triton.packed_experts import packed_grouped, run_experts
from nanovllm.tools import command_line
from nanovllm.tools.device_limits import measure_limits
from nanovllm.tools.shapes import CONFIGS
from scripts.bench.gpu_timing import time_launches

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
CONFIG = CONFIGS["gpt-oss-20b"]
HIDDEN, SIZE = CONFIG["hidden_size"], CONFIG["intermediate_size"]
EXPERTS, TOP_K = CONFIG["num_local_experts"], CONFIG["num_experts_per_tok"]
LAYERS, ALPHA, LIMIT, MOST_ERROR = 3, 1.702, 7.0, 2e-2


class Layer(NamedTuple):
    gate_up: Codes
    down: Codes
    clamp: Clamp


def random_layer() -> Layer:
    def codes(num_rows: int, depth: int) -> Codes:
        shape = (EXPERTS, num_rows, depth // 2)
        code = torch.randint(256, shape, dtype=torch.uint8, device=DEVICE)
        power = torch.randint(-8, -5, (EXPERTS, num_rows, depth // 32), device=DEVICE)
        scale = (2.0**power).to(DTYPE)
        return of_packed(code, scale, None, reference.packed.e2m1_table(DEVICE), 4, 32)

    biases = (torch.randn(EXPERTS, n, device=DEVICE).to(DTYPE) for n in (2 * SIZE, HIDDEN))
    return Layer(codes(2 * SIZE, HIDDEN), codes(HIDDEN, SIZE), Clamp(*biases, ALPHA, LIMIT))


class Rows:
    """The inputs of so many rows, and the calls of both products."""

    def __init__(self, layers: list[Layer], num_rows: int) -> None:
        self.layers = layers
        logits = torch.randn(num_rows, EXPERTS, device=DEVICE)
        self.weight, self.expert = reference.experts.topk_softmax(logits, TOP_K, True)
        self.x = torch.randn(num_rows, HIDDEN, device=DEVICE).to(DTYPE)
        self.inner = torch.randn(num_rows * TOP_K, SIZE, device=DEVICE).to(DTYPE)
        self.groups = sort_pairs(self.expert, EXPERTS)
        self.share = len(self.expert.unique()) / EXPERTS
        self.is_few = packed_tiles.few_pairs(num_rows, TOP_K, EXPERTS)

    def all(self, i: int) -> Tensor:
        gate_up, down, clamp = self.layers[i]
        found = run_experts(self.x, self.weight, self.expert, gate_up, down, None, None, clamp)
        assert found is not None
        return found

    def gate_up(self, i: int, launch: Any = None) -> Tensor:
        codes, _, clamp = self.layers[i]
        known = {"silu_mul": True, "alpha": ALPHA, "limit": LIMIT, "launch": launch}
        bias = clamp.gate_up_bias_EG
        if self.is_few and not isinstance(launch, packed_tiles.PackedGemvTile):
            return packed_linear.packed_pairs(
                self.x, codes, self.expert, x_shared_by=TOP_K, silu_mul=True, bias_EO=bias,
                clamp=(ALPHA, LIMIT), tile=launch,
            )  # fmt: skip
        if self.is_few:
            return packed_gemv.packed_gemv(
                self.x, codes, bias_O=bias, expert_TK=self.expert, x_shared_by=TOP_K, **known
            )
        return packed_grouped(
            self.x, codes, self.groups, TOP_K, x_by=BY_TOKEN.value, out_by=BY_PLACE.value,
            bias_EO=bias, **known,
        )  # fmt: skip

    def down(self, i: int, launch: Any = None) -> Tensor:
        _, codes, clamp = self.layers[i]
        if self.is_few and not isinstance(launch, packed_tiles.PackedGemvTile):
            return packed_linear.packed_pairs(
                self.inner, codes, self.expert, factor_TK=self.weight, bias_EO=clamp.down_bias_ED,
                tile=launch,
            )  # fmt: skip
        if self.is_few:
            return packed_gemv.packed_gemv(
                self.inner, codes, bias_O=clamp.down_bias_ED, expert_TK=self.expert,
                factor_TK=self.weight, adds_pairs=True, launch=launch,
            )  # fmt: skip
        return packed_grouped(
            self.inner, codes, self.groups, TOP_K, self.weight, x_by=BY_PLACE.value,
            out_by=BY_PAIR.value, bias_EO=clamp.down_bias_ED, launch=launch,
        )  # fmt: skip


def tiles(is_few: bool, num_rows: int, is_sum: bool) -> Iterator[Any]:
    """Of single rows (units, depth warps, stages, row warps, programs) in CUDA C++ and (outs,
    warps, pieces, ahead) in Triton, else (rows, lines, columns, chunks, splits, stages, warps)."""
    if is_few:
        units = (
            [(1, 16, 2), (1, 16, 3), (1, 8, 2), (1, 8, 4), (2, 16, 2), (2, 8, 2), (1, 4, 4)]
            if is_sum else
            [(2, 4, 2), (1, 4, 4), (1, 8, 2), (2, 8, 2), (1, 4, 2), (4, 4, 1), (1, 8, 3)]
        )  # fmt: skip
        yield from (packed_linear.Tile(*one) for one in units)
        for outs, warps, each, ahead in ((4, 2, 1, 1), (2, 2, 1, 2), (1, 4, 1, 1)):
            yield packed_tiles.PackedGemvTile(outs, warps, each, ahead)
        return
    if num_rows <= 64:
        cases = [
            (16, 64, 64, 3, 3, 4), (16, 64, 64, 3, 2, 4), (16, 64, 64, 1, 4, 4),
            (16, 64, 64, 5, 3, 4), (16, 64, 32, 5, 3, 4), (16, 128, 64, 3, 3, 8),
            (32, 64, 64, 3, 3, 4),
        ]  # fmt: skip
    else:
        cases = [
            (64, 128, 64, 1, 4, 8), (64, 128, 64, 3, 2, 8), (64, 64, 64, 1, 4, 4),
            (64, 64, 64, 3, 2, 4), (32, 64, 64, 3, 3, 4), (128, 128, 64, 1, 4, 8),
        ]  # fmt: skip
    for rows, lines, columns, each, stages, warps in cases:
        yield packed_tiles.PackedGemmTile(rows, lines, columns, each, 1, stages, warps)


def bench(rows: Rows, num_rows: int, bandwidth: float, end: float) -> None:
    """Print the layer's time, and those of all tiles, best first."""
    calls = [(i % LAYERS,) for i in range(28)]
    parts: tuple[tuple[str, Callable[..., Tensor], int], ...] = (
        ("all", rows.all, 3), ("gate_up", rows.gate_up, 2), ("down", rows.down, 1)
    )  # fmt: skip
    for name, run, thirds in parts:
        num_bytes = rows.share * EXPERTS * thirds * SIZE * HIDDEN * 9 / 16
        limit, own = num_bytes / bandwidth * 1e6, time_launches(run, calls)
        print(f"{num_rows} rows {name}: {own:.1f} µs, bytes {limit:.1f} ({limit / own:.0%})")
        if name == "all":
            continue
        wanted, found = run(0).float(), []
        for tile in tiles(rows.is_few, num_rows, name == "down"):
            if time.perf_counter() > end:
                print("NO TIME for further tiles")
                break
            try:
                error = float((run(0, tile).float() - wanted).norm() / wanted.norm())
                us = time_launches(run, [(i, tile) for (i,) in calls])
            except (RuntimeError, torch.OutOfMemoryError) as problem:
                print(f"FAILED {tuple(tile)}: {str(problem)[:80]}")
                continue
            found.append((us, tuple(tile), "" if error < MOST_ERROR else f" WRONG {error:.2g}"))
        for us, tile, wrong in sorted(found):
            print(f"    {us:7.1f} {tile}{wrong}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 1, 256])
    parser.add_argument("--seconds", type=float, default=60.0, help="for all tiles")
    args = parser.parse_args()
    end = time.perf_counter() + args.seconds
    bandwidth = measure_limits(DEVICE, DTYPE, torch.cuda.synchronize).bandwidth
    print(torch.cuda.get_device_name(), f"copy {bandwidth / 1e12:.2f} TB/s")
    layers = [random_layer() for _ in range(LAYERS)]
    for num_rows in args.rows:
        bench(Rows(layers, num_rows), num_rows, bandwidth, end)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
