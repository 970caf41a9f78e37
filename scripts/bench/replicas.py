"""Measures the scaling of throughput with replicas, with bench.py's requests for each replica.

    python scripts/bench/replicas.py --random-weights Qwen3-0.6B --replicas 1 2 4

Each line of JSON is one number of replicas. `scaling` compares its tokens per second with those of
the first line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm import LLM, SamplingParams
from nanovllm.cli.bench.engines import versions
from nanovllm.cli.bench.workload import Workload, make_workload, varied
from nanovllm.tools import command_line
from nanovllm.tools.shapes import CONFIGS


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="embedded model, folder or Hub id")
    names = ", ".join(CONFIGS)
    source.add_argument("--random-weights", metavar="CONFIG", help=f"{names}, or a config.json")
    add = parser.add_argument
    add("--replicas", type=int, nargs="+", default=[1, 2], help="numbers of replicas")
    add("--num-seqs", type=int, default=256, help="requests for each replica, all at once")
    add("--min-len", type=int, default=100, help="shortest prompt and answer")
    add("--max-len", type=int, default=1024, help="longest prompt and answer")
    add("--runs", type=int, default=3)
    add("--device", default="auto")
    parser.set_defaults(layers=None, latency=False, stall=None, max_model_len=None, first=None)
    return parser.parse_args()


def measure(args: argparse.Namespace, work: Workload, num: int) -> dict[str, Any]:
    """One line of results."""
    sampling = {"temperature": 0.6, "ignore_eos": True}
    params = [SamplingParams(**sampling, max_tokens=length) for length in work.output_lens] * num
    started = time.perf_counter()
    llm = LLM(
        work.model,
        device=args.device,
        data_parallel_size=num,
        max_num_seqs=args.num_seqs,
        max_model_len=work.max_model_len,
        random_weights=args.random_weights is not None,
    )
    load_seconds = time.perf_counter() - started
    vocab, seconds = work.config["vocab_size"], []
    for run in range(args.runs + 1):
        copies = [varied(work.prompts, run * num + copy, vocab) for copy in range(num)]
        prompts = [prompt for copy in copies for prompt in copy]
        begun = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        seconds.append(time.perf_counter() - begun)
    llm.close()
    measured = sorted(seconds[1:])  # the first one warms up
    median = measured[len(measured) // 2]
    return {
        "model": args.random_weights or args.model,
        "replicas": num,
        "num_seqs": len(prompts),
        "output_tokens": num * sum(work.output_lens),
        "load_seconds": round(load_seconds, 2),
        "seconds": [round(value, 4) for value in seconds[1:]],
        "tokens_per_second": round(num * sum(work.output_lens) / median, 1),
        "versions": versions(),
    }


def main() -> None:
    args = arguments()
    with ExitStack() as stack:
        work = make_workload(args, stack)
        first = 0.0
        for num in args.replicas:
            result = measure(args, work, num)
            first = first or result["tokens_per_second"]
            print(
                json.dumps({**result, "scaling": round(result["tokens_per_second"] / first, 3)}),
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(command_line.run(main))
