"""Times the kernels of deterministic engines on this GPU, and checks that tiles give the same bits.

    python scripts/bench/ordered_tiles.py --out ordered.json [--only products] [--rows 1 256]

Products: microseconds of each tile, of the tile that is chosen, and of what a plain engine runs
(with the norm before it, if that is fused there); and of the library's product alone, with whether
its bits are those of ours. Attention: of decode steps of rows with equal
lengths, by the ordered kernel and by the plain one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm.kernels import order
from nanovllm.kernels.triton import linear as plain_linear
from nanovllm.kernels.triton.attention_decode import paged_attention_decode
from nanovllm.kernels.triton.common import num_multiprocessors, shared_memory_bytes
from nanovllm.kernels.triton.norm_act import rms_norm
from nanovllm.kernels.triton.ordered_attention import OrderedTile as AttentionTile
from nanovllm.kernels.triton.ordered_attention import ordered_attention
from nanovllm.kernels.triton.ordered_gemm import OrderedTile, ordered_linear, ordered_tile
from nanovllm.tools import command_line
from scripts.bench.gpu_timing import time_launches
from scripts.bench.linear_cases import DTYPE, Case
from scripts.bench.linear_tiles import SHAPES

# Tiles of up to 16 rows. The shares of a depth follow from `order.LEAST_PROGRAMS`, for all rows.
_FEW = OrderedTile(16, 64, 128, 4, 4, splits=True)
FEW_ROW_TILES = (
    _FEW,
    _FEW._replace(prefetch=True),
    _FEW._replace(num_stages=6),
    _FEW._replace(prefetch=True, num_stages=6),
    _FEW._replace(prefetch=True, columns=64, num_stages=8),
    _FEW._replace(prefetch=True, columns=256, num_stages=3),
    _FEW._replace(prefetch=True, lines=128, columns=64, num_stages=6),
)
NUM_THREADS = 12  # that compile


def tiles(num_rows: int, shares: int) -> Iterator[OrderedTile]:
    """Tiles to try, the chosen one left out."""
    if num_rows <= 16:
        yield from (one._replace(splits=shares > 1) for one in FEW_ROW_TILES)
        return
    padded = max(16, min(256, 1 << (num_rows - 1).bit_length()))
    if num_rows > 256:
        for rows, lines, num_warps in (
            (256, 128, 8), (128, 256, 8), (128, 128, 8), (128, 128, 4), (64, 128, 4), (128, 64, 4),
        ):  # fmt: skip
            yield OrderedTile(rows, lines, 64, 4, num_warps)
        return
    for rows in sorted({padded, max(16, padded // 2), max(16, padded // 4), max(16, padded // 8)}):
        for lines, columns, stages in (
            (64, 128, 4), (64, 64, 8), (64, 64, 5), (128, 64, 4), (128, 128, 3),
        ):  # fmt: skip
            num_warps = 8 if rows * lines > 128 * 128 else 4
            if rows * lines <= 256 * 128 and (num_rows > 1 or columns == 128 or stages == 8):
                for splits in {False, shares > 1 and num_rows <= 64}:
                    tile = OrderedTile(rows, lines, columns, stages, num_warps, splits)
                    yield tile._replace(prefetch=num_rows == 1)


def product(name: str, num_rows: int, only_chosen: bool) -> dict[str, Any]:
    """Times of one product without its norm. "apart": of the chosen tile, after the norm."""
    case = Case(SHAPES[name], num_rows)
    weight = case.weights[0]
    num_lines, depth = weight.shape
    shares = order.shares_of(num_lines, depth)
    device = weight.device
    chosen = ordered_tile(
        num_rows, num_lines, depth, shared_memory_bytes(device), num_multiprocessors(device)
    )

    def run(idx: int, tile: OrderedTile) -> Tensor:
        return ordered_linear(
            case.x, case.weights[idx], None, case.residual, case.silu, launch=tile
        )

    def apart(idx: int) -> Tensor:
        x = case.x if case.norms is None else rms_norm(case.x, case.norms[idx], 1e-6)
        return ordered_linear(x, case.weights[idx], None, case.residual, case.silu, launch=chosen)

    def plain(idx: int) -> Tensor:
        norm = None if case.norms is None else case.norms[idx]
        if plain_linear.takes(case.x, case.weights[idx], norm is not None, case.silu):
            return plain_linear.fused_linear(
                case.x, norm, case.weights[idx], None, case.residual, 1e-6, case.silu
            )
        return case.apart(idx)

    def library(idx: int) -> Tensor:
        return torch.nn.functional.linear(case.x, case.weights[idx])

    first, found, other = run(0, chosen), [], 0
    others = () if only_chosen else tuple(tiles(num_rows, shares.number))
    compile_at_once(partial(run, 0), others)
    for tile in (chosen, *others):
        try:
            same = torch.equal(first, run(0, tile))
            us = time_launches(run, [(i, tile) for i in case.launches()])
        except Exception as error:  # Triton may refuse a tile in many ways
            print(name, tile, type(error).__name__, str(error)[:80], flush=True)
            continue
        other += not same
        found.append((round(us, 2), list(tile), same))
    library_us = round(time_launches(library, [(i,) for i in case.launches()]), 2)
    bare = ordered_linear(case.x, weight, None, launch=chosen)
    is_library_same = torch.equal(bare, library(0))
    plain_us = round(time_launches(plain, [(i,) for i in case.launches()]), 2)
    apart_us = round(time_launches(apart, [(i,) for i in case.launches()]), 2)
    best = sorted(found[1:])[:4]
    print(f"{name} rows {num_rows} shares {shares.number}: plain {plain_us} apart {apart_us} "
          f"library {library_us} {is_library_same} chosen {found[0]} best {best} others {other}",
          flush=True)  # fmt: skip
    return {
        "name": name, "rows": num_rows, "least_programs": order.LEAST_PROGRAMS,
        "shares": list(shares), "plain_us": plain_us, "apart_us": apart_us, "chosen": found[0],
        "best": best, "tiles_with_other_bits": other, "library_us": library_us,
        "library_has_same_bits": is_library_same,
    }  # fmt: skip


def compile_at_once(run: Callable[[OrderedTile], Tensor], tiles: Sequence[OrderedTile]) -> None:
    """Compile and load the kernels of tiles in threads. A tile that fails is reported later."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for launched in [pool.submit(run, tile) for tile in tiles]:
            launched.exception()
    torch.cuda.synchronize()


def attention(num_heads: int, num_kv_heads: int, num_rows: int, seq_len: int) -> dict[str, Any]:
    blocks, head = -(-seq_len // 64), 128
    caches = torch.randn(4, 2, num_rows * blocks, 64, num_kv_heads, head, device="cuda").to(DTYPE)
    table = torch.randperm(num_rows * blocks, device="cuda").int().view(num_rows, blocks)
    lengths = torch.full((num_rows,), seq_len, dtype=torch.int32, device="cuda")
    q = torch.randn(num_rows, num_heads, head, device="cuda").to(DTYPE)
    calls = [(i % 4,) for i in range(28)]

    def ordered(i: int, launch: AttentionTile | None = None) -> Tensor:
        keys, values = caches[i]
        return ordered_attention(
            q, keys, values, table, lengths, lengths, 1, head**-0.5, 0, launch=launch
        )

    def plain(i: int) -> Tensor:
        return paged_attention_decode(q, caches[i, 0], caches[i, 1], table, lengths, head**-0.5, 0)

    found = {"heads": num_heads, "kv_heads": num_kv_heads, "rows": num_rows, "seq_len": seq_len,
             "ordered_us": round(time_launches(ordered, calls), 2),
             "plain_us": round(time_launches(plain, calls), 2),
             "tiles": {
                 f"{workers} workers, {stages} stages": round(time_launches(
                     ordered, [(i, AttentionTile(workers, stages)) for (i,) in calls]), 2)
                 for workers in (2, 4, 8, 16) for stages in (2, 3) if num_rows == 1
             },
             "error": float((ordered(0).float() - plain(0).float()).abs().max())}  # fmt: skip
    print(found, flush=True)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=("products", "attention"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--chosen", action="store_true", help="time the chosen tiles alone")
    parser.add_argument("--models", nargs="+", default=["0.6b", "8b"])
    parser.add_argument("--least-programs", type=int, nargs="+", default=[order.LEAST_PROGRAMS])
    args = parser.parse_args(argv)
    results: list[dict[str, Any]] = []
    if args.only != "products":
        for heads, num_rows, seq_len in ((16, 1, 512), (16, 1, 2048), (16, 16, 700), (16, 256, 700),
                                         (32, 1, 1024), (32, 256, 700)):  # fmt: skip
            results.append(attention(heads, 8, num_rows, seq_len))
    if args.only != "attention":
        names = [name for name in SHAPES if name.split()[0] in args.models and "bare" not in name]
        for num_rows, order.LEAST_PROGRAMS in itertools.product(args.rows, args.least_programs):
            # a head has the last tokens of prompts alone
            used = [name for name in names if num_rows <= 256 or not name.endswith("head")]
            results += [product(name, num_rows, args.chosen) for name in used]
            if args.out is not None:
                args.out.write_text(json.dumps(results, indent=1) + "\n")
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
