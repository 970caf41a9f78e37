"""Answers one prompt, from the command line or from stdin, and streams the answer to stdout.

    nanovllm run "What is 37 + 45?"
    nanovllm run --model Qwen/Qwen3-0.6B < question.txt
    nanovllm run --raw "The capital of France is" --max-tokens 50

The prompt goes through the model's chat template if it has one. --raw continues it as it is.
"""

from __future__ import annotations

import argparse
import sys

from nanovllm.cli import talk
from nanovllm.flags import Parser
from nanovllm.tools import terminal

USAGE = "[PROMPT] [options]"


def add_arguments(parser: Parser) -> None:
    prompt = "the prompt; - or none: all of stdin"
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", default="-", help=prompt)
    parser.add_argument("--system", metavar="TEXT", help="a system message before the prompt")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it is")
    talk.add_arguments(parser, positional=False)


def main(args: argparse.Namespace) -> None:
    """Write the answer. Raises ValueError and OSError."""
    if args.raw and args.system is not None:
        raise ValueError("--system does not go with --raw, which uses no chat template")
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    model = talk.open_model(args)
    ends_line = True

    def write(text: str) -> None:
        nonlocal ends_line
        ends_line = text.endswith("\n") if text else ends_line
        terminal.write(text, sys.stdout)

    if args.raw or not model.has_template:
        if args.system is not None:
            raise ValueError("the model has no chat template: leave out --system")
        model.complete(prompt, write)
    else:
        system = [] if args.system is None else [{"role": "system", "content": args.system}]
        model.answer([*system, {"role": "user", "content": prompt}], write, write)
    if not ends_line:
        print()
