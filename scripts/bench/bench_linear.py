"""Checks the fused products and the sampler on this GPU, then times tiles, cuBLAS and Inductor.

    python scripts/bench/bench_linear.py --out linear.json [--only tiles] [--rows 1 8] [--tune]

Products are compared with fp64. Times are microseconds of one launch, from replays of a CUDA graph
of many launches; each launch has its own weights, so the L2 has no effect. "layer" is a chain of
all the model's layers in a decode step: norm + qkv, rope and cache write, attention, out, norm +
gate + up + SiLU, down. Shares are of the copy bandwidth measured in the same run. Compiles run in
several processes first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm.kernels import reference
from nanovllm.kernels.triton import sample as triton_sample
from nanovllm.kernels.triton import topk_topp
from nanovllm.kernels.triton.split_k_gemm import SplitKTile
from nanovllm.tools import command_line
from nanovllm.tools.device_limits import measure_limits
from scripts.bench.gpu_timing import time_launches
from scripts.bench.linear_cases import DTYPE, Case, Small
from scripts.bench.linear_layer import bench_layer
from scripts.bench.linear_tiles import MODELS, SHAPES, Tile, tiles

VOCAB = SHAPES["0.6b head"].num_outs
NUM_WORKERS = 14


def compile_share(names: list[str], rows: list[int], tune: bool, worker: int) -> None:
    """Compile one worker's share of the tiles."""
    launches = [
        (name, num_rows, tile)
        for name in names
        for num_rows in rows
        for tile in tiles(SHAPES[name], num_rows, tune)
    ]
    for name, num_rows, tile in launches[worker::NUM_WORKERS]:
        Small(SHAPES[name], num_rows).fused(0, tile)


def bench_tiles(name: str, rows: list[int], tune: bool, bandwidth: float) -> list[dict[str, Any]]:
    """Check and time a product's tiles for each number of rows."""
    results: list[dict[str, Any]] = []
    weights: list[Tensor] | None = None
    for num_rows in rows:
        case = Case(SHAPES[name], num_rows, weights)
        weights = case.weights
        candidates = tiles(SHAPES[name], num_rows, tune)
        timed = [_time_tile(name, case, tile, tile == candidates[0]) for tile in candidates]
        found = [row for row in timed if row is not None]
        if found:
            _compare(name, case, found, bandwidth)
        results += found
    return results


def _time_tile(name: str, case: Case, tile: Tile, is_chosen: bool) -> dict[str, Any] | None:
    """For a tile that fails or is wrong, prints a message and returns None."""
    try:
        error = case.error(case.fused(0, tile))
        if not error < 1e-2:
            print(f"WRONG {name} rows {case.num_rows} {tuple(tile)}: error {error:.3g}")
            return None
        us = [
            time_launches(case.fused, [(i, tile, pdl) for i in case.launches()])
            for pdl in ((None, False) if is_chosen else (None,))
        ]
    except Exception as problem:
        print(f"FAILED {name} rows {case.num_rows} {tuple(tile)}: {str(problem)[:200]}")
        return None
    return {
        "shape": name,
        "rows": case.num_rows,
        "tile": tile,
        "us": us[0],
        "us_no_pdl": us[-1],
        "error": error,
    }


def _compare(name: str, case: Case, rows: list[dict[str, Any]], bandwidth: float) -> None:
    """Print the six best tiles, and the best and the chosen one beside cuBLAS."""
    ordered = sorted(rows, key=lambda row: row["us"])
    best, chosen, launches = ordered[0], rows[0], case.launches()
    if isinstance(best["tile"], SplitKTile):
        ahead = best["tile"]._replace(prefetch=True)
        best["us_prefetch"] = time_launches(case.fused, [(i, ahead) for i in launches])
        best["us_no_pdl"] = time_launches(case.fused, [(i, best["tile"], False) for i in launches])
    cublas = time_launches(linear, [(case.x, case.weights[i]) for i in launches])
    apart = time_launches(case.apart, [(i,) for i in launches])
    chosen |= {"cublas": cublas, "apart": apart, "chosen": True}
    for row in ordered[:6]:
        print(f"    {row['us']:6.2f} {row['us_no_pdl']:6.2f} {tuple(row['tile'])}")
    share = case.weight_bytes / (best["us"] * 1e-6) / bandwidth
    print(
        f"{name:13} rows {case.num_rows:2}: chosen {chosen['us']:6.2f} "
        f"({chosen['us_no_pdl']:6.2f} without PDL), best {best['us']:6.2f} "
        f"({best['us_no_pdl']:6.2f}) {share:4.0%} of copy bandwidth | cuBLAS {cublas:6.2f}, "
        f"with its neighbours {apart:6.2f} | {tuple(best['tile'])} "
        f"| prefetch {best.get('us_prefetch', 0):6.2f}",
        flush=True,
    )


def bench_sample(rows: list[int], inductor_rows: list[int]) -> list[dict[str, float]]:
    """Time the sampler and the filter, and their references: compiled by Inductor, or by
    sorting."""
    results = []
    compiled = torch.compile(reference.sample.sample, dynamic=False)
    for num_rows in rows:
        logits = [(4 * torch.randn(num_rows, VOCAB, device="cuda")).to(DTYPE) for _ in range(4)]
        seed, pos = torch.randint(2**62, (2, num_rows), device="cuda")
        for temperature in (0.0, 0.8):
            given = (torch.full((num_rows,), temperature, device="cuda"), seed, pos)
            actual = triton_sample.sample(logits[0], *given)
            expected = reference.sample.sample(logits[0], *given)
            wrong = int((actual != expected).sum())
            if temperature == 0:
                top = logits[0].float()
                wrong = int((top.gather(1, actual[:, None])[:, 0] != top.max(-1).values).sum())
            inductor = 0.0
            if num_rows in inductor_rows:
                inductor = time_launches(compiled, [(x, *given) for x in logits])
            us = time_launches(triton_sample.sample, [(x, *given) for x in logits * 4])
            row = {"rows": num_rows, "temperature": temperature, "us": us, "inductor": inductor}
            results.append(row)
            print(
                f"sample rows {num_rows:3} temperature {temperature}: {us:6.2f} µs, "
                f"Inductor {inductor:6.2f}, {wrong} tokens differ",
                flush=True,
            )
        given = [torch.full((num_rows,), value, device="cuda") for value in (0.6, 20.0, 0.95, 0.0)]
        expected = reference.sample.apply_top_k_top_p(logits[0], *given)
        different = topk_topp.apply_top_k_top_p(logits[0], *given) != expected
        row = {
            "rows": num_rows,
            "filter": time_launches(topk_topp.apply_top_k_top_p, [(x, *given) for x in logits * 4]),
            "sorting": time_launches(
                reference.sample.apply_top_k_top_p, [(x, *given) for x in logits]
            ),
        }
        results.append(row)
        print(
            f"top_k 20, top_p 0.95, rows {num_rows:3}: {row['filter']:6.2f} µs, "
            f"by sorting {row['sorting']:6.2f}, {int(different.any(1).sum())} rows differ",
            flush=True,
        )
    return results


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("linear.json"))
    add("--only", nargs="+", default=["tiles", "layer", "sample"])
    add("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES, metavar="SHAPE")
    add("--models", nargs="+", default=["0.6b"], choices=MODELS)
    add("--rows", nargs="+", type=int, default=[1, 8, 16])
    add("--tune", action="store_true", help="time all candidates, not only the op's choice")
    add("--worker", type=int, help="compile this share of the tiles only")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.worker is not None:
        compile_share(args.shapes, args.rows, args.tune, args.worker)
        return
    started = time.perf_counter()
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    if "tiles" in args.only:
        limits = measure_limits(torch.device("cuda"), DTYPE, torch.cuda.synchronize)
        report["copy"] = limits.bandwidth
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
            report["tiles"] += bench_tiles(name, args.rows, args.tune, report["copy"])
            args.out.write_text(json.dumps(report, indent=1))
    args.out.write_text(json.dumps(report, indent=1))
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
