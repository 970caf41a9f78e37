"""The results of `nanovllm bench serve`: numbers, a table and a file, with vLLM's names."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

WIDTH = 50  # of the table
HEADS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
Records = Sequence[Mapping[str, Any]]


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for unknown metrics, percentiles out of range and invalid metadata."""
    _metadata(args)
    for name in _metrics(args):
        if name not in HEADS:
            raise ValueError(f"--percentile-metrics has {name!r}: use {', '.join(HEADS)}")
    for number in _percentiles(args):
        if not 0 <= number <= 100:
            raise ValueError(f"--metric-percentiles has {number}: it must be in [0, 100]")


def summary(args: argparse.Namespace, model: str, records: Records) -> dict[str, Any]:
    """All numbers, in the order of vLLM's result file."""
    good = [one for one in records if one["error"] is None]
    begin = min(one["start"] for one in records)
    duration = max(one["end"] for one in records) - begin
    num_input, num_output = (
        sum(one[name] for one in good) for name in ("num_prompt", "num_output")
    )
    found: dict[str, Any] = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "backend": args.backend,
        "label": args.label,
        "model_id": model,
        "dataset_name": args.dataset_name,
        "num_prompts": len(records),
        "request_rate": args.request_rate if args.request_rate < math.inf else "inf",
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
        "duration": duration,
        "completed": len(good),
        "failed": len(records) - len(good),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(good) / duration,
        "output_throughput": num_output / duration,
        "total_token_throughput": (num_input + num_output) / duration,
        "max_output_tokens_per_s": _peak_rate(good),
        "steady_output_throughput": _steady_rate(good),
        "max_concurrent_requests": _peak_requests(records),
        **_metadata(args),
    }
    for name, values in _values(good).items():
        if name in _metrics(args):
            found |= _statistics(name, values, _percentiles(args))
    return found


def table(args: argparse.Namespace, found: Mapping[str, Any]) -> str:
    """The numbers in the format of `vllm bench serve`."""
    lines = [f"{' Serving Benchmark Result ':=^{WIDTH}}"]
    rows: list[tuple[str, Any]] = [
        ("Successful requests:", found["completed"]), ("Failed requests:", found["failed"]),
    ]  # fmt: skip
    if found["max_concurrency"] is not None:
        rows.append(("Maximum request concurrency:", found["max_concurrency"]))
    if found["request_rate"] != "inf":
        rows.append(("Request rate configured (RPS):", float(found["request_rate"])))
    rows += [
        ("Benchmark duration (s):", found["duration"]),
        ("Total input tokens:", found["total_input_tokens"]),
        ("Total generated tokens:", found["total_output_tokens"]),
        ("Request throughput (req/s):", found["request_throughput"]),
        ("Output token throughput (tok/s):", found["output_throughput"]),
        ("Peak output token throughput (tok/s):", found["max_output_tokens_per_s"]),
        ("Peak concurrent requests:", found["max_concurrent_requests"]),
        ("Total token throughput (tok/s):", found["total_token_throughput"]),
    ]
    lines += _rows(rows)
    for name in _metrics(args):
        short = name.upper()
        statistics = [("Mean", "mean"), ("Median", "median")]
        statistics += [(f"P{one:g}", f"p{one:g}") for one in _percentiles(args)]
        lines.append(f"{HEADS[name]:-^{WIDTH}}")
        lines += _rows((f"{word} {short} (ms):", found[f"{key}_{name}_ms"])
                       for word, key in statistics)  # fmt: skip
    return "\n".join([*lines, "=" * WIDTH])


def errors(records: Records) -> list[str]:
    """A line for each kind of error, most frequent first."""
    counts = Counter(one["error"] for one in records if one["error"] is not None)
    return [f"{count} requests: {error}" for error, count in counts.most_common()]


def save(args: argparse.Namespace, found: Mapping[str, Any], records: Records) -> Path:
    """Write the numbers as JSON. Returns the path."""
    limit = f"-concurrency{args.max_concurrency}" if args.max_concurrency else ""
    name = f"{args.label or args.backend}-{args.request_rate}qps{limit}-"
    name += f"{Path(found['model_id']).name}-{found['date']}.json"
    path = Path(args.result_dir or ".", args.result_filename or name)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = dict(found)
    if args.save_detailed:
        data |= {
            "input_lens": [one["num_prompt"] for one in records],
            "output_lens": [one["num_output"] for one in records],
            "ttfts": [one["times"][0] if one["times"] else 0.0 for one in records],
            "itls": [_gaps(one) for one in records],
            "errors": [one["error"] or "" for one in records],
        }
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def _metadata(args: argparse.Namespace) -> dict[str, str]:
    """The metadata. Raises ValueError for entries that are not KEY=VALUE."""
    pairs = [text.partition("=") for text in args.metadata]
    if wrong := [name for name, mark, _ in pairs if not (name and mark)]:
        raise ValueError(f"--metadata has {wrong[0]!r}: it must be KEY=VALUE")
    return {name: value for name, _, value in pairs}


def _deltas(good: Records) -> tuple[np.ndarray, np.ndarray]:
    """The times of all deltas, and the tokens of each: an equal share of its answer."""
    pieces = [np.array(one["times"]) + one["start"] for one in good]
    weights = [np.full(len(one["times"]), one["num_output"] / len(one["times"])) for one in good]
    return np.concatenate(pieces), np.concatenate(weights)


def _peak_rate(good: Records) -> float:
    """Tokens in the best second."""
    if not good:
        return 0.0
    times, weights = _deltas(good)
    seconds = (times - times.min()).astype(int)
    return float(np.bincount(seconds, weights).max())


def _steady_rate(good: Records) -> float:
    """Tokens per second from the time when a tenth of all is there until nine tenths are."""
    if not good:
        return 0.0
    times, weights = _deltas(good)
    order = times.argsort()
    times, sums = times[order], weights[order].cumsum()
    first, last = (int(np.searchsorted(sums, part * sums[-1])) for part in (0.1, 0.9))
    seconds = times[last] - times[first]
    return float((sums[last] - sums[first]) / seconds) if seconds > 0 else 0.0


def _peak_requests(records: Records) -> int:
    """The maximum number of concurrent requests."""
    changes = [(one["start"], 1) for one in records] + [(one["end"], -1) for one in records]
    return int(np.cumsum([change for _, change in sorted(changes)]).max())


def _values(good: Records) -> dict[str, list[float]]:
    """The values of each metric in seconds."""
    several = [one for one in good if one["num_output"] > 1]
    return {
        "ttft": [one["times"][0] for one in good],
        "tpot": [(one["times"][-1] - one["times"][0]) / (one["num_output"] - 1) for one in several],
        "itl": [gap for one in good for gap in _gaps(one)],
        "e2el": [one["times"][-1] for one in good],
    }


def _gaps(one: Mapping[str, Any]) -> list[float]:
    return [later - earlier for earlier, later in zip(one["times"], one["times"][1:])]


def _statistics(name: str, values: list[float], percentiles: list[float]) -> dict[str, float]:
    """In milliseconds; 0 if there are no values."""
    ms = 1e3 * np.array(values or [0.0])
    found = {"mean": ms.mean(), "median": np.median(ms), "std": ms.std()}
    found |= {f"p{one:g}": np.percentile(ms, one) for one in percentiles}
    return {f"{key}_{name}_ms": float(value) for key, value in found.items()}


def _rows(rows: Any) -> Iterator[str]:
    for head, value in rows:
        yield (
            f"{head:<40} {value:<10.2f}" if isinstance(value, float) else f"{head:<40} {value:<10}"
        )


def _metrics(args: argparse.Namespace) -> list[str]:
    named = args.percentile_metrics
    return list(HEADS) if named is None else [name for name in named.split(",") if name]


def _percentiles(args: argparse.Namespace) -> list[float]:
    """Raises ValueError for anything that is not a number."""
    return [float(number) for number in args.metric_percentiles.split(",") if number]
