"""Tokens per second of one request at a time: 128 tokens in, 512 out.

nanovllm bench latency --random-weights Qwen3-0.6B

This is nanovllm bench throughput --latency; its help describes the options.
"""

from __future__ import annotations

from nanovllm.cli.bench import throughput
from nanovllm.cli.bench.throughput import USAGE, main
from nanovllm.flags import Parser

__all__ = ["USAGE", "add_arguments", "main"]


def add_arguments(parser: Parser) -> None:
    throughput.add_arguments(parser)
    parser.set_defaults(latency=True)
