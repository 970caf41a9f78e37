"""Checks products of few rows with packed weights on this GPU, and times tiles.

    python scripts/bench/packed_tiles.py --out packed.json [--models 8b] [--kinds int4]

Beside the tiles of packed_linear.cu there are those of packed_wgmma.cu, and packed_stream.cu with
and without the norm before it. Each result is compared with that of the real values in fp32. Times
are microseconds of one launch from replays of a CUDA graph, over weights larger than the L2. "bf16"
is the same product in bf16, with its norm at one row, and "bytes" the time of reading the weight at
the copy bandwidth.
`kernels/cuda/packed_linear.py` has the rule that follows from the figures. What the time does not
suffice for is left out and named.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm.kernels.cuda import nvrtc, packed_stream, packed_wgmma
from nanovllm.kernels.cuda import packed_linear as cuda_packed
from nanovllm.kernels.cuda.packed_linear import ROWS
from nanovllm.kernels.cuda.packed_wgmma import MAX_SHARED_BYTES
from nanovllm.kernels.triton.packed_codes import Codes
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
                    row_tiles = next((most for most in ROWS if num_rows <= most), 0) // 8
                    for tile in tiles(num_rows) if row_tiles else ():
                        functions.add(
                            cuda_packed.function_of(
                                case.norm, case.codes[0], tile, row_tiles, SILU=shape.silu,
                                NORM=shape.norm and num_rows == 1,
                            )
                        )  # fmt: skip
                    for wgmma_tile in wgmma_tiles(num_rows, case.codes[0], shape.depth):
                        rows_each = packed_wgmma.rows_of_program(num_rows)
                        functions.add(
                            packed_wgmma.function_of(
                                case.norm[None],
                                case.codes[0],
                                wgmma_tile,
                                rows_each,
                                SILU=shape.silu,
                            )
                        )
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
        times = {**_linear_times(name, case), **_wgmma_times(name, case)}
        if packed_stream.fits(case.x, case.codes[0]):
            times["stream"] = _time(name, case, case.stream, norm is not None)
            if shape.norm and norm is None:
                times["stream, norm"] = _time(name, case, partial(case.stream, norm=True), True)
        best = {
            family: min((us, what) for what, us in times.items() if us and what.startswith(family))
            for family in ("linear", "wgmma", "stream")
            if any(us and what.startswith(family) for what, us in times.items())
        }
        print(
            f"{name:12} {kind:4} rows {num_rows:3}: bf16 {bf16:6.1f} µs, bytes {limit:5.1f}; "
            + "; ".join(f"{what} {us:6.1f}" for us, what in best.values())
            + (f"; normed {us:.1f}" if (us := times.get("stream, norm")) else "")
            + ("  SLOWER THAN BF16" if best and min(best.values())[0] > bf16 else ""),
            flush=True,
        )
        found[num_rows] = {"bf16": bf16, "bytes": limit, "times": times}
    return found


def wgmma_tiles(num_rows: int, codes: Codes, depth: int) -> list[packed_wgmma.Tile]:
    """Candidates of packed_wgmma.cu: rings for one and for two programs of a multiprocessor."""
    if num_rows < packed_wgmma.MIN_ROWS or codes.is_fp8:
        return []
    rows, found = packed_wgmma.rows_of_program(num_rows), []
    for groups, split in itertools.product((1, 2, 3), (1, 2, 3, 4, 6, 8)):
        most = packed_wgmma.most_stages(rows, groups, codes.bits)
        for num_stages in {min(most, 6), min(most, 6) // 2}:
            tile = packed_wgmma.Tile(groups, split, num_stages)
            programs = -(-codes.num_rows // (64 * groups)) * -(-num_rows // rows) * split
            fits = packed_wgmma.shared_bytes(tile, rows, codes.bits) <= MAX_SHARED_BYTES
            if num_stages > 1 and fits and programs <= 300 and split * 256 <= depth:
                found.append(tile)
    return found


def _linear_times(name: str, case: Case) -> dict[str, float | None]:
    if len(case.x) > ROWS[-1]:
        return {}
    return {
        f"linear {tuple(tile)}": _time(name, case, partial(case.run, tile=tile), len(case.x) == 1)
        for tile in tiles(len(case.x))
        if cuda_packed.shared_bytes(tile, len(case.x), case.codes[0], 0) <= MAX_SHARED_BYTES
    }


def _wgmma_times(name: str, case: Case) -> dict[str, float | None]:
    return {
        f"wgmma {tuple(tile)}": _time(name, case, partial(case.wgmma, tile=tile), False)
        for tile in wgmma_tiles(len(case.x), case.codes[0], case.shape.depth)
    }


def _time(name: str, case: Case, run: Callable[[int], Tensor], norm: bool) -> float | None:
    """None for a launch that fails or is wrong, with a message."""
    what = f"{name} {len(case.x)} rows {run}"
    try:
        error = case.error(run(0), norm)
        if not error < MOST_ERROR:
            print(f"WRONG {what}: error {error:.3g}", flush=True)
            return None
        return time_launches(run, [(i,) for i in case.launches()])
    except RuntimeError as problem:  # its sums and x need more shared memory than there is
        print(f"FAILED {what}: {str(problem)[:200]}", flush=True)
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
    add("--experts", action="store_true", help="no products of single weights")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    started = time.perf_counter()
    num = 0 if args.experts else compile_all(args.models, args.kinds, args.rows)
    print(f"{num} kernels after {time.perf_counter() - started:.0f} s", flush=True)
    bandwidth = measure_limits(torch.device("cuda"), DTYPE, torch.cuda.synchronize).bandwidth
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "copy": bandwidth}
    with contextlib.ExitStack() as last:
        last.callback(lambda: args.out.write_text(json.dumps(report, indent=1)))
        for model in args.models:
            for kind in args.kinds:
                if model == "30b":
                    report[f"experts {kind}"] = bench_experts(kind, args.rows, bandwidth)
                for part, shape in shapes(model).items():
                    if args.experts:
                        continue
                    report[f"{model} {part} {kind}"] = bench_shape(
                        f"{model} {part}", shape, kind, bandwidth, args.rows,
                        started + args.seconds,
                    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(command_line.run(main))
