"""Times vision towers in the shapes of published models, with random weights.

    python scripts/bench/vision_tower.py --out tower.json [--only attention towers] [--tiles]
        [--models Qwen3-VL-2B Qwen2.5-VL-3B] [--side 1024] [--budgets 256 4096 6144 16384]

attention: `varlen_attention` in the calls of a tower: our kernel, torch's for packed segments, and
scaled_dot_product_attention segment by segment. Each is compared with the last before it is timed.
--tiles also times our kernel in every tile of TILES.

towers: calls of the whole tower, captured and op by op, and `features`, which also prepares the
inputs on the host. Rates count the work of the pictures, not of padding; shares are of the rate of
a product of large matrices in the same run. The kernels of the last call of each tower are listed.

On a CPU, which has no kernels to list: --device cpu --depth 2 --side 112 --budgets 64.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm import platforms
from nanovllm.compile.program import Compiler
from nanovllm.kernels import ops
from nanovllm.kernels.varlen_attention import varlen_attention_torch
from nanovllm.models.loader import Target
from nanovllm.models.vision import layout as layouts
from nanovllm.models.vision import weights
from nanovllm.models.vision.vision_encoder import TowerConfig
from nanovllm.platforms.base import Platform
from nanovllm.runner.step_regions import FROZEN
from nanovllm.runner.tower import TowerSteps
from nanovllm.tools import command_line
from nanovllm.tools.device_limits import best_seconds, measure_limits
from nanovllm.tools.kernel_table import kernel_table, read_kernels
from scripts.bench import vision_shapes
from scripts.bench.gpu_timing import time_launches

DTYPE = torch.bfloat16
MAX_ERROR = 1e-2  # relative, of bf16 results
PARTS = ("attention", "towers")
# (queries, keys, warps, stages)
TILES = (
    (128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (128, 32, 8, 3), (128, 64, 4, 3),
    (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 32, 4, 3),
)  # fmt: skip
NUM_KERNELS = 15
Row = dict[str, Any]
Attention = Callable[[], Tensor]


class Case(NamedTuple):
    """Segments of a call of a tower."""

    label: str
    starts: list[int]  # with those of padding
    max_len: int

    @property
    def num_patches(self) -> int:
        return self.starts[-1]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = list(vision_shapes.CONFIGS)
    add("--out", type=Path)
    add("--device", default="auto")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS))
    add("--models", nargs="+", choices=names, default=names)
    add("--side", type=int, default=1024, help="pixels of a picture's side")
    add("--budgets", type=int, nargs="+", default=[256, 4096, 6144, 16384])
    add("--depth", type=int, help="blocks of a tower, fewer than the model has")
    add("--tiles", action="store_true", help="time our attention in other tiles, too")
    return parser.parse_args()


def seconds_of(work: Callable[[], object], platform: Platform) -> float:
    """Of one call of `work`, which launches a few kernels: on a GPU from a graph of many."""
    if platform.traits.name == "cuda":
        return time_launches(work, [(), ()]) / 1e6
    return best_seconds(work, platform.synchronize)


# attention ---------------------------------------------------------------------------------------


def cases(cfg: TowerConfig, pixels: int) -> list[Case]:
    """One picture, 16 frames of a sixteenth of it, and their windows if the tower has some."""
    side = vision_shapes.picture_side(cfg, pixels)
    small = max(cfg.merge_size, side // 4 // cfg.merge_size * cfg.merge_size)
    found = []
    for num, length in ((1, side), (16, small)):
        num_patches = num * length**2
        made = layouts.layout(cfg, np.full((num, 2), length), num_patches)
        label = f"{num} x {length}²"
        found.append(Case(label, made.frame_start_S.tolist(), num_patches))
        if made.windows is not None:
            starts = made.windows.start_S.tolist()
            found.append(Case(f"windows of {label}", starts, cfg.max_window_patches))
    return found


def by_segment(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, starts: list[int]) -> Tensor:
    """torch's attention, one call for each segment."""
    outs = []
    for start, end in pairwise(starts):
        if end > start:
            q, k, v = (x[None, start:end].transpose(1, 2) for x in (q_TNH, k_TNH, v_TNH))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def attentions(
    cfg: TowerConfig, case: Case, platform: Platform, tiles: bool
) -> dict[str, Attention]:
    """The ways to compute a case, the one to compare with last."""
    device, (num_heads, head_dim) = platform.device, (cfg.num_heads, cfg.head_dim)
    generator = torch.Generator(device).manual_seed(0)
    shape = (case.num_patches, 3, num_heads, head_dim)
    qkv = torch.randn(shape, generator=generator, device=device).to(DTYPE)
    q, k, v = qkv.unbind(1)
    q, k = q.contiguous(), k.contiguous()  # as rotated ones are
    start_S = torch.tensor(case.starts, dtype=torch.int32, device=device)
    call = (q, k, v, start_S, case.max_len, head_dim**-0.5)
    found: dict[str, Attention] = {"ours": lambda: ops.varlen_attention(*call)}
    if platform.traits.name == "cuda":
        from nanovllm.kernels.triton.varlen_attention import VarlenTile, varlen_attention

        for tile in TILES if tiles else ():
            found[f"tile {tile}"] = partial(varlen_attention, *call, VarlenTile(*tile))
        found["torch, packed"] = lambda: varlen_attention_torch(*call)
    return found | {"torch, by segment": lambda: by_segment(q, k, v, case.starts)}


def time_attention(cfg: TowerConfig, case: Case, platform: Platform, tiles: bool) -> list[Row]:
    """A row for each way. A failed one has an error in place of a time."""
    pairs = sum((end - start) ** 2 for start, end in pairwise(case.starts))
    flops = 4.0 * cfg.hidden_size * pairs
    ways = attentions(cfg, case, platform, tiles)
    expected = list(ways.values())[-1]().float()
    rows: list[Row] = []
    for name, way in ways.items():
        row: Row = {"case": case.label, "head": cfg.head_dim, "way": name}
        try:
            error = float((way().float() - expected).norm() / expected.norm())
            row |= {"error": error, "us": 1e6 * seconds_of(way, platform)}
        # a tile that does not compile must not hide the others
        except Exception as problem:
            row["failed"] = f"{type(problem).__name__}: {str(problem)[:300]}"
        if "us" in row:
            row["tflops"] = flops / row["us"] / 1e6
        rows.append(row)
        print(_attention_line(row), flush=True)
    return rows


def _attention_line(row: Row) -> str:
    label = f"{row['case']:22} head {row['head']:3} {row['way']:22}"
    if "failed" in row:
        return f"{label} FAILED {row['failed']}"
    return f"{label} {row['us']:9.1f} µs {row['tflops']:7.1f} TFLOP/s, error {row['error']:.1e}"


# towers ------------------------------------------------------------------------------------------


def make_steps(
    name: str, budgets: tuple[int, ...], depth: int | None, platform: Platform
) -> TowerSteps:
    """The calls of a model's tower, captured."""
    tower = vision_shapes.make_tower(name, DTYPE, depth)
    lowering, why = platform.lowering()
    if lowering is None:
        raise ValueError(f"there are no graphs on this device: {why}")
    compiler = Compiler(lowering, platform.passes(fuse=True), frozen=FROZEN)
    made = weights.random(tower, Target(platform.device), 0)
    steps = TowerSteps(tower, made, platform, compiler, budgets)
    for budget in budgets:  # builds the programs and loads their kernels
        call = vision_shapes.full_call(tower.config, budget, 1)
        patches = torch.zeros(call.num_patches, tower.config.patch_size)
        steps.run(*steps.inputs(call, patches), compiler)
    steps.capture(platform.capture)
    return steps


def time_tower(
    name: str, steps: TowerSteps, budget: int, pixels: int, rate: float
) -> tuple[Row, Callable[[], object]]:
    """The times of a call that pictures fill, and the captured call."""
    platform, cfg = steps.platform, steps.tower.config
    call = vision_shapes.full_call(cfg, budget, pixels)
    work = vision_shapes.work(steps.tower, call)
    patches = torch.randn(call.num_patches, cfg.patch_size)
    inputs = steps.inputs(call, patches)
    grids = [(1, *frame) for frame in call.frames_F2.tolist()]

    def run() -> None:
        steps.run(*inputs, steps.compiler)

    replay = platform.capture(run)
    times = {
        "captured": best_seconds(replay, platform.synchronize),
        "op by op": best_seconds(run, platform.synchronize),
        "features": best_seconds(lambda: steps.features(patches, grids), platform.synchronize),
    }
    row: Row = {
        "model": name,
        "budget": budget,
        "pictures": len(call.frames_F2),
        "patches": call.num_patches,
        "attention_share_of_work": work.attention / work.total,
        "ms": {what: 1e3 * seconds for what, seconds in times.items()},
        "tflops": work.total / times["captured"] / 1e12,
        "share_of_rate": work.total / times["captured"] / rate,
    }
    milliseconds = ", ".join(f"{what} {ms:.3f}" for what, ms in row["ms"].items())
    print(
        f"{name} budget {budget}: {row['pictures']} x {call.frames_F2[0].tolist()} patches, ms: "
        f"{milliseconds}; {row['tflops']:.1f} TFLOP/s, {row['share_of_rate']:.1%} of products "
        f"({work.attention / work.total:.0%} of the work is attention)",
        flush=True,
    )
    return row, replay


def kernels_of(replay: Callable[[], object], platform: Platform) -> list[Row]:
    """The kernels of one call, those that take longest first."""
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]):  # the first start takes seconds
        platform.synchronize()
    with torch.profiler.profile(activities=[activity]) as recorded:
        replay()
        platform.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json.gz"
        recorded.export_chrome_trace(str(trace))
        with gzip.open(trace, "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
    table: list[Row] = kernel_table(read_kernels(events), [], 1, float("inf"))["kernels"]
    for row in table[:NUM_KERNELS]:
        print(
            f"    {row['kernel'][:70]:70} {row['launches']:5g} launches {row['us']:9.1f} µs "
            f"{row['share']:6.1%}",
            flush=True,
        )
    return table[:NUM_KERNELS]


def time_towers(args: argparse.Namespace, platform: Platform) -> Row:
    rate = measure_limits(platform.device, DTYPE, platform.synchronize).flops
    print(f"products of large matrices: {rate / 1e12:.1f} TFLOP/s", flush=True)
    rows, kernels = [], {}
    for name in args.models:
        budgets = tuple(sorted(set(args.budgets)))
        steps = make_steps(name, budgets, args.depth, platform)
        for budget in budgets:
            row, replay = time_tower(name, steps, budget, args.side, rate)
            rows.append(row)
        if platform.traits.name == "cuda":
            kernels[name] = kernels_of(replay, platform)
    return {"rate": rate, "towers": rows, "kernels": kernels}


@torch.no_grad()
def main() -> int:
    args = arguments()
    platform = platforms.select(args.device)
    platform.prepare()
    report: Row = {"device": platform.describe(), "side": args.side}
    if "attention" in args.only:
        report["attention"] = []
        for name in args.models:
            cfg = vision_shapes.make_tower(name, DTYPE).config
            for case in cases(cfg, args.side):
                report["attention"] += time_attention(cfg, case, platform, args.tiles)
    if "towers" in args.only:
        report |= time_towers(args, platform)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1))
    rows = report.get("attention", [])
    return int(any("failed" in row or row["error"] > MAX_ERROR for row in rows))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
