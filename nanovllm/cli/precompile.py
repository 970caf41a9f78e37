"""Compiles a model's programs and kernels before its first start. Reads config.json, no weights.

    nanovllm precompile --model Qwen/Qwen3-0.6B --bs 1 2 4 8 16 --out /var/cache/qwen3

Then, in Python:

    LLM("Qwen/Qwen3-0.6B", compile_cache="/var/cache/qwen3", compile_cache_mode="require",
        graph_batch_sizes=[1, 2, 4, 8, 16])

Options that affect programs must be the same for `LLM`. A store works for all checkpoints of the
same shape.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nanovllm import env, log
from nanovllm.cli.engine_options import add_engine_options, engine_config
from nanovllm.cli.watch import Watch, add_quiet
from nanovllm.flags import Parser

if TYPE_CHECKING:
    from nanovllm.config import EngineConfig
    from nanovllm.startup.compile_farm.tasks import BuildOutcome
    from nanovllm.startup.resolve import ResolvedConfig

USAGE = "[MODEL] [--out DIR] [options]"


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    sizes = "the same as --graph-batch-sizes"
    add("--bs", type=int, nargs="+", metavar="ROWS", dest="graph_batch_sizes", help=sizes,
        default=argparse.SUPPRESS)  # fmt: skip
    store = "the same as --compile-cache: created, for its owner only, if it does not exist"
    add("--out", type=Path, metavar="DIR", dest="compile_cache", help=store,
        default=argparse.SUPPRESS)  # fmt: skip
    jobs = "processes; default: half the cores, at most 8; 1 on an NPU"
    add("--jobs", type=int, metavar="N", help=jobs)
    add_quiet(parser)
    add_engine_options(parser, positional=True)


def main(args: argparse.Namespace) -> int:
    """Exit status 1: a compile process failed. Raises ValueError and OSError."""
    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"--jobs is {args.jobs}: it must be at least 1")
    log.configure()
    config = engine_config(args)
    started = time.perf_counter()
    outcomes = _filled(config, args.jobs)
    if outcomes is None:
        return 1
    programs, found = sum(one.programs for one in outcomes), sum(one.found for one in outcomes)
    kernels, seconds = sum(one.kernels for one in outcomes), time.perf_counter() - started
    store = config.compile_cache or env.read().store_folder(None)
    print(
        f"{store}: {len(outcomes)} buckets, {programs} programs compiled, {found} already there, "
        f"{kernels} kernels compiled, {seconds:.1f} s"
    )
    return 0


def _filled(config: EngineConfig, jobs: int | None) -> list[BuildOutcome] | None:
    """Compile, bucket by bucket, with progress. Returns the outcomes; None if a process failed."""
    from nanovllm.startup.compile_farm.farm import WorkerFailed
    from nanovllm.startup.precompile import fill  # imports torch

    watch = Watch("compiling", "buckets")

    def begin(resolved: ResolvedConfig) -> None:
        watch.total = len(resolved.spec.layout.buckets)
        cfg, device = resolved.model.config, resolved.platform.device
        _say_what(config, f"{cfg.architecture}, {cfg.num_layers} layers", device, watch.total)

    def progress(outcome: BuildOutcome, num_buckets: int) -> None:
        watch.note = f"{outcome.bucket[0]} {outcome.bucket[1]}"
        watch.update()

    try:
        with watch:
            return fill(config, jobs, progress, begin)
    except WorkerFailed as error:
        print(f"nanovllm precompile: {error}", file=sys.stderr)
        return None


def _say_what(config: EngineConfig, shape: str, device: object, num_buckets: int) -> None:
    if not env.is_quiet():
        store = config.compile_cache or env.read().store_folder(None)
        print(
            f"compiling {config.model} ({shape}) for {device} into {store}: {num_buckets} buckets",
            flush=True,
        )
