"""Writes a quantized copy of a model, which nanovllm, vLLM and transformers read, or a GGUF file.

    nanovllm quantize Qwen/Qwen3-0.6B --format w4a16 -o qwen3-w4a16

Weights are rounded to the nearest values: no data is needed. An interrupted run goes on where it
ended, except for a GGUF file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nanovllm.cli.watch import Watch, add_quiet
from nanovllm.flags import Parser

USAGE = "MODEL --format FORMAT -o DIR [options]"
FORMATS = {
    "fp8": "float8_e4m3fn, a scale for 128 × 128 weights",
    "w4a16": "4 bits, a scale for 128 inputs (compressed-tensors)",
    "w8a16": "8 bits, a scale for each output (compressed-tensors)",
    "int8": "the same; other engines quantize inputs too (compressed-tensors)",
    "gguf-q8_0": "a GGUF file in Q8_0",
    "gguf-q4_0": "a GGUF file in Q4_0, the table and the head in Q8_0",
}


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder, or a Hub id (owner/name)")
    text = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    add("--format", required=True, choices=list(FORMATS), metavar="FORMAT", help=text)
    add("-o", "--output", required=True, type=Path, metavar="DIR", help="the new folder")
    add("--revision", help="a branch, tag or commit of a model on the Hub")
    add_quiet(parser)


def main(args: argparse.Namespace) -> None:
    """Print the folder. Raises ValueError or OSError for an unusable model or folder."""
    from nanovllm import hub, log
    from nanovllm.tools import quantize, quantize_gguf, quantize_source  # import torch

    log.configure()
    quantize_source.check_target(args.output)
    source = quantize_source.read_source(hub.resolve(args.model, revision=args.revision))
    writer = quantize_gguf if args.format.startswith("gguf-") else quantize
    total = quantize_source.total_bytes(source)
    with Watch("quantize", "bytes", total, shown=not args.quiet) as watch:
        writer.write(source, args.format, args.output, watch.update)
    print(args.output)
