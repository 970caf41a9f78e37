"""Checks products of few rows with packed weights on this GPU, and times tiles.

    python scripts/bench/packed_tiles.py --out packed.json [--models 8b] [--kinds int4]

Each tile's result is compared with that of the real values in fp32. Times are microseconds of one
launch from replays of a CUDA graph, over weights larger than the L2. "bf16" is the same product in
bf16, with its norm at one row, and "bytes" the time of reading the weight at the copy bandwidth.
`kernels/cuda/packed_linear.py` has the rule that follows from the figures. What the time does not
suffice for is left out and named.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm.kernels.cuda import nvrtc, packed_stream
from nanovllm.kernels.cuda import packed_linear as cuda_packed
from nanovllm.kernels.cuda.packed_linear import ROWS, Tile
from nanovllm.tools import command_line
from nanovllm.tools.device_limits import measure_limits
from scripts.bench.gpu_timing import time_launches
from scripts.bench.packed_cases import DTYPE, KINDS, MODELS, Case, Plain, Shape, shapes, tiles
from scripts.bench.packed_experts_cases import bench_experts

MOST_ERROR = 1.5e-2
NUM_THREADS = 16


def compile_all(models: list[str], kinds: list[str], rows: Sequence[int]) -> int:
    """Compile the kernels of all tiles, several at once. Returns their number."""
    functions = set()
    for model in models:
        for kind in kinds:
            for shape in shapes(model).values():
                case = Case(shape, kind, 1)
                for num_rows in rows:
                    row_tiles = next(most for most in ROWS if num_rows <= most) // 8
                    for tile in tiles(num_rows):
                        functions.add(
                            cuda_packed._function(
                                case.norm, case.codes[0], tile, row_tiles, shape.silu,
                                shape.norm and num_rows == 1, 0,
                            )
                        )  # fmt: skip
    capability = torch.cuda.get_device_capability()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(lambda one: nvrtc.compile_function(one, capability), functions))
    return len(functions)


def bench_shape(
    name: str, shape: Shape, kind: str, bandwidth: float, rows: Sequence[int], end: float
) -> dict[str, Any]:
    """Times of all tiles and of bf16, by rows of x; prints a line for each."""
    case, plain, found = Case(shape, kind), Plain(shape), {}
    limit = sum(one.nbytes for one in case.codes[0][:3] if one is not None) / bandwidth * 1e6
    for num_rows in rows:
        if time.perf_counter() > end:
            print(f"NO TIME for {name} {kind}, {num_rows} rows")
            break
        case.inputs(num_rows)
        norm = case.norm if shape.norm and num_rows == 1 else None
        calls = [(i, case.x, norm, case.residual) for i in case.launches()]
        bf16 = time_launches(plain.run, calls)
        streamed = _time_stream(name, case)
        own = time_launches(case.run, [(i,) for i in case.launches()])
        times = {tile: us for tile in tiles(num_rows) if (us := _time(name, case, tile))}
        best = min(times, key=times.__getitem__)
        print(
            f"{name:12} {kind:4} rows {num_rows:3}: {own:6.1f} µs, bf16 {bf16:6.1f}, "
            f"bytes {limit:5.1f}; best {times[best]:6.1f} {tuple(best)}"
            + (f"; streamed {streamed:6.1f}" if streamed else "")
            + ("  SLOWER THAN BF16" if min(own, streamed or own) > bf16 else ""),
            flush=True,
        )
        found[num_rows] = {
            "us": own, "bf16": bf16, "bytes": limit, "streamed": streamed,
            "tiles": [[tuple(tile), us] for tile, us in times.items()],
        }  # fmt: skip
    return found


def _time_stream(name: str, case: Case) -> float | None:
    """None where packed_stream.cu does not take the rows, or is wrong."""
    if not packed_stream.fits(case.x, case.codes[0]):
        return None
    error = case.error(case.stream(0))
    if not error < MOST_ERROR:
        print(f"WRONG {name} {len(case.x)} rows streamed: error {error:.3g}", flush=True)
        return None
    return time_launches(case.stream, [(i,) for i in case.launches()])


def _time(name: str, case: Case, tile: Tile) -> float | None:
    """None for a tile that fails or is wrong, with a message."""
    try:
        error = case.error(case.run(0, tile))
        if not error < MOST_ERROR:
            print(f"WRONG {name} {len(case.x)} rows {tuple(tile)}: error {error:.3g}", flush=True)
            return None
        return time_launches(case.run, [(i, tile) for i in case.launches()])
    except RuntimeError as problem:  # its sums and x need more shared memory than there is
        print(f"FAILED {name} {len(case.x)} rows {tuple(tile)}: {str(problem)[:200]}", flush=True)
        return None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("packed.json"))
    add("--models", nargs="+", default=list(MODELS), choices=MODELS)
    add("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    add("--rows", nargs="+", type=int, default=[1, *ROWS])
    add("--seconds", type=float, default=120.0, help="for everything")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    started = time.perf_counter()
    num = compile_all(args.models, args.kinds, args.rows)
    print(f"{num} kernels after {time.perf_counter() - started:.0f} s", flush=True)
    bandwidth = measure_limits(torch.device("cuda"), DTYPE, torch.cuda.synchronize).bandwidth
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "copy": bandwidth}
    with contextlib.ExitStack() as last:
        last.callback(lambda: args.out.write_text(json.dumps(report, indent=1)))
        for model in args.models:
            for kind in args.kinds:
                if model == "30b":
                    report[f"experts {kind}"] = bench_experts(kind, bandwidth)
                for part, shape in shapes(model).items():
                    report[f"{model} {part} {kind}"] = bench_shape(
                        f"{model} {part}", shape, kind, bandwidth, args.rows,
                        started + args.seconds,
                    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(command_line.run(main))
