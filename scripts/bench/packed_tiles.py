"""Checks products with packed weights on this GPU, times tiles, and writes the table of the best.

    python scripts/bench/packed_tiles.py --out packed.json [--models 8b] [--kinds int4]

Each tile's result is compared with that of the real values in fp32. Times are microseconds of one
launch from replays of a CUDA graph, over weights larger than the L2. "bf16" is the same product by
the kernels of today, with its norm at one row, and "bytes" the time of reading the weight at the
copy bandwidth. The parts of the depth are chosen once for all numbers of rows from 2 to 64. The
file packed.table has the entries for `kernels/triton/packed_tiles.py`. What the time does not
suffice for is left out and named. Several processes compile first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm.kernels.triton.packed_tiles import RUNGS, PackedGemmTile, Tile
from nanovllm.tools import command_line
from nanovllm.tools.device_limits import measure_limits
from scripts.bench.gpu_timing import time_launches
from scripts.bench.packed_cases import DTYPE, KINDS, MODELS, ROWS, Case, Plain, Shape, shapes, tiles
from scripts.bench.packed_experts_cases import bench_experts

NUM_WORKERS = 14
COMPILING_SHARE = 0.5  # of the time
Times = dict[int, dict[Tile, float]]  # by number of rows


def candidates(models: list[str], kinds: list[str]) -> list[tuple[Shape, str, int, list[Tile]]]:
    """(shape, kind, rows, tiles) of all rungs, the most important first."""
    return [
        (shape, kind, num_rows, tiles(shape, kind, num_rows, few=model == "0.6b"))
        for model in models
        for kind in kinds
        for shape in shapes(model).values()
        for num_rows in RUNGS
    ]


def compile_share(models: list[str], kinds: list[str], worker: int) -> None:
    """Compile one worker's share of the tiles, by running each of them once."""
    every = [(*one[:3], tile) for one in candidates(models, kinds) for tile in one[3]]
    cases: dict[Any, Case] = {}
    for shape, kind, num_rows, tile in every[worker::NUM_WORKERS]:
        case = cases.setdefault((shape, kind), Case(shape, kind, 1))
        case.inputs(num_rows)
        with contextlib.suppress(Exception):  # `bench_shape` reports a tile that fails
            case.run(0, tile)


def bench_shape(name: str, shape: Shape, kind: str, few: bool, end: float) -> dict[str, Any]:
    """Times of all tiles for each rung, and of the best for each number of rows."""
    case, plain = Case(shape, kind), Plain(shape)
    times: Times = {}
    for num_rows in RUNGS:
        case.inputs(num_rows)
        times[num_rows] = {}
        for tile in tiles(shape, kind, num_rows, few):
            if time.perf_counter() > end:
                break
            us = _time_tile(name, case, num_rows, tile)
            if us is not None:
                times[num_rows][tile] = us
    chosen = choose(times)
    rows = {}
    for num_rows in ROWS:
        tile = chosen[next(i for i, most in enumerate(RUNGS) if num_rows <= most)]
        if tile is None or time.perf_counter() > end:
            continue
        case.inputs(num_rows)
        error, launches = case.error(case.run(0, tile)), case.launches()
        norm = case.norm if shape.norm and num_rows == 1 else None
        rows[num_rows] = {
            "tile": tile,
            "us": time_launches(case.run, [(i, tile) for i in launches]),
            "bf16": time_launches(plain.run, [(i, case.x, norm, case.residual) for i in launches]),
            "error": error,
        }
    return {"shape": shape, "kind": kind, "times": times, "chosen": chosen, "rows": rows}


def _time_tile(name: str, case: Case, num_rows: int, tile: Tile) -> float | None:
    """For a tile that fails or is wrong, prints a message and returns None."""
    try:
        error = case.error(case.run(0, tile))
        if not error < 1.5e-2:
            print(f"WRONG {name} rows {num_rows} {tile}: error {error:.3g}", flush=True)
            return None
        return time_launches(case.run, [(i, tile) for i in case.launches()])
    except Exception as problem:
        print(f"FAILED {name} rows {num_rows} {tile}: {str(problem)[:300]}", flush=True)
        return None


def choose(times: Times) -> list[Tile | None]:
    """The best tile of each rung; from 2 to 64 rows with the parts of the depth that are best for
    all of them together."""
    fixed = [num_rows for num_rows in times if 2 <= num_rows <= 64 and times[num_rows]]
    found = {n: min(times[n], key=times[n].__getitem__, default=None) for n in times}
    costs: dict[int, float] = {}
    for splits in {tile.splits for n in fixed for tile in times[n] if _is_gemm(tile)}:
        best = [
            min((us for tile, us in times[n].items() if tile.splits == splits), default=math.inf)
            for n in fixed
        ]
        costs[splits] = sum(map(math.log, best)) if best else math.inf
    if costs:
        splits = min(costs, key=costs.__getitem__)
        for n in fixed:
            some = {tile: us for tile, us in times[n].items() if tile.splits == splits}
            found[n] = min(some, key=some.__getitem__, default=None)
    return list(found.values())


def _is_gemm(tile: Tile) -> bool:
    return isinstance(tile, PackedGemmTile)


def show(name: str, result: dict[str, Any], bandwidth: float) -> None:
    """Print a line for each number of rows, with a mark where bf16 is faster."""
    shape, kind = result["shape"], result["kind"]
    per_weight = 1 + 4 / 128**2 if kind == "fp8" else 0.5 + 4 / 128
    limit = shape.num_lines * shape.depth * per_weight / bandwidth * 1e6
    for num_rows, row in result["rows"].items():
        slower = "  SLOWER THAN BF16" if row["us"] > row["bf16"] else ""
        print(
            f"{name:16} {kind:4} rows {num_rows:3}: {row['us']:7.2f} µs, bf16 {row['bf16']:7.2f}, "
            f"bytes {limit:6.2f} ({limit / row['us']:4.0%}) error {row['error']:.1e} "
            f"{tuple(row['tile'])}{slower}",
            flush=True,
        )


def table(results: dict[str, dict[str, Any]]) -> str:
    """The entries of `packed_tiles.TILES` as Python."""
    lines = []
    for name, result in results.items():
        shape, kind = result["shape"], "fp8" if result["kind"] == "fp8" else "4 bits"
        key = (kind, shape.num_lines, shape.depth, shape.silu)
        lines += [f"    # {name}", f"    {key!r}: ("]
        for tile in result["chosen"]:
            written = "None" if tile is None else f"{type(tile).__name__}{tuple(tile)}"
            lines.append(f"        {written},")
        lines.append("    ),")
    return "\n".join(lines) + "\n"


def as_json(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Results with strings as keys."""
    return {
        name: result
        | {
            "times": {
                str(n): [[tuple(tile), us] for tile, us in of.items()]
                for n, of in result["times"].items()
            }
        }
        for name, result in results.items()
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("packed.json"))
    add("--models", nargs="+", default=list(MODELS), choices=MODELS)
    add("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    add("--seconds", type=float, default=220.0, help="for everything")
    add("--worker", type=int, help="compile this share of the tiles only")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.worker is not None:
        compile_share(args.models, args.kinds, args.worker)
        return
    started = time.perf_counter()
    end = started + args.seconds
    workers = [
        subprocess.Popen([sys.executable, *sys.argv, "--worker", str(i)])
        for i in range(NUM_WORKERS)
    ]
    for worker in workers:
        try:
            worker.wait(max(0.1, started + COMPILING_SHARE * args.seconds - time.perf_counter()))
        except subprocess.TimeoutExpired:
            worker.terminate()
    print(f"compiled after {time.perf_counter() - started:.0f} s", flush=True)
    limits = measure_limits(torch.device("cuda"), DTYPE, torch.cuda.synchronize)
    print(f"{torch.cuda.get_device_name()}, copy {limits.bandwidth / 1e12:.2f} TB/s", flush=True)
    results: dict[str, dict[str, Any]] = {}
    report = {"device": torch.cuda.get_device_name(), "copy": limits.bandwidth}
    if "30b" in args.models:
        report["experts"] = [bench_experts(kind, limits.bandwidth) for kind in args.kinds]
    for model in args.models:
        for kind in args.kinds:
            for part, shape in shapes(model).items():
                if time.perf_counter() > end:
                    print(f"NO TIME for {model} {part} {kind}")
                    continue
                name = f"{model} {part}"
                result = bench_shape(name, shape, kind, model == "0.6b", end)
                results[f"{name} {kind}"] = result
                show(name, result, limits.bandwidth)
                args.out.write_text(json.dumps(report | {"products": as_json(results)}, indent=1))
                args.out.with_suffix(".table").write_text(table(results))
    print(table(results))
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
