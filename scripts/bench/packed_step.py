"""Where the time of a captured decode step goes, by kernel: quantized weights beside bf16.

    python scripts/bench/packed_step.py --out step.json [--models 8b 30b] [--kinds int4 fp8 bf16]

Each engine has a few layers of a published shape and random weights. Its steps are replays of the
captured graph with rows of padding, whose attention reads one token. For each number of rows there
is a table (`tools/kernel_table.py`): launches, microseconds, bytes and the share of the copy's
bandwidth of each kernel in a step; and the kernels of a middle layer in their order, with the time
from the end of the kernel before to their own end. The clock's time is without the profiler.
Results are written after each engine.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm import LLM
from nanovllm.cli.bench.engines import engine_of, versions
from nanovllm.kernels.cuda import nvrtc, packed_stream
from nanovllm.runner.runner import Runner
from nanovllm.tools import command_line
from nanovllm.tools.device_limits import measure_limits
from nanovllm.tools.kernel_table import (
    Kernel,
    Launch,
    as_text,
    kernel_table,
    read_kernels,
    read_launches,
)
from nanovllm.tools.profile import OpBytes
from nanovllm.tools.shapes import CONFIGS

MODELS = {"8b": ("Qwen3-8B", 8), "30b": ("Qwen3-30B-A3B", 4)}  # and layers
KINDS = {"int4": "int4", "fp8": "fp8", "bf16": None}
NUM_STEPS = 5
PREFER_SHARED = 1  # cuda.h: CU_FUNC_CACHE_PREFER_SHARED
DEVICE = {ProfilerActivity.CUDA}


def main() -> None:
    args = arguments()
    if args.no_stream:
        packed_stream.is_supported = lambda device: False  # type: ignore[assignment]
    report: dict[str, Any] = {"versions": versions()}
    if torch.cuda.is_available():
        report["device"] = torch.cuda.get_device_name()
        limits = measure_limits(torch.device("cuda"), torch.bfloat16, torch.cuda.synchronize)
        report["copy"] = limits.bandwidth
        torch.cuda.empty_cache()
        if args.prefer_shared:
            nvrtc.check(nvrtc.driver().cuCtxSetCacheConfig(PREFER_SHARED))
        with profile(activities=DEVICE):  # the profiler's first start takes seconds
            torch.cuda.synchronize()
    ends = time.perf_counter() + args.seconds
    for model in args.models:
        for kind in args.kinds:
            if time.perf_counter() > ends:
                print(f"NO TIME for {model} {kind}")
                continue
            report[f"{model} {kind}"] = bench(model, kind, args, report.get("copy", math.inf))
            args.out.write_text(json.dumps(report, indent=1))


def bench(model: str, kind: str, args: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    """The reports of one engine, by rows."""
    shape, num_layers = MODELS[model]
    config = {**CONFIGS[shape], "num_hidden_layers": args.layers or num_layers}
    config |= json.loads(args.overrides)
    started = time.perf_counter()
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        llm = LLM(
            folder, random_weights=True, quantization=KINDS[kind], skip_tokenizer_init=True,
            graph_batch_sizes=args.rows, max_num_seqs=max(args.rows), max_model_len=256,
            max_num_batched_tokens=max(256, *args.rows), gpu_memory_utilization=0.6,
            device=args.device,
        )  # fmt: skip
    with closing(llm):
        runner = engine_of(llm).runner
        print(f"== {shape} {kind}, {config['num_hidden_layers']} layers", end=": ")
        print(f"ready after {time.perf_counter() - started:.0f} s", flush=True)
        found = {}
        for num_rows in args.rows:
            found[num_rows] = step_report(runner, num_rows, bandwidth)
        return found


def step_report(runner: Runner, num_rows: int, bandwidth: float) -> dict[str, Any]:
    launches = op_bytes(runner, num_rows)
    step = runner.buckets.decode(num_rows)
    step.fill([])
    wall_us = time_us(runner, step.replay)
    kernels = profiled(runner, step.replay)
    table = kernel_table(kernels, launches, NUM_STEPS, bandwidth)
    about = {"rows": num_rows, "bucket": num_rows, "context_tokens": num_rows}
    report = {**about, "wall_us": round(wall_us, 1), **table}
    report["layer"] = middle_layer(kernels)
    print(as_text(report))
    print(f"  {'a middle layer':<44} {'starts':>8} {'duration':>9} {'to end':>8}")
    for row in report["layer"]:
        print(
            f"  {row['kernel'][:44]:<44} {row['start_us']:>8.2f} {row['duration_us']:>9.2f} "
            f"{row['progress_us']:>8.2f}"
        )
    sys.stdout.flush()
    return report


def op_bytes(runner: Runner, num_rows: int) -> list[Launch]:
    """The kernels of a step launched op by op, and their bytes."""
    mode = OpBytes([1] * num_rows)
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json.gz"
        with profile(activities={ProfilerActivity.CPU, *DEVICE}) as by_op:
            runner.decode_uncaptured(num_rows, mode)
            runner.platform.synchronize()
        by_op.export_chrome_trace(str(trace))
        return read_launches(events(trace), mode.ops)


def profiled(runner: Runner, replay: Callable[[], object]) -> list[Kernel]:
    """The kernels of some replays."""
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json.gz"
        with torch.no_grad(), profile(activities=DEVICE) as recorded:
            for _ in range(NUM_STEPS):
                replay()
            runner.platform.synchronize()
        recorded.export_chrome_trace(str(trace))
        return read_kernels(events(trace))


def time_us(runner: Runner, replay: Callable[[], object]) -> float:
    """Microseconds of a replay among many, the best of three rounds."""
    best = math.inf
    for _ in range(3):
        runner.platform.synchronize()
        started = time.perf_counter()
        with torch.no_grad():
            for _ in range(20):
                replay()
        runner.platform.synchronize()
        best = min(best, (time.perf_counter() - started) / 20 * 1e6)
    return best


def middle_layer(kernels: Sequence[Kernel]) -> list[dict[str, Any]]:
    """The kernels of a layer in the middle of the last step, from one write of keys and values to
    the next. progress_us: from the end of the kernel before."""
    step = kernels[-(len(kernels) // NUM_STEPS) :]
    marks = [i for i, kernel in enumerate(step) if "rope_store" in kernel.name]
    if len(marks) < 2:
        return []
    middle = len(marks) // 2
    first, last = marks[middle - 1], marks[middle]
    rows = []
    for i in range(first, last):
        one, before = step[i], step[max(0, i - 1)]
        rows.append({
            "kernel": one.name, "start_us": round(one.start_us - step[first].start_us, 2),
            "duration_us": round(one.duration_us, 2),
            "progress_us": round(
                one.start_us + one.duration_us - before.start_us - before.duration_us, 2
            ),
        })  # fmt: skip
    return rows


def events(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        found: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("packed_step.json"))
    add("--models", nargs="+", default=list(MODELS), choices=MODELS)
    add("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    add("--rows", nargs="+", type=int, default=[1, 16, 64, 256])
    add("--layers", type=int, help="in place of the models' own choice here")
    add("--overrides", default="{}", help="fields of config.json, as JSON")
    add("--no-stream", action="store_true", help="without packed_stream.cu, for a comparison")
    add("--prefer-shared", action="store_true", help="all kernels leave the L1 little memory")
    add("--device", default="auto")
    add("--seconds", type=float, default=240.0, help="no engine starts later than that")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(command_line.run(main))
