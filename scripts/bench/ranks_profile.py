"""Measures what rank 0 spends on sending steps to the other ranks, in microseconds for each step.

    python scripts/bench/ranks_profile.py --model DIR --rows 1 64
    python scripts/bench/ranks_profile.py --model tiny-qwen3 --device cpu --rows 2
    python scripts/bench/ranks_profile.py --random-weights Qwen3-8B --rows 1 64 256

Each line of JSON is one number of rows: medians of encoding a plan (once for all ranks), of sending
it, encoding excluded, and the time of a step by the clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm import LLM, SamplingParams
from nanovllm.parallel.ranks import WorkerGroup
from nanovllm.schedule.plan import StepPlan
from nanovllm.tools import command_line
from nanovllm.tools.shapes import CONFIGS


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="embedded model or folder")
    source.add_argument("--random-weights", choices=sorted(CONFIGS), help="of this shape")
    add = parser.add_argument
    add("--ranks", type=int, default=2, metavar="N")
    add("--rows", type=int, nargs="+", default=[1], metavar="N", help="requests at once")
    add("--tokens", type=int, default=128, metavar="N", help="of each answer")
    add("--device", default="auto")
    return parser.parse_args()


def timed(function: Any, taken_us: list[float]) -> Any:
    def call(*args: Any) -> Any:
        started = time.perf_counter_ns()
        try:
            return function(*args)
        finally:
            taken_us.append((time.perf_counter_ns() - started) / 1e3)

    return call


def measure(llm: LLM, num_rows: int, num_tokens: int) -> dict[str, Any]:
    params = SamplingParams(
        max_tokens=num_tokens, temperature=0.0, ignore_eos=True, detokenize=False
    )
    prompts = [[5, 6, 7]] * num_rows
    llm.generate(prompts, params, use_tqdm=False)
    encode_us: list[float] = []
    send_us: list[float] = []
    with (
        mock.patch.object(StepPlan, "to_bytes", timed(StepPlan.to_bytes, encode_us)),
        mock.patch.object(WorkerGroup, "send", timed(WorkerGroup.send, send_us)),
    ):
        started = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
    num_steps = len(encode_us)
    return {
        "rows": num_rows,
        "steps": num_steps,
        "encode_us": round(statistics.median(encode_us), 1),
        "send_us": round(statistics.median(send_us), 1),
        "step_us": round(seconds / num_steps * 1e6, 1),
    }


def main() -> None:
    args = arguments()
    with TemporaryDirectory() as folder:
        if args.random_weights is not None:
            Path(folder, "config.json").write_text(json.dumps(CONFIGS[args.random_weights]))
        is_random = args.random_weights is not None
        llm = LLM(
            folder if is_random else args.model, device=args.device, random_weights=is_random,
            tensor_parallel_size=args.ranks, skip_tokenizer_init=is_random,
            max_num_seqs=max(args.rows), max_model_len=args.tokens + 8,
            graph_batch_sizes=sorted({*args.rows}),
        )  # fmt: skip
        with closing(llm):
            for num_rows in args.rows:
                print(json.dumps(measure(llm, num_rows, args.tokens)), flush=True)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
