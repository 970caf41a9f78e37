"""Writes an HTML report on one bucket: its graphs, its kernels, and the cost of each.

Builds one layer of each kind with random weights, runs the bucket on rows of the requested length,
and times every call with the arguments of the step. Reads no weights.

    nanovllm report --model tiny-qwen3 --bs 4 -o report.html
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from nanovllm import log
from nanovllm.cli.engine_options import add_engine_options, engine_config
from nanovllm.config import EngineConfig
from nanovllm.flags import Parser

USAGE = "[MODEL] --bs ROWS | --tokens TOKENS [options]"


def add_arguments(parser: Parser) -> None:
    bucket = parser.add_mutually_exclusive_group(required=True)
    add = bucket.add_argument
    add("--bs", type=int, metavar="ROWS", help="a decode bucket of this many rows")
    add("--tokens", type=int, metavar="TOKENS", help="a prefill bucket of this many tokens")
    add = parser.add_argument
    add("-o", "--output", type=Path, default=Path("report.html"), metavar="FILE")
    context = "tokens in each row of a decode step"
    add("--context", type=int, default=512, metavar="TOKENS", help=context)
    trace = "a file of batch sizes, whose padding is reported"
    add("--trace", type=Path, metavar="FILE", help=trace)
    add_engine_options(parser, positional=True)


def main(args: argparse.Namespace) -> None:
    """Write the page. Raises ValueError or OSError for an invalid option, trace or output file."""
    from nanovllm.tools import report, report_page  # imports torch

    log.configure()
    kind, size = ("decode", args.bs) if args.bs is not None else ("prefill", args.tokens)
    sizes = report.read_trace(args.trace) if args.trace else []
    trace_name = args.trace.name if args.trace else "every size once"
    config = _with_bucket(engine_config(args), args.bs)
    made = report.draw(config, kind, size, args.context, sizes, trace_name)
    args.output.write_text(report_page.page(made), encoding="utf-8")
    print(f"{args.output}: {made.title}, {len(made.regions)} regions")


def _with_bucket(config: EngineConfig, rows: int | None) -> EngineConfig:
    """The options, with a decode bucket of `rows` rows added."""
    from nanovllm import platforms
    from nanovllm.compile import buckets

    traits = platforms.select(config.device).traits
    num_seqs = config.max_num_seqs or max(rows or 1, traits.num_seqs)
    if rows is None:
        return replace(config, max_num_seqs=num_seqs)
    ladder = buckets.decode_ladder(config.graph_batch_sizes, num_seqs, traits.decode_rows)
    return replace(config, max_num_seqs=num_seqs, graph_batch_sizes=sorted({*ladder, rows}))
