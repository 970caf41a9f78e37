"""A decode step as one kernel beside today's, in captured graphs, and where its tasks wait.

    python scripts/bench/persistent_step.py --out step.json [--models 0.6b 8b-int4] [--rows 1 2 4 8]

Engines have random weights of published shapes, and rows that have `--context` tokens each. For
each number of rows there are: microseconds of a step (begin, layers, head, sampler) of either kind,
the best of some rounds of replays; the time that the bytes of weights and cache take at the
bandwidth of a copy; the errors of the logits of both beside those in fp32, relative to their root
mean square;
and, from clocks in the kernel, for each kind of task the microseconds that a program waits and
computes in a step, and the timeline of two layers, which scripts/draw_step.py draws. Results are
written after each size.
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
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm import LLM
from nanovllm.cli.bench.engines import engine_of, versions
from nanovllm.compile.lower.persistent.schedule import Schedule
from nanovllm.compile.lower.persistent.step import Step
from nanovllm.kernels import reference
from nanovllm.kernels.cuda.persistent import GROUP_COLUMNS, KINDS, PRODUCT, TIMES
from nanovllm.models.model import Batch
from nanovllm.runner import one_kernel
from nanovllm.runner.persistent import Form, PersistentSteps
from nanovllm.runner.runner import Runner
from nanovllm.runner.steps import Steps
from nanovllm.tools import command_line
from nanovllm.tools.device_limits import measure_limits
from nanovllm.tools.shapes import CONFIGS

MODELS = {
    "0.6b": "Qwen3-0.6B", "8b": "Qwen3-8B", "30b": "Qwen3-30B-A3B",
    "8b-fp8": "Qwen3-8B-FP8", "8b-int4": "Qwen3-8B-GPTQ-Int4",
}  # fmt: skip
ROUNDS, REPLAYS = 7, 30


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
                printed = {name: value for name, value in found.items() if name != "timeline"}
                print(model, num_rows, json.dumps(printed), flush=True)
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
            max_num_batched_tokens=1024, gpu_memory_utilization=0.9,
            tuning={"persistent_step": False},
        )  # fmt: skip


def bench(runner: Runner, num_rows: int, context: int, bandwidth: float) -> dict[str, Any]:
    place(runner, num_rows, context)
    row_idx_R = torch.arange(num_rows, device=runner.platform.device)
    own = PersistentSteps(runner.platform.device)
    today, one = runner.steps, replace(runner.steps, persistent=own)
    one_kernel.prepare_decode(one, row_idx_R)
    form = Form(num_rows)
    if form not in own.steps:
        return {"today_us": measured(runner, today, row_idx_R), "why_not": own.reasons[form]}
    step = own.steps[form]
    expected = today.decode_logits(row_idx_R)
    logits = one.decode_logits(row_idx_R)
    step.check()
    exact = exact_logits(step, *today.begin(row_idx_R), today.cos_sin_MH)
    plan = step.schedule.plan
    cache_bytes = num_rows * context * plan.num_kv_heads * 128 * 4 * plan.num_layers
    # one after the other, twice: the clock changes
    pairs = [(measured(runner, today, row_idx_R), measured(runner, one, row_idx_R)) for _ in "12"]
    step.check()
    times = clocked(runner, row_idx_R)
    return {
        "today_us": min(pair[0] for pair in pairs),
        "persistent_us": min(pair[1] for pair in pairs),
        "bytes_us": round((plan.weight_bytes + cache_bytes) / bandwidth * 1e6, 1),
        "error": error(logits, exact),
        "error_of_today": error(expected, exact),
        "stages": step.sizes.num_stages,
        "splits": step.schedule.splits,
        "tasks": by_kind(times),
        "timeline": timeline(times, range(plan.num_layers // 2 - 1, plan.num_layers // 2 + 1)),
    }


def exact_logits(step: Step, h_RD: Tensor, batch: Batch, cos_sin_MH: Tensor) -> Tensor:
    """The logits in fp32, by plain torch, of rows of equal lengths."""
    plan, num_rows = step.schedule.plan, len(h_RD)
    rms_norm, h = reference.norm_act.rms_norm, h_RD.float()
    past_S = torch.arange(int(batch.seq_len_R[0]) - 1, device=h.device)

    def weight(layer: int, name: str) -> Tensor:
        return exact_weight(step, layer, name, ())

    for layer in range(plan.num_layers):
        x = rms_norm(h, weight(layer, "attn_norm"), plan.eps)
        heads = (x @ weight(layer, "qkv").T).view(num_rows, -1, 128)
        q, k, v = heads.split([plan.num_heads, plan.num_kv_heads, plan.num_kv_heads], 1)
        q, k = (
            reference.rope_store.rope(
                rms_norm(one, weight(layer, name), plan.eps), cos_sin_MH, batch.rope_pos_T
            )
            for one, name in ((q, "q_norm"), (k, "k_norm"))
        )
        keys, values = (
            torch.cat((past(step, layer, name, past_S, batch), one[:, None]), 1)
            for name, one in (("keys", k), ("values", v))
        )
        grouped = q.view(num_rows, plan.num_kv_heads, -1, 128)
        share = (torch.einsum("rkgh,rskh->rkgs", grouped, keys) * plan.scale).softmax(-1)
        attended = torch.einsum("rkgs,rskh->rkgh", share, values).flatten(1)
        h = h + attended @ weight(layer, "out").T
        x = rms_norm(h, weight(layer, "mlp_norm"), plan.eps)
        if plan.experts is not None:
            logits = (x @ weight(layer, "router").T).bfloat16()  # which decides between neighbours
            chosen = reference.experts.topk_softmax(logits, plan.experts.top_k, True)
            h = h + of_experts(step, layer, x, *chosen)
            continue
        inner = reference.norm_act.silu_mul(x @ weight(layer, "gate_up").T)
        h = h + inner @ weight(layer, "down").T
    return rms_norm(h, weight(-1, "final_norm"), plan.eps) @ weight(-1, "head").T


def exact_weight(step: Step, layer: int, name: str, of: tuple[int, ...]) -> Tensor:
    """A weight [O, D] in fp32; of: the number of an expert, if it has one."""
    codes = step.schedule.plan.codes
    found, scale, offset = (
        None if one is None else one[of]
        for one in (step.weights.find(layer, f"{name}{part}") for part in ("", "_scale", "_offset"))
    )
    assert found is not None
    if scale is None or codes is None:
        return found.float()
    if codes.bits == 8:
        sides = (codes.block,) * 2 if codes.block else (1, found.shape[1])
        return reference.packed.of_fp8(found, scale, *sides)
    depth = 2 * found.shape[1]
    return reference.packed.unpacked(found, scale, offset, None, 4, GROUP_COLUMNS, depth)


def of_experts(step: Step, layer: int, x: Tensor, share_RK: Tensor, expert_RK: Tensor) -> Tensor:
    """The sum of the experts of each row, in fp32."""
    rows = []
    for x_D, share_K, expert_K in zip(x, share_RK, expert_RK.tolist()):
        row_D = torch.zeros_like(x_D)
        for share, expert in zip(share_K, expert_K):
            gate_up, down = (
                exact_weight(step, layer, name, (expert,)) for name in ("gate_up", "down")
            )
            row_D += share * (down @ reference.norm_act.silu_mul(gate_up @ x_D))
        rows.append(row_D)
    return torch.stack(rows)


def past(step: Step, layer: int, name: str, past_S: Tensor, batch: Batch) -> Tensor:
    """Keys or values [R, S, K, H] of earlier tokens."""
    cache = step.weights.find(layer, name)
    assert cache is not None
    block_RS = batch.block_table_RP.long()[:, past_S // cache.shape[1]]
    return cache[block_RS, past_S % cache.shape[1]].float()


def error(found: Tensor, expected: Tensor) -> float:
    """The root of the mean square difference, of that of the expected numbers."""
    difference = (found.double() - expected.double()).square().mean()
    return round(float((difference / expected.double().square().mean()).sqrt()), 5)


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


class Times(NamedTuple):
    """The tasks of a step that has run: its schedule, cycles [program][task][time] of each
    multiprocessor, and how many there are in a microsecond."""

    schedule: Schedule
    cycles: list[list[list[int]]]
    rate: float


def clocked(runner: Runner, row_idx_R: Tensor) -> Times:
    """The times of a step's tasks, in one of many replays."""
    own = PersistentSteps(runner.platform.device, has_clocks=True)
    steps = replace(runner.steps, persistent=own)
    one_kernel.prepare_decode(steps, row_idx_R)
    with steps.restoring_state():
        replay = runner.platform.capture(lambda: steps.decode_logits(row_idx_R))
        step_us = min(time_us(replay, steps) for _ in range(ROUNDS))
    step = own.steps[Form(len(row_idx_R))]
    step.check()
    programs = step.schedule.programs
    cycles = step.buffers.clocks.view(len(programs), -1, len(TIMES)).tolist()
    longest = max(times[len(tasks) - 2][-1] - times[0][0] for times, tasks in zip(cycles, programs))
    return Times(step.schedule, cycles, longest / step_us)


def by_kind(times: Times) -> dict[str, Any]:
    """For each kind of task, microseconds of a step in a program, by mean, that it waits and
    computes."""
    num = len(times.cycles)
    found: dict[str, list[float]] = {}
    for cycles, tasks in zip(times.cycles, times.schedule.programs):
        for idx, task in enumerate(tasks[:-1]):
            start, _, ready, _, end = cycles[idx]
            ready = ready if start <= ready <= end else end
            name = " ".join((KINDS[task.kind], *task.inputs[:1]))
            sums = found.setdefault(name, [0.0, 0.0, 0.0])
            sums[0] += (ready - start) / times.rate / num
            sums[1] += (end - ready) / times.rate / num
            sums[2] += 1 / num
    names = "waits_us", "computes_us", "tasks"
    report: dict[str, Any] = {
        kind: dict(zip(names, (round(one, 2) for one in sums))) for kind, sums in found.items()
    }
    return {**report, "cycles_per_us": round(times.rate)}


def timeline(times: Times, layers: range) -> dict[str, Any]:
    """Of some layers, the tasks of each program: kind, and microseconds at which it starts, has its
    inputs and ends. The multiprocessors' clocks differ by what their waits for the same results do.
    """
    programs = times.schedule.programs
    waits: dict[int, dict[int, int]] = {}  # when a phase's results were there, by program
    for program, (cycles, tasks) in enumerate(zip(times.cycles, programs)):
        for idx, task in enumerate(tasks):
            if task.kind == PRODUCT and task.layer >= 0:
                waits.setdefault(task.in_phase, {})[program] = cycles[idx][TIMES.index("arrived")]
    whole = [list(one.values()) for one in waits.values() if len(one) == len(programs)]
    late = [[one - fmean(phase) for one in phase] for phase in whole]
    offsets = [median(phase[program] for phase in late) for program in range(len(programs))]
    found = [
        [
            [
                " ".join((KINDS[task.kind], *task.inputs[:1])),
                *((one - offset) / times.rate for one in (cycles[0], cycles[2], cycles[4])),
            ]
            for task, cycles in zip(tasks, of_program)
            if task.layer in layers
        ]
        for tasks, of_program, offset in zip(programs, times.cycles, offsets)
    ]
    begin = min(task[1] for tasks in found for task in tasks)
    return {
        "layers": list(layers),
        "programs": [
            [[name, *(round(one - begin, 2) for one in at)] for name, *at in tasks]
            for tasks in found
        ],
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("persistent_step.json"))
    add("--models", nargs="+", default=["0.6b", "8b", "30b"], choices=MODELS)
    add("--rows", nargs="+", type=int, default=[1, 2, 4, 8])
    add("--context", type=int, default=512, help="tokens of each row")
    add("--layers", type=int, help="in place of the model's own number")
    add("--seconds", type=float, default=150.0, help="no size starts later than that")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(command_line.run(main))
