"""Steps of one kernel under compute-sanitizer: races in shared memory, and wrong addresses.

    python scripts/bench/persistent_sanitized.py [--tools racecheck memcheck]

Tiny models of all forms: dense with one and several rows, tokens of one request, experts, and
weights in codes. Each step's logits are compared with those of the regions, since a tool may change
the order in which programs run. The kernel differs in two things from the one in use. It has no
hint whether results are waited for: copying warps read it while another warp writes it, and it
changes only the number of copies on their way. And each thread arrives at the barrier of a stage
that it has read. In use the first of a warp does for all, behind `__syncwarp`, which racecheck does
not follow.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm.compile.lower.persistent import schedule as schedules
from nanovllm.compile.lower.persistent import step as steps
from nanovllm.kernels.cuda.persistent import InFlight
from nanovllm.tools import command_line
from tests.compile.persistent_cases import (
    FP8_BLOCKS,
    FP8_EXPERTS,
    INT4,
    QWEN2,
    SMALL,
    SMALL_EXPERTS,
    Shape,
    case,
    error,
)

TOOLS = "racecheck", "memcheck"
NUM_PROGRAMS, MAX_POLLS, LIMIT = 8, (1 << 31) - 1, 0.03
CASES: tuple[tuple[Shape, tuple[int | tuple[int, ...], ...]], ...] = (
    (SMALL, (100,)), (SMALL, (1, 37, 200)), (SMALL, ((65, 66, 67, 68),)), (QWEN2, (70,)),
    (SMALL_EXPERTS, (3, 70)), (FP8_BLOCKS, (70,)), (FP8_EXPERTS, (70,)), (INT4, (3, 70)),
)  # fmt: skip
WITHOUT_HINT = InFlight(3, 3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tools", nargs="+", default=TOOLS, choices=TOOLS)
    parser.add_argument("--run", action="store_true", help="the steps alone, without a tool")
    args = parser.parse_args()
    if args.run:
        run_steps()
        return
    for tool in args.tools:
        found = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "5")
        print(tool, flush=True)
        subprocess.run([*found, sys.executable, __file__, "--run"], check=True)


def run_steps() -> None:
    for shape, lens in CASES:
        one = case(lens, shape, "cuda")
        schedule = schedules.build(one.plan, NUM_PROGRAMS)
        step = steps.build(one.weights, schedule, one.given.h_RD.device, max_polls=MAX_POLLS)
        step = step._replace(sizes=step.sizes._replace(in_flight=WITHOUT_HINT, all_arrive=True))
        step.run(one.given)
        step.check()
        logits_RV = one.given.logits_RV.clone()
        found = error(logits_RV, one.expected())
        print(f"{shape} {lens}: {found:.4f} from the regions' logits", flush=True)
        if not found < LIMIT:
            raise SystemExit(f"logits are wrong: {found} is not below {LIMIT}")
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(command_line.run(main))
