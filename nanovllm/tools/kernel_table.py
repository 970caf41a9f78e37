"""Tables of kernels: microseconds, bytes and bandwidth of each, from traces of the profiler."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # the trace's categories of device work
MARK = "op bytes "


class Kernel(NamedTuple):
    name: str
    start_us: float
    duration_us: float


class Launch(NamedTuple):
    """A kernel of one step, the op that launches it, and the bytes that it must move."""

    kernel: str
    op: str
    num_bytes: int


def read_kernels(events: Sequence[dict[str, Any]]) -> list[Kernel]:
    """The work on the device in a Chrome trace, by start time, with short names."""
    work = [event for event in events if event.get("cat") in DEVICE_WORK]
    return sorted(map(_kernel, work), key=lambda kernel: kernel.start_us)


def _kernel(event: dict[str, Any]) -> Kernel:
    return Kernel(short_name(event["name"]), event["ts"], event["dur"])


def read_launches(events: Sequence[dict[str, Any]], ops: Sequence[tuple[str, int]]) -> list[Launch]:
    """The kernels that each op of `profile.OpBytes.ops` launches, matched by the time of launch.

    The longest kernel of an op gets its bytes. Kernels that no op launches (Inductor's) are left
    out.
    """
    marks = sorted(
        (e["ts"], e["ts"] + e["dur"], int(e["name"].removeprefix(MARK)))
        for e in events
        if e.get("cat") == "user_annotation" and e["name"].startswith(MARK)
    )
    launched_at: dict[int, float] = {}
    for event in events:
        if "correlation" in event.get("args", {}) and event.get("cat") not in DEVICE_WORK:
            launched_at[event["args"]["correlation"]] = event["ts"]
    by_op: dict[int, list[Kernel]] = defaultdict(list)
    for event in events:
        time_us = launched_at.get(event.get("args", {}).get("correlation"))
        if event.get("cat") in DEVICE_WORK and time_us is not None:
            for start, end, op_idx in marks:
                if start <= time_us <= end:
                    by_op[op_idx].append(_kernel(event))
    launches: list[Launch] = []
    for op_idx, kernels in sorted(by_op.items()):
        longest = max(kernels, key=lambda kernel: kernel.duration_us)
        op, num_bytes = ops[op_idx]
        launches += [Launch(k.name, op, num_bytes if k is longest else 0) for k in kernels]
    return launches


def kernel_table(
    kernels: Sequence[Kernel], launches: Sequence[Launch], num_steps: int, bandwidth: float
) -> dict[str, Any]:
    """Microseconds and bytes per step, by kernel and op, of `num_steps` replayed steps.

    With programmatic dependent launch kernels overlap: a kernel starts while the previous one runs,
    and waits for it. A row's `us` is therefore its progress (see `_progress`); its share and its
    bandwidth are computed from that. The rows add up to the time in which any kernel runs,
    `busy_share`. `duration_us` is from start to end of its kernels, and includes waiting.

    The k-th launch of a kernel in a step is the k-th of that kernel in `launches`. Bytes are None
    for kernels whose number in `launches` differs. Raises ValueError if there are no kernels.
    """
    if not kernels:
        raise ValueError("the trace has no kernels: this device cannot be profiled")
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
    """(progress of each kernel, time from the first start to the last end, longest idle time).

    A kernel's progress is the time from the previous end of a kernel to its own end, minus the idle
    time in between. If kernels end in the order in which they start, it begins at the previous end
    or at the kernel's own start, whichever is later. The sum is the time in which any kernel runs,
    also if one kernel runs within the time of another.
    """
    ends = [kernel.start_us + kernel.duration_us for kernel in kernels]
    order = sorted(range(len(kernels)), key=ends.__getitem__)
    # idle time ends at the earliest start among the kernels that have not ended yet
    resumes = list(accumulate((kernels[i].start_us for i in reversed(order)), min))[::-1]
    progress, gap_us = [0.0] * len(kernels), 0.0
    start = last_end = resumes[0]
    for i, resume in zip(order, resumes):
        gap_us = max(gap_us, resume - last_end)
        progress[i] = ends[i] - max(last_end, resume)
        last_end = ends[i]
    return progress, last_end - start, gap_us


def _share(num_bytes: float | None, time_us: float, bandwidth: float) -> float | None:
    if num_bytes is None or not time_us:
        return None
    return round(num_bytes / (time_us * 1e-6) / bandwidth, 4)


def short_name(name: str) -> str:
    """A kernel's name and innermost namespace, without return type, template arguments and
    parameters."""
    plain = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    if plain.startswith("std::enable_if<"):  # the return type of some cuBLAS kernels
        plain = plain.partition("::type ")[2]
    return "::".join(plain.partition("<")[0].partition("(")[0].strip().split("::")[-2:]) or name


def as_text(report: dict[str, Any]) -> str:
    """One report of `profile.profile_decode` as a text table."""
    if "prompt_tokens" in report:
        what = f"prompts of {report['prompt_tokens']} tokens"
    else:
        rows = f"{report['rows']} rows (bucket {report['bucket']})"
        what = f"{rows}, {report['context_tokens']} tokens of context"
    lines = [
        f"{what}, {report['steps']} steps: {report['wall_us']} µs a step by the clock, "
        f"{report['span_us']} on the device, busy {report['busy_share']:.1%} of it, "
        f"largest gap {report['largest_gap_us']} µs; {report['bytes'] / 1e6:.1f} MB a step, "
        f"{report['bandwidth_share']:.1%} of the copy's rate",
        f"{'kernel':<44} {'op':<28} {'launches':>8} {'µs':>9} {'duration':>9} "
        f"{'share':>7} {'MB':>9} {'of copy':>8}",
    ]
    for row in report["kernels"]:
        num_mb = "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.2f}"
        share = "" if row["bandwidth_share"] is None else f"{row['bandwidth_share']:.1%}"
        lines.append(
            f"{row['kernel'][:44]:<44} {row['op'][:28]:<28} {row['launches']:>8g} "
            f"{row['us']:>9.2f} {row['duration_us']:>9.2f} {row['share']:>7.1%} "
            f"{num_mb:>9} {share:>8}"
        )
    return "\n".join(lines)
