"""A decode step as one kernel beside today's, in captured graphs, and where its tasks wait.

    python scripts/bench/persistent_step.py --out step.json [--models 0.6b 8b] [--rows 1 2 4 8]

Engines have random weights of published shapes, and rows that have `--context` tokens each. For
each number of rows there are: microseconds of a step (begin, layers, head, sampler) of either kind,
the best of some rounds of replays; the time that the bytes of weights and cache take at the
bandwidth of a copy; the error of the logits beside today's, relative to their root mean square;
and, from clocks in the kernel, for each kind of task the microseconds that a program waits and
computes in a step. Results are written after each size.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm import LLM
from nanovllm.cli.bench.engines import engine_of, versions
from nanovllm.compile.lower.persistent.step import Step
from nanovllm.kernels.cuda.persistent import KINDS
from nanovllm.runner.persistent import PersistentSteps
from nanovllm.runner.runner import Runner
from nanovllm.runner.steps import Steps
from nanovllm.tools import command_line
from nanovllm.tools.device_limits import measure_limits
from nanovllm.tools.shapes import CONFIGS

MODELS = {"0.6b": "Qwen3-0.6B", "8b": "Qwen3-8B"}
ROUNDS, REPLAYS = 7, 30
MAX_CYCLES = 1980.0  # of an H100 and an H200 in a microsecond; under load they may be fewer


def main() -> None:
    args = arguments()
    device = torch.device("cuda")
    limits = measure_limits(device, torch.bfloat16, torch.cuda.synchronize)
    torch.cuda.empty_cache()
    report: dict[str, Any] = {
        "versions": versions(), "device": torch.cuda.get_device_name(), "copy": limits.bandwidth,
        "context": args.context,
    }  # fmt: skip
    print(json.dumps(report))
    ends = time.perf_counter() + args.seconds
    for model in args.models:
        with closing(engine(MODELS[model], args)) as llm, torch.no_grad():
            runner = engine_of(llm).runner
            for num_rows in args.rows:
                if time.perf_counter() > ends:
                    print(f"NO TIME for {model}, {num_rows} rows")
                    continue
                found = bench(runner, num_rows, args.context, limits.bandwidth)
                report[f"{model} {num_rows}"] = found
                print(model, num_rows, json.dumps(found), flush=True)
                args.out.write_text(json.dumps(report, indent=1))


def engine(shape: str, args: argparse.Namespace) -> LLM:
    config = dict(CONFIGS[shape])
    if args.layers:
        config["num_hidden_layers"] = args.layers
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return LLM(
            folder, random_weights=True, skip_tokenizer_init=True, graph_batch_sizes=args.rows,
            max_num_seqs=max(args.rows), max_model_len=args.context + 1024,
            max_num_batched_tokens=1024, gpu_memory_utilization=0.6,
        )  # fmt: skip


def bench(runner: Runner, num_rows: int, context: int, bandwidth: float) -> dict[str, Any]:
    place(runner, num_rows, context)
    row_idx_R = torch.arange(num_rows, device=runner.platform.device)
    own = PersistentSteps(runner.platform.device)
    today, one = runner.steps, replace(runner.steps, persistent=own)
    one.prepare_decode(row_idx_R)
    if num_rows not in own.steps:
        return {"today_us": measured(runner, today, row_idx_R), "why_not": own.reasons[num_rows]}
    expected = today.decode_logits(row_idx_R).double()
    logits = one.decode_logits(row_idx_R)
    own.steps[num_rows].check()
    difference = (logits.double() - expected).square().mean() / expected.square().mean()
    step = own.steps[num_rows]
    plan = step.schedule.plan
    cache_bytes = num_rows * context * plan.num_kv_heads * 128 * 4 * plan.num_layers
    # one after the other, twice: the clock changes
    times = [(measured(runner, today, row_idx_R), measured(runner, one, row_idx_R)) for _ in "12"]
    own.steps[num_rows].check()
    return {
        "today_us": min(pair[0] for pair in times),
        "persistent_us": min(pair[1] for pair in times),
        "bytes_us": round((plan.weight_bytes + cache_bytes) / bandwidth * 1e6, 1),
        "error": float(difference.sqrt()),
        "same_argmax": float((logits.argmax(-1) == expected.argmax(-1)).double().mean()),
        "stages": step.sizes.num_stages,
        "splits": step.schedule.splits,
        "tasks": waits(runner, row_idx_R),
    }


def place(runner: Runner, num_rows: int, context: int) -> None:
    """Give each row its own blocks and a newest token at position `context` − 1."""
    state, block_size = runner.state, runner.steps.block_size
    each = -(-(context + 512) // block_size)
    for row in range(num_rows):
        blocks = torch.arange(1 + row * each, 1 + (row + 1) * each, dtype=torch.int32)
        state.block_tables[0][row, :each] = blocks.to(state.pos_S.device)
    state.pos_S[:num_rows] = context - 1
    state.token_S[:num_rows] = torch.arange(num_rows, device=state.pos_S.device) + 100
    for cache in runner.steps.caches:
        for one in cache[:2]:
            one[: 1 + num_rows * each].normal_()  # type: ignore[union-attr]


def measured(runner: Runner, steps: Steps, row_idx_R: Tensor) -> float:
    """Microseconds of a captured step."""
    with steps.restoring_state():
        steps.decode(row_idx_R)
        replay = runner.platform.capture(lambda: steps.decode(row_idx_R))
        return round(min(time_us(replay, steps) for _ in range(ROUNDS)), 1)


def time_us(replay: Callable[[], object], steps: Steps) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in "12")
    with steps.restoring_state():  # rows move on
        begin.record()
        for _ in range(REPLAYS):
            replay()
        end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1000 / REPLAYS


def waits(runner: Runner, row_idx_R: Tensor) -> dict[str, Any]:
    """From clocks: for each kind of task, microseconds of a step in a program, by mean, that it
    waits and computes; and how many microseconds the longest program takes."""
    own = PersistentSteps(runner.platform.device, has_clocks=True)
    steps = replace(runner.steps, persistent=own)
    steps.prepare_decode(row_idx_R)
    with steps.restoring_state():
        replay = runner.platform.capture(lambda: steps.decode_logits(row_idx_R))
        for _ in range(20):
            replay()
    torch.cuda.synchronize()
    step = own.steps[len(row_idx_R)]
    step.check()
    return by_kind(step, MAX_CYCLES)


def by_kind(step: Step, rate: float) -> dict[str, Any]:
    num = len(step.schedule.programs)
    clocks = step.buffers.clocks.view(num, -1, 3).tolist()
    found: dict[str, list[float]] = {}
    longest = 0.0
    for program, tasks in enumerate(step.schedule.programs):
        for idx, task in enumerate(tasks[:-1]):
            start, ready, end = clocks[program][idx]
            ready = ready if start <= ready <= end else end
            name = " ".join((KINDS[task.kind], *task.inputs[:1]))
            sums = found.setdefault(name, [0.0, 0.0, 0.0])
            sums[0] += (ready - start) / rate / num
            sums[1] += (end - ready) / rate / num
            sums[2] += 1 / num
        first, last = clocks[program][0][0], clocks[program][len(tasks) - 2][2]
        longest = max(longest, (last - first) / rate)
    names = "waits_us", "computes_us", "tasks"
    report: dict[str, Any] = {
        kind: dict(zip(names, (round(one, 2) for one in sums))) for kind, sums in found.items()
    }
    return {**report, "longest_program_us": round(longest, 1), "cycles_per_us": rate}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("persistent_step.json"))
    add("--models", nargs="+", default=list(MODELS), choices=MODELS)
    add("--rows", nargs="+", type=int, default=[1, 2, 4, 8])
    add("--context", type=int, default=512, help="tokens of each row")
    add("--layers", type=int, help="in place of the model's own number")
    add("--seconds", type=float, default=150.0, help="no size starts later than that")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(command_line.run(main))
