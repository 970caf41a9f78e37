"""Throughput and latency of the engine, as numbers and as shares of the device's limit.

# nano-vllm's workload: 256 prompts, 133,966 output tokens
nanovllm bench throughput --random-weights Qwen3-0.6B --bs 256
# the same on an accelerator; the embedded model on a CPU
nanovllm bench throughput
# a table by the largest decode batch
nanovllm bench throughput --model Qwen/Qwen3-0.6B --bs 16 64 256
# batch 1, 128 tokens in, 512 out
nanovllm bench latency --random-weights Qwen3-0.6B
# also the time of each kernel in a decode step
nanovllm bench throughput --random-weights Qwen3-0.6B --profile out
# the same on two GPUs
nanovllm bench latency --random-weights Qwen3-8B --tensor-parallel-size 2
# on two GPUs with whole experts on each of them
nanovllm bench throughput --random-weights Qwen3-30B-A3B --tensor-parallel-size 2 --expert-parallel
# two resident experts in each layer, the others in the host's memory
nanovllm bench latency --random-weights Mixtral-8x7B --expert-offload 2
# gaps between tokens while a long prompt arrives
nanovllm bench throughput --random-weights Qwen3-0.6B --stall

Every measurement is a line of JSON on stdout and, with --out, in a file. Without --model and
--random-weights: Qwen3-0.6B with random weights on an accelerator, tiny-qwen3 on a CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nanovllm.cli.engine_options import SET_BY_BENCH
from nanovllm.cli.watch import add_quiet
from nanovllm.compat.engine_args import add_engine_flags
from nanovllm.flags import Parser
from nanovllm.tools.shapes import CONFIGS

USAGE = "[--model MODEL | --random-weights CONFIG] [options]"


def add_arguments(parser: Parser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="embedded model, folder or Hub id")
    names = ", ".join(CONFIGS)
    source.add_argument("--random-weights", metavar="CONFIG", help=f"{names}, or a config.json")
    layers = "use only this many layers (with --random-weights)"
    parser.add_argument("--layers", type=int, metavar="N", help=layers)
    _add_workload(parser)
    _add_measuring(parser)
    add_quiet(parser)
    group = parser.add_argument_group(
        "options of the engine", "The options of LLM. vLLM's names for them also work."
    )
    add_engine_flags(group, skip=SET_BY_BENCH)
    for name, option in (("--no-graph", "capture"), ("--no-fusion", "fuse")):
        group.add_argument(
            name, dest=option, action="store_false", default=argparse.SUPPRESS,
            help=f"the same as --no-{option}",
        )  # fmt: skip
    padding = argparse.BooleanOptionalAction
    group.add_argument("--padding", action=padding, dest="pad_batches", default=argparse.SUPPRESS,
                       help="the same as --pad-batches")  # fmt: skip
    parser.set_defaults(device="auto", dtype="auto", max_model_len=None)


def main(args: argparse.Namespace) -> None:
    """Measure and print. Raises ValueError for conflicting arguments."""
    from nanovllm.cli.bench import offline  # imports torch

    offline.measure_all(args)


def _add_workload(parser: Parser) -> None:
    add = parser.add_argument
    add("--bs", "--max-num-seqs", type=int, nargs="+", default=[256], metavar="N",
        help="largest decode batch, or several")  # fmt: skip
    add("--num-seqs", type=int, default=256, metavar="N", help="requests in the workload")
    add("--first", type=int, metavar="N", help="only the first N requests of the workload")
    add("--min-len", type=int, default=100, metavar="N", help="shortest prompt and answer")
    add("--max-len", type=int, default=1024, metavar="N", help="longest prompt and answer")
    top_k = "sample from the k likeliest tokens; 0: from all"
    add("--top-k", type=int, default=0, metavar="N", help=top_k)
    top_p = "the same, by probability; 1: from all"
    add("--top-p", type=float, default=1.0, metavar="X", help=top_p)
    add("--latency", action="store_true", help="instead, one request: 128 tokens in, 512 out")
    stall = "instead, gaps between tokens of streams while a prompt of TOKENS arrives"
    add("--stall", type=int, nargs="?", const=16384, metavar="TOKENS", help=stall)
    add("--stall-rows", type=int, default=64, metavar="N", help="streams of --stall")


def _add_measuring(parser: Parser) -> None:
    add = parser.add_argument
    add("--runs", type=int, default=1, metavar="N", help="runs with the loaded model")
    add("--out", type=Path, metavar="FILE", help="append the lines of JSON to this file")
    profile = "profile decode steps after the runs (CUDA)"
    add("--profile", type=Path, metavar="DIR", help=profile)
    add("--profile-steps", type=int, default=8, metavar="N", help="decode steps per profile")
