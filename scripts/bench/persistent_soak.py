"""A long run of steps of one kernel at random lengths: each has the logits that it had at first.

    python scripts/bench/persistent_soak.py [--steps 1000000] [--out soak.json]

A captured graph takes the next of some made-up steps from the device's memory, runs it, and counts
those whose logits differ by a bit from what they were when each step ran alone. Steps have three
rows, then four tokens of one request. The model has two layers of Qwen3's form with random weights,
so that most of a step is the exchange of results.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm.compile.lower.persistent import schedule as schedules
from nanovllm.compile.lower.persistent import step as steps
from nanovllm.kernels.cuda.persistent import Inputs
from nanovllm.tools import command_line
from tests.compile.persistent_cases import BLOCK_SIZE, Case, Shape, case

SHAPE, MAX_LEN, NUM_CASES, AT_ONCE = Shape(256, 4, 2, 512, 1024, 2), 1200, 512, 5000
FORMS: dict[str, tuple[int | tuple[int, ...], ...]] = {
    "three rows": (MAX_LEN,) * 3,
    "four tokens of a request": (tuple(range(MAX_LEN - 3, MAX_LEN + 1)),),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1_000_000, help="of each form")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    for name, lens in FORMS.items():
        report[name] = found = soak(case(lens, SHAPE, "cuda"), args.steps)
        print(name, json.dumps(found), flush=True)
        if args.out:
            args.out.write_text(json.dumps(report, indent=1))
    if any(report[name]["wrong"] for name in FORMS):
        raise SystemExit("logits have changed")


def soak(one: Case, num_steps: int) -> dict[str, float]:
    device = one.given.h_RD.device
    schedule = schedules.build(one.plan, steps.num_programs(device))
    step = steps.build(one.weights, schedule, device)
    drawn = made_up(one)
    next_1, wrong_1 = (torch.zeros(1, dtype=torch.int64, device=device) for _ in "12")

    def run() -> Tensor:
        for target, values in zip(places(one.given), drawn, strict=True):
            torch.index_select(values, 0, next_1, out=target[None])
        step.run(one.given)
        return one.given.logits_RV

    def each_once() -> list[Tensor]:
        found = []
        for idx in range(NUM_CASES):
            next_1.fill_(idx)
            found.append(run().clone())
        step.check()
        return found

    # each writes keys and values of its positions, which depend on those of the layer before
    for _ in range(SHAPE.layers):
        each_once()
    expected = torch.stack(each_once())
    order = torch.randint(NUM_CASES, (AT_ONCE,), device=device)
    at_1 = torch.zeros_like(next_1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        next_1.copy_(order.index_select(0, at_1 % AT_ONCE))
        at_1 += 1
        wrong_1 += (run() != expected.index_select(0, next_1)[0]).any()
    begun = time.perf_counter()
    for first in range(0, num_steps, AT_ONCE):
        for _ in range(min(AT_ONCE, num_steps - first)):
            graph.replay()
        step.check()  # also waits: not too many launches are queued
        order.random_(NUM_CASES)
    seconds = time.perf_counter() - begun
    return {"steps": int(at_1), "wrong": int(wrong_1), "seconds": round(seconds, 1)}


def places(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return given.rope_pos_R, given.slot_R, given.seq_len_R


def made_up(one: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, slots and lengths [N, R] of steps at random lengths, from one token on."""
    given = one.given
    num_rows, device = len(given.h_RD), given.h_RD.device
    if one.plan.has_several:  # a position has the same token in each step
        first_N1 = torch.randint(MAX_LEN // num_rows, (NUM_CASES, 1), device=device) * num_rows
        pos_NR = first_N1 + torch.arange(num_rows, device=device)
    else:
        pos_NR = torch.randint(MAX_LEN, (NUM_CASES, num_rows), device=device)
    block_NR = given.table_RP.long().gather(1, (pos_NR // BLOCK_SIZE).T).T
    return pos_NR, block_NR * BLOCK_SIZE + pos_NR % BLOCK_SIZE, (pos_NR + 1).int()


if __name__ == "__main__":
    sys.exit(command_line.run(main))
