"""How busy the device is while it works through prompts, and while it decodes: kernels from the profiler's trace, bytes
from the ops that launch them.

A captured step replays without any op, so a trace of it has names and times only. The same step launched op by op shows
which op launches which kernel, and how many bytes that op must move.
"""

from __future__ import annotations

import gzip
import json
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm.engine import LLMEngine
from nanovllm.sampling import SamplingParams
from nanovllm.schedule.request import Request
from nanovllm.schedule.scheduler import Scheduler
from nanovllm.tools.costs import cost

DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # what the trace calls work on the device
MARK = "op bytes "
SHARES_OF_ROWS = (1, 2, 8)  # windows at the full batch, a half, an eighth, and at one row


class Kernel(NamedTuple):
    name: str
    start_us: float
    duration_us: float


class Launch(NamedTuple):
    """A kernel of one step, the op that launches it, and the bytes that it must move."""

    kernel: str
    op: str
    num_bytes: int


def profile_decode(
    engine: LLMEngine,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    folder: Path,
    *,
    activities: Sequence[ProfilerActivity],
    bandwidth: float,
    num_steps: int = 8,
) -> list[dict[str, Any]]:
    """Run a workload and profile its first steps, which are prompts', and windows of `num_steps` decode steps later on.

    `activities` are those of the device, `bandwidth` its bytes per second. Writes trace_bs{rows}.json.gz (Chrome's
    format) and kernels_bs{rows}.json for each window into `folder`, for the prompts with "prefill" in place of "bs{rows}";
    returns what the latter hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with profile(activities=activities):  # the first start takes seconds
        engine.runner.platform.synchronize()
    reports: list[dict[str, Any]] = []
    targets: list[int] | None = None
    ids = [
        engine.add_request(prompt, one, incremental=False) for prompt, one in zip(prompts, params)
    ]
    try:
        reports.append(_prompts(engine, sum(map(len, prompts)), folder, activities, bandwidth))
        while engine.has_unfinished and targets != []:
            rows = steady_rows(engine, num_steps)
            if targets is None and rows:
                targets = sorted(
                    {1, *(len(rows) // share or 1 for share in SHARES_OF_ROWS)}, reverse=True
                )
            if targets and 0 < len(rows) <= targets[0]:
                targets = [target for target in targets if target < len(rows)]
                reports.append(_window(engine, rows, folder, activities, bandwidth, num_steps))
            else:
                engine.step()
    finally:
        engine.abort_all(ids)
    return reports


def _prompts(
    engine: LLMEngine,
    num_tokens: int,
    folder: Path,
    activities: Sequence[ProfilerActivity],
    bandwidth: float,
) -> dict[str, Any]:
    """The steps until no prompt is left that could run now; no bytes, since their kernels are not known op by op."""
    trace, num_steps = folder / "trace_prefill.json.gz", 0
    scheduler = engine.scheduler
    with profile(activities=activities) as recorded:
        started = time.perf_counter()
        while _has_prompts(scheduler):
            engine.step()
            num_steps += 1
        engine.runner.platform.synchronize()
        wall_us = (time.perf_counter() - started) * 1e6
    recorded.export_chrome_trace(str(trace))
    report = {
        "prompt_tokens": num_tokens,
        "wall_us": round(wall_us / num_steps, 1),
        **kernel_table(read_kernels(_events(trace)), [], num_steps, bandwidth),
    }
    (folder / "kernels_prefill.json").write_text(json.dumps(report, indent=1))
    return report


def _has_prompts(scheduler: Scheduler) -> bool:
    if scheduler.waiting and len(scheduler.running) < scheduler.max_num_seqs:
        return True
    return not all(request.is_decoding for request in scheduler.running)


def steady_rows(engine: LLMEngine, num_steps: int) -> list[Request]:
    """The decoding requests, if the next `num_steps` steps all decode in the bucket that holds them; else none."""
    scheduler, layout = engine.scheduler, engine.runner.layout
    rows = [request for request in scheduler.running if request.may_decode]
    if scheduler.waiting or not all(request.is_decoding for request in scheduler.running):
        return []
    num_lasting = sum(
        request.max_output - request.num_scheduled_outputs >= num_steps for request in rows
    )
    if not num_lasting or len(rows) > layout.decode_rows[-1]:
        return []
    return rows if layout.decode_bucket(num_lasting) == layout.decode_bucket(len(rows)) else []


def _window(
    engine: LLMEngine,
    rows: list[Request],
    folder: Path,
    activities: Sequence[ProfilerActivity],
    bandwidth: float,
    num_steps: int,
) -> dict[str, Any]:
    runner, num_rows = engine.runner, len(rows)
    bucket = runner.layout.decode_bucket(num_rows)
    lengths = [
        request.num_computed + 1 + num_steps // 2 for request in rows
    ]  # half-way through the window
    trace = folder / f"trace_bs{num_rows}.json.gz"
    mode = OpBytes(lengths)
    with profile(activities={ProfilerActivity.CPU, *activities}) as by_op:
        runner.decode_uncaptured(bucket, mode)
        runner.platform.synchronize()
    by_op.export_chrome_trace(str(trace))
    launches = read_launches(_events(trace), mode.ops)
    with profile(activities=activities) as replayed:
        started = time.perf_counter()
        for _ in range(num_steps):
            engine.step()
        runner.platform.synchronize()
        wall_us = (time.perf_counter() - started) * 1e6
    replayed.export_chrome_trace(str(trace))
    report = {
        "rows": num_rows,
        "bucket": bucket,
        "context_tokens": sum(lengths),
        "wall_us": round(wall_us / num_steps, 1),
        **kernel_table(read_kernels(_events(trace)), launches, num_steps, bandwidth),
    }
    (folder / f"kernels_bs{num_rows}.json").write_text(json.dumps(report, indent=1))
    return report


class OpBytes(TorchDispatchMode):
    """Notes for each op what it must move, and marks its place in the profiler's trace. `lengths`: tokens per row."""

    def __init__(self, lengths: Sequence[int]) -> None:
        super().__init__()
        self.lengths = lengths
        self.ops: list[tuple[str, int]] = []  # (name and shape of the weight, bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with record_function(f"{MARK}{len(self.ops)}"):
            result = func(*args, **(kwargs or {}))
        named = {argument.name: value for argument, value in zip(func._schema.arguments, args)}
        weight: Any = named.get("mat2", named.get("weight"))
        label = func._schema.name.split("::")[1]
        if isinstance(weight, Tensor) and weight.dim() == 2:
            label += " " + "×".join(map(str, weight.shape))
        num_bytes, _ = cost(func, args, kwargs or {}, result, self.lengths)
        self.ops.append((label, num_bytes))
        return result


def read_kernels(events: Sequence[dict[str, Any]]) -> list[Kernel]:
    """The work on the device in a Chrome trace, in the order in which it began; short names."""
    found = [
        Kernel(short_name(e["name"]), e["ts"], e["dur"])
        for e in events
        if e.get("cat") in DEVICE_WORK
    ]
    return sorted(found, key=lambda kernel: kernel.start_us)


def read_launches(events: Sequence[dict[str, Any]], ops: Sequence[tuple[str, int]]) -> list[Launch]:
    """Which op of `OpBytes.ops` launches which kernel, by the host's time of launch; an op's bytes go to the longest of
    its kernels. Kernels that no op launches, those that Inductor writes, are left out."""
    marks = sorted(
        (e["ts"], e["ts"] + e["dur"], int(e["name"].removeprefix(MARK)))
        for e in events
        if e.get("cat") == "user_annotation" and e["name"].startswith(MARK)
    )
    launched_at: dict[int, float] = {}
    for event in events:
        if "correlation" in event.get("args", {}) and event.get("cat") not in DEVICE_WORK:
            launched_at[event["args"]["correlation"]] = event["ts"]
    by_op: dict[int, list[tuple[float, float, str]]] = defaultdict(list)
    for event in events:
        time_us = launched_at.get(event.get("args", {}).get("correlation"))
        if event.get("cat") in DEVICE_WORK and time_us is not None:
            for start, end, op_idx in marks:
                if start <= time_us <= end:
                    by_op[op_idx].append((event["ts"], event["dur"], short_name(event["name"])))
    launches: list[Launch] = []
    for op_idx, kernels in sorted(by_op.items()):
        longest = max(range(len(kernels)), key=lambda i: kernels[i][1])
        name, num_bytes = ops[op_idx]
        launches += [
            Launch(k[2], name, num_bytes if i == longest else 0) for i, k in enumerate(kernels)
        ]
    return launches


def kernel_table(
    kernels: Sequence[Kernel], launches: Sequence[Launch], num_steps: int, bandwidth: float
) -> dict[str, Any]:
    """What `num_steps` replayed steps took, per step, in microseconds and bytes, by kernel and op.

    With dependent launch kernels overlap: one is placed while the one before it still runs, and waits. A row's `us` is
    therefore progress, the time of `_progress`, and its share and bandwidth are of that: the rows add up to the time in which
    any kernel runs, `busy_share`. `duration_us` is from its kernels' starts to their ends, waiting included.

    The k-th launch of a kernel in a step is the k-th of that kernel in `launches`. Where their numbers do not agree, and
    for kernels that are not among them, bytes are None. ValueError for no kernels.
    """
    if not kernels:
        raise ValueError("the trace holds no kernel: this device's work cannot be profiled")
    counts = Counter(kernel.name for kernel in kernels)
    known: dict[str, list[Launch]] = defaultdict(list)
    for one in launches:
        known[one.kernel].append(one)
    progress_us, span_us, gap_us = _progress(kernels)
    seen: Counter[str] = Counter()
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for kernel, kernel_us in zip(kernels, progress_us):
        same = known[kernel.name]
        agrees = counts[kernel.name] == num_steps * len(same)
        launch = same[seen[kernel.name] % len(same)] if agrees else None
        seen[kernel.name] += 1
        key = (kernel.name, launch.op if launch else "")
        zeros = {"launches": 0.0, "us": 0.0, "duration_us": 0.0, "bytes": 0 if launch else None}
        row = rows.setdefault(key, {"kernel": key[0], "op": key[1], **zeros})
        row["launches"] += 1 / num_steps
        row["us"] += kernel_us / num_steps
        row["duration_us"] += kernel.duration_us / num_steps
        if launch:
            row["bytes"] += launch.num_bytes / num_steps
    table = sorted(rows.values(), key=lambda row: -row["us"])
    for row in table:
        row["share"] = round(row["us"] * num_steps / span_us, 4)
        row["bandwidth_share"] = _share(row["bytes"], row["us"], bandwidth)
        row["launches"], row["us"] = round(row["launches"], 3), round(row["us"], 2)
        row["duration_us"] = round(row["duration_us"], 2)
        row["bytes"] = row["bytes"] if row["bytes"] is None else round(row["bytes"])
    num_bytes = sum(row["bytes"] or 0 for row in table)
    return {
        "steps": num_steps,
        "span_us": round(span_us / num_steps, 1),
        "busy_share": round(sum(progress_us) / span_us, 4),
        "largest_gap_us": round(gap_us, 2),
        "bytes": num_bytes,
        "bandwidth_share": _share(num_bytes, span_us / num_steps, bandwidth),
        "kernels": table,
    }


def _progress(kernels: Sequence[Kernel]) -> tuple[list[float], float, float]:
    """(each kernel's progress, from the first start to the last end, longest time in which nothing runs).

    A kernel's progress is the time from the end before its own to its own, less what of it the device was idle. Where
    kernels end in the order in which they start, that is from the previous end, or its own start if later. The sum is the
    time in which any kernel runs, also where one lies within another.
    """
    ends = [kernel.start_us + kernel.duration_us for kernel in kernels]
    order = sorted(range(len(kernels)), key=ends.__getitem__)
    # who has not ended when an earlier one ends runs from its start on: the earliest start of those is where idling ends
    resumes = list(accumulate((kernels[i].start_us for i in reversed(order)), min))[::-1]
    progress, gap_us = [0.0] * len(kernels), 0.0
    start = last_end = resumes[0]
    for i, resume in zip(order, resumes):
        gap_us = max(gap_us, resume - last_end)
        progress[i] = ends[i] - max(last_end, resume)
        last_end = ends[i]
    return progress, last_end - start, gap_us


def _share(num_bytes: float | None, time_us: float, bandwidth: float) -> float | None:
    return (
        None
        if num_bytes is None or not time_us
        else round(num_bytes / (time_us * 1e-6) / bandwidth, 4)
    )


def short_name(name: str) -> str:
    """A kernel's name without its return type, template arguments and parameters, and its innermost namespace."""
    plain = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    if plain.startswith("std::enable_if<"):  # the return type of some of cuBLAS
        plain = plain.partition("::type ")[2]
    return "::".join(plain.partition("<")[0].partition("(")[0].strip().split("::")[-2:]) or name


def as_text(report: dict[str, Any]) -> str:
    """One window as a table to read."""
    what = (
        f"prompts of {report['prompt_tokens']} tokens"
        if "prompt_tokens" in report
        else (
            f"{report['rows']} rows (bucket {report['bucket']}), {report['context_tokens']} tokens of context"
        )
    )
    lines = [
        f"{what}, {report['steps']} steps: {report['wall_us']} µs a step by the clock, {report['span_us']} on the device, "
        f"busy {report['busy_share']:.1%} of it, largest gap {report['largest_gap_us']} µs; "
        f"{report['bytes'] / 1e6:.1f} MB a step, {report['bandwidth_share']:.1%} of the copy's rate",
        f"{'kernel':<44} {'op':<28} {'launches':>8} {'µs':>9} {'lasting':>9} {'share':>7} {'MB':>9} {'of copy':>8}",
    ]
    for row in report["kernels"]:
        num_mb = "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.2f}"
        share = "" if row["bandwidth_share"] is None else f"{row['bandwidth_share']:.1%}"
        lines.append(
            f"{row['kernel'][:44]:<44} {row['op'][:28]:<28} {row['launches']:>8g} {row['us']:>9.2f} "
            f"{row['duration_us']:>9.2f} {row['share']:>7.1%} {num_mb:>9} {share:>8}"
        )
    return "\n".join(lines)


def _events(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)["traceEvents"]
