"""Which tiles of products give the same bits on this GPU.

    python scripts/bench/same_bits.py --out same_bits.json [--shapes 1024x2048 …]

Every tile multiplies the first rows of one x with one weight. A group is the tiles whose results
for these rows equal the group's first, bit by bit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm.kernels.triton.gated_gemm import GatedTile, gated_gemm
from nanovllm.kernels.triton.skinny_gemm import skinny_gemm
from nanovllm.kernels.triton.skinny_tiles import SkinnyTile
from nanovllm.kernels.triton.split_k_gemm import SplitKTile, split_k_gemm
from nanovllm.tools import command_line

Product = Callable[[Tensor, Tensor], Tensor]
ROWS = (1, 2, 8, 16, 17, 64, 128, 256, 1000, 4096)


def products(num_rows: int) -> Iterator[tuple[str, Product]]:
    """The ways to multiply this many rows."""
    yield "cublas", linear
    if num_rows in (2, 16):
        for slices, columns in ((1, 128), (4, 128)):
            tile = SkinnyTile(16, slices, columns, 1, max(1, slices))
            yield f"skinny {slices}x{columns}", _skinny(tile)
    for rows in (16, 32, 64, 128):
        for outs in (32, 64):
            for splits in (1, 2):
                tile = SplitKTile(rows, outs, 64, splits, 3, 4)
                if num_rows in (1, 17, 256):
                    yield f"split {rows}x{outs} / {splits}", _split(tile)


def _skinny(tile: SkinnyTile) -> Product:
    return lambda x, w: skinny_gemm(x, None, w, None, None, 0.0, False, launch=tile)


def _split(tile: SplitKTile) -> Product:
    return lambda x, w: split_k_gemm(x, w, None, None, False, launch=tile)


def gated_groups(device: str, depth: int, num_outs: int) -> dict[str, list[str]]:
    """The same for silu(gate) · up, where the weights are the left operand (`gated_gemm`)."""
    x = torch.randn(256, depth, device=device).to(torch.bfloat16)
    weight = (torch.randn(2 * num_outs, depth, device=device) / depth**0.5).to(torch.bfloat16)
    results: list[tuple[str, Tensor]] = []
    for rows, lines in ((16, 64), (32, 64), (64, 128), (128, 128), (256, 128), (8, 64)):
        for num_rows in (1, rows):
            tile = GatedTile(rows, lines, 0, 64, 3, 8 if rows > 128 else 4)
            name = f"weights left {num_rows} in {rows}x{lines}"
            try:
                results.append((name, gated_gemm(x[:num_rows], weight, None, launch=tile)))
            except Exception as error:  # Triton may refuse a tile in many ways
                print(name, type(error).__name__, str(error)[:200])
    for rows, outs in ((16, 64), (64, 64), (128, 64)):
        tile = SplitKTile(rows, outs, 64, 1, 3, 4)
        name = f"weights right {rows}x{outs}"
        results.append((name, split_k_gemm(x, weight, None, None, True, launch=tile)))
    return grouped([(name, y[:1]) for name, y in results])


def grouped(results: list[tuple[str, Tensor]]) -> dict[str, list[str]]:
    """Names of equal results, by the first of them."""
    groups: dict[str, tuple[Tensor, list[str]]] = {}
    for name, y in results:
        for first, names in groups.values():
            if torch.equal(first.view(torch.int16), y.view(torch.int16)):
                names.append(name)
                break
        else:
            groups[name] = (y, [name])
    return {name: names for name, (_, names) in groups.items()}


def groups_of(device: str, num_outs: int, depth: int) -> dict[str, list[str]]:
    """Groups of all ways and numbers of rows, by the bits of the first row's outputs."""
    x = torch.randn(max(ROWS), depth, device=device).to(torch.bfloat16)
    weight = (torch.randn(num_outs, depth, device=device) / depth**0.5).to(torch.bfloat16)
    results: list[tuple[str, Tensor]] = []
    for num_rows in ROWS if device == "cuda" else (1, 2, 17):
        for name, product in products(num_rows):
            try:
                y = product(x[:num_rows], weight)
            except Exception as error:
                print(name, num_rows, type(error).__name__, str(error)[:200])
                continue
            results.append((f"{name} @ {num_rows}", y[:1]))
    return grouped(results)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shapes", nargs="+", default=["1024x2048", "4096x1024"])
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    for shape in args.shapes:
        num_outs, depth = map(int, shape.split("x"))
        found[shape] = groups_of(args.device, num_outs, depth)
        found[f"{shape} gated"] = gated_groups(args.device, depth, num_outs)
        for name, names in found[shape].items():
            print(f"{shape}: {len(names)} like {name}: {', '.join(names)}", flush=True)
        for name, names in found[f"{shape} gated"].items():
            print(f"{shape} gated: {len(names)} like {name}: {', '.join(names)}", flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
