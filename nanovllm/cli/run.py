"""Answers one prompt, from the command line or from stdin, and streams the answer to stdout.

    nanovllm run Qwen/Qwen3-0.6B "What is 37 + 45?"
    nanovllm run Qwen/Qwen3-0.6B < question.txt
    nanovllm run Qwen/Qwen3-0.6B --raw "The capital of France is" --max-tokens 50
    nanovllm run "What is 37 + 45?"         # uses the embedded model tiny-qwen3

A single word is the model if it looks like one (an embedded model, a folder, owner/name). A text
with spaces is the prompt; with --model or --url, so is any other word.

The prompt is rendered with the model's chat template if there is one. --raw continues the prompt
without it. In a terminal, without a prompt, this is nanovllm chat.
"""

from __future__ import annotations

import argparse
import json
import sys

from nanovllm.cli import attach, chat, chat_backend
from nanovllm.flags import Parser
from nanovllm.tools import terminal

USAGE = "[MODEL] [PROMPT] [options]"
PARSE = Parser.parse_intermixed_args  # options may come between MODEL and PROMPT


def add_arguments(parser: Parser) -> None:
    words = "the model and the prompt; stdin is read if the prompt is - or missing; see above"
    parser.add_argument("words", metavar="[MODEL] [PROMPT]", nargs="*", help=words)
    parser.add_argument("--raw", action="store_true", help="use no chat template")
    answer = "write a JSON object: text, finish_reason, usage, model"
    parser.add_argument("--json", action="store_true", help=answer)
    chat.add_conversation(parser)
    chat_backend.add_arguments(parser, positional=False)


def main(args: argparse.Namespace) -> None:
    """Write the answer. Raises ValueError and OSError."""
    for name, value in (("--system", args.system), ("--file", args.file)):
        if args.raw and value:
            raise ValueError(f"{name} cannot be combined with --raw, which uses no chat template")
    prompt = _take_words(args)
    if prompt is None and sys.stdin.isatty():
        if args.raw or args.json:
            raise ValueError("there is no prompt: use nanovllm run MODEL PROMPT, or < FILE")
        chat.main(args)
        return
    if prompt in (None, "-"):
        prompt = sys.stdin.read()
    if not prompt or not prompt.strip():
        raise ValueError("the prompt is empty")
    parts = [attach.read(name) for name in args.file]
    _answer(args, chat_backend.open_model(args), prompt, parts)


def _answer(
    args: argparse.Namespace, model: chat_backend.ChatBackend, prompt: str, parts: list[attach.Part]
) -> None:
    if not args.raw and not model.has_template and (args.system is not None or parts):
        option = "--system" if args.system is not None else "--file"
        raise ValueError(f"the model has no chat template: leave out {option}")
    asked: chat_backend.Messages | str = prompt
    if not args.raw and model.has_template:
        system = [] if args.system is None else [{"role": "system", "content": args.system}]
        asked = [*system, {"role": "user", "content": attach.content(prompt, parts)}]
    if args.json:
        found = json.dumps(model.ask(asked).as_dict(), ensure_ascii=False)
        terminal.write(f"{found}\n", sys.stdout)
        return
    ends_line = True

    def write(text: str) -> None:
        nonlocal ends_line
        ends_line = text.endswith("\n") if text else ends_line
        terminal.write(text, sys.stdout)

    if isinstance(asked, str):
        model.complete(asked, write)
    else:
        model.answer(asked, write, write)
    if not ends_line:
        print()


def _take_words(args: argparse.Namespace) -> str | None:
    """The prompt from the words; None if there is none. A model among the words goes to `args`.

    Raises ValueError for a single word that is neither a model nor a prompt with spaces.
    """
    from nanovllm import hub

    first, rest = (args.words or [None])[0], args.words[1:]
    if first is None:
        return None
    if args.model is not None:
        if rest and first != args.model:
            raise ValueError(
                f"MODEL is {first!r}, but --model is {args.model!r}: use one of them, and quotes "
                "around a prompt of several words"
            )
        return " ".join(rest) if rest else None if first == args.model else first
    is_model = hub.names_model(first)
    if rest and (is_model or args.url is not None):
        args.model = first
        return " ".join(rest)
    if is_model:
        args.model = first
        return None
    if not rest and (args.url is not None or first == "-" or len(first.split()) != 1):
        return str(first)
    raise ValueError(
        f"{first!r} is neither an embedded model ({', '.join(hub.EMBEDDED)}), nor a folder, nor a "
        f"Hub id (owner/name): use nanovllm run MODEL {' '.join(args.words)!r}"
    )
