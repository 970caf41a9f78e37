"""Checks the Triton kernels against the reference on this GPU, then times their variants.

    python scripts/bench/bench_kernels.py --out kernels.json [--only decode mixer] [--variants]

Times are per launch, from replays of a CUDA graph in which each launch works on its own cache, like
the layers of a model: with 28 or more megabytes of keys the L2 has no effect. Shares are of the
limits measured in the same run. The first variant of each kind is the op's own choice. A compile
takes seconds, so the checks run first, in several processes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm.tools import command_line
from scripts.bench import kernel_times, mixer_cases
from scripts.bench.kernel_checks import Check, all_checks

MAX_ERROR = 1e-2
# a chunk of the gated delta rule is a chain of products, whose inputs are rounded
OTHER_MAX_ERRORS = {"mixer Qwen3.5-35B-A3B": 2e-2}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path)
    add("--only", nargs="+", default=["decode", "decode_fp8", "prefill", "rope", "norm"])
    add("--variants", action="store_true", help="time every variant, not only the ops' choice")
    add("--processes", type=int, default=12)
    add("--check-part", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_part(checks: list[Check]) -> None:
    """Run checks in this process and print each result as a line of JSON."""
    for name, check in checks:
        try:
            result: float | str = check()
        # a variant that does not compile must not hide the others
        except (RuntimeError, ValueError, triton.TritonError) as error:
            result = f"{type(error).__name__}: {str(error)[:300]}"
        print(json.dumps([name, result]), flush=True)


def run_checks(checks: list[Check], num_processes: int) -> dict[str, float | str]:
    """Errors, or messages of failures, by name of the check. Runs them in several processes."""
    command = [sys.executable, *sys.argv, "--processes", str(num_processes), "--check-part"]
    parts = [
        subprocess.Popen([*command, str(part)], stdout=subprocess.PIPE, text=True)
        for part in range(num_processes)
    ]
    lines = [line for part in parts for line in part.communicate()[0].splitlines()]
    found = dict(json.loads(line) for line in lines if line.startswith('["'))
    return {name: "no answer" for name, _ in checks} | found


def main() -> int:
    args = arguments()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    checks = all_checks(args.only, args.variants)
    if args.check_part is not None:
        run_part(checks[args.check_part :: args.processes])
        return 0

    errors = run_checks(checks, args.processes)
    bad = {
        name: error
        for name, error in errors.items()
        if not isinstance(error, float) or error > OTHER_MAX_ERRORS.get(name, MAX_ERROR)
    }
    print(f"{len(errors) - len(bad)} checks passed, {len(bad)} failed", flush=True)
    for name, error in bad.items():
        print("FAILED", name, error, flush=True)

    table = kernel_times.Table()
    limits = kernel_times.time_ceilings(table)
    timers: dict[str, Callable[[], Any]] = {
        "decode": lambda: kernel_times.time_decode(table, limits, args.variants),
        "decode_fp8": lambda: kernel_times.time_decode_fp8(table, limits, args.variants),
        "prefill": lambda: kernel_times.time_prefill(table, limits, args.variants),
        "rope": lambda: (
            kernel_times.time_rope(table, limits, args.variants),
            kernel_times.time_programmatic_launch(table),
        ),
        "norm": lambda: kernel_times.time_norm(table, limits),
        "mixer": lambda: mixer_cases.time_mixers(table, limits, args.variants),
    }
    for name in args.only:
        try:
            timers[name]()
        except (RuntimeError, ValueError, triton.TritonError) as error:
            print("FAILED timing", name, type(error).__name__, str(error)[:500], flush=True)
            bad[f"timing {name}"] = str(error)
        if args.out:
            args.out.write_text(json.dumps({"checks": errors, "times": table.rows}, indent=1))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(command_line.run(main))
