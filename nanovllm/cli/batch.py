"""Answers a file of prompts with one engine or several replicas.

nanovllm batch prompts.jsonl -o out.jsonl [--model M] [--replicas N] [options of LLM]

Each line of the input is a JSON object: "prompt" (text or token ids) or "messages", and optionally
"id", "params" (sampling parameters) and "model" (an adapter of --lora-modules). The output has one
line per row, in input order: an answer or an "error". Starting a stopped job again resumes it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nanovllm import log
from nanovllm.cli.engine_options import add_engine_options, engine_config
from nanovllm.cli.watch import add_quiet
from nanovllm.flags import Parser, json_value

USAGE = "INPUT -o OUTPUT [options]"


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("input", metavar="INPUT", type=Path, help="a file with one JSON object per line")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="the file to write")
    add("--overwrite", action="store_true", help="start anew")
    add("--replicas", type=int, default=1, metavar="N", help="engines in Ray, if above 1")
    add("--no-ray", action="store_true", help="without Ray, whatever --replicas says")
    add("--ray-address", metavar="ADDRESS", help="a running cluster: HOST:PORT or auto")
    params = "sampling parameters for all rows"
    add("--params", type=json_value, metavar="JSON", help=params)
    chat = "options of LLM.chat for messages"
    add("--chat-options", type=json_value, metavar="JSON", help=chat)
    lora = "adapters that rows name as their model"
    add("--lora-modules", nargs="+", default=[], metavar="NAME=FOLDER", help=lora)
    progress = argparse.BooleanOptionalAction
    add("--progress", action=progress, default=True, help="show a progress bar")
    add_quiet(parser)
    add_engine_options(parser)


def main(args: argparse.Namespace) -> int:
    """Exit status 0: every row has its line in the output. 130: Ctrl-C ended it. 143: SIGTERM."""
    from nanovllm.batch.command import JobOptions, answer_file  # imports torch

    log.configure()
    request = JobOptions(
        args.input, args.output, engine_config(args), args.params, args.chat_options,
        lora_modules=args.lora_modules, replicas=args.replicas,
        uses_ray=False if args.no_ray else None, ray_address=args.ray_address,
        overwrite=args.overwrite, show_progress=args.progress,
    )  # fmt: skip
    return answer_file(request)
