"""Runs the measurements and tests of several GPUs on a machine with two, each with a time limit.

    python scripts/bench/two_gpus.py --out two.json --store store --seconds 560
    python scripts/bench/two_gpus.py --out two.json --store store --cases 8b-two 8b-one

Cases run in the order of `CASES`. A case is not begun unless its limit fits in --seconds, and one
that is already in the file without an error is not run again: so several calls with the same
--out do all of them. All cases share the folder of compiled programs --store. Weights are random.
The file is written after each case: a JSON object with the results by case.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm.tools import command_line
from scripts.bench.server_process import Limit, run

# Replaced in the words of a case.
STORE, PLACE = "{store}", "{place}"


class Case(NamedTuple):
    """words: the arguments of python. seconds: the limit, with a cold store."""

    seconds: float
    words: tuple[str, ...]


def throughput(seconds: float, model: str, num_ranks: int, *words: str) -> Case:
    """`bench.py` on the first `num_ranks` GPUs."""
    ranks = ("--tensor-parallel-size", str(num_ranks)) if num_ranks > 1 else ()
    source = ("bench.py", "--random-weights", model, "--compile-cache", STORE)
    return Case(seconds, (*source, *ranks, *words))


def tests(seconds: float, *words: str) -> Case:
    return Case(seconds, ("-m", "pytest", "-q", "-p", "no:cacheprovider", *words))


def served(seconds: float, *words: str) -> Case:
    """`nanovllm serve` under a load without a rate."""
    script = ("scripts/bench/server.py", "--shape", "Qwen3-0.6B", "--cases", "rate-inf")
    return Case(seconds, (*script, "--requests", "2000", "--output", PLACE, *words))


LATENCY = ("--latency", "--runs", "3")
WHOLE, SPLIT = ("--expert-parallel", "on"), ("--expert-parallel", "off")
# One GPU of 80 GB has little room for the cache beside 64 GB of weights.
FEW = ("--first", "64", "--bs", "64", "--max-model-len", "2048")

CASES: dict[str, Case] = {
    "ranks-tests": tests(120, "-m", "gpus", "tests/parallel/test_ranks_gpu.py"),
    "sums-tests": tests(120, "-m", "gpus", "tests/kernels/test_triton_all_reduce.py"),
    "answers-tests": tests(120, "-m", "gpus", "tests/structured/test_answers.py"),
    "8b-two": throughput(120, "Qwen3-8B", 2, *LATENCY),
    "8b-one": throughput(120, "Qwen3-8B", 1, *LATENCY),
    "32b-two": throughput(240, "Qwen3-32B", 2),
    "32b-two-few": throughput(150, "Qwen3-32B", 2, *FEW),
    "32b-one-few": throughput(200, "Qwen3-32B", 1, *FEW),
    "30b-a3b-split": throughput(180, "Qwen3-30B-A3B", 2, *SPLIT),
    "30b-a3b-whole": throughput(180, "Qwen3-30B-A3B", 2, *WHOLE),
    "30b-a3b-one": throughput(180, "Qwen3-30B-A3B", 1),
    "30b-a3b-split-latency": throughput(120, "Qwen3-30B-A3B", 2, *SPLIT, *LATENCY),
    "30b-a3b-whole-latency": throughput(120, "Qwen3-30B-A3B", 2, *WHOLE, *LATENCY),
    "replicas": Case(
        180, ("scripts/bench/replicas.py", "--random-weights", "Qwen3-0.6B", "--replicas", "1", "2")
    ),
    "served-one": served(180),
    "served-two": served(180, "--", "--data-parallel-size", "2"),
    "sums": Case(120, ("scripts/bench/collectives.py", "--ranks", "2")),
    "loading": Case(
        180, ("scripts/bench/load_speed.py", "--shape", "Qwen3-8B", "--ranks", "2", "--runs", "2")
    ),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="results, read and written")
    add("--store", type=Path, required=True, metavar="DIR", help="compiled programs of all cases")
    add("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE",
        help=", ".join(CASES))  # fmt: skip
    add("--seconds", type=float, default=560.0, metavar="X", help="for all cases together")
    return parser.parse_args()


def measure(case: Case, store: Path, place: Path) -> dict[str, Any]:
    """A case's results: its lines of JSON, or else the last line of its output, and its file's."""
    filled = {STORE: str(store), PLACE: str(place)}
    words = [filled.get(word, word) for word in case.words]
    environment = {**os.environ, "NANOVLLM_CACHE": str(store)}
    started = time.monotonic()
    result: dict[str, Any] = {"command": " ".join(["python", *words])}
    try:
        output = run([sys.executable, *words], environment, Limit(case.seconds)).splitlines()
    except (RuntimeError, TimeoutError) as error:
        result["error"] = str(error)
    else:
        lines = [json.loads(line) for line in output if line.startswith("{")]
        result |= {"lines": lines} if lines else {"last_line": "".join(output[-1:])}
    if place.exists():
        result["results"] = json.loads(place.read_text())
        place.unlink()
    return {**result, "seconds": round(time.monotonic() - started, 1)}


def main() -> int:
    """Run what is left; the number of cases that have failed, at most 1."""
    args = arguments()
    end = time.monotonic() + args.seconds
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.cases:
        case = CASES[name]
        if name in results and "error" not in results[name]:
            continue
        if time.monotonic() + case.seconds > end:
            print(f"{name}: no time left for its {case.seconds:g} s", file=sys.stderr)
            continue
        results[name] = measure(case, args.store, args.out.with_suffix(".case"))
        args.out.write_text(json.dumps(results, indent=1))
        print(json.dumps({"case": name, **results[name]})[:600], flush=True)
    return int(any("error" in results.get(name, {}) for name in args.cases))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
