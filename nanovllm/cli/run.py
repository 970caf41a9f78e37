"""Answers one prompt, from the command line or from stdin, and streams the answer to stdout.

    nanovllm run Qwen/Qwen3-0.6B "What is 37 + 45?"
    nanovllm run Qwen/Qwen3-0.6B < question.txt
    nanovllm run Qwen/Qwen3-0.6B --raw "The capital of France is" --max-tokens 50
    nanovllm run "What is 37 + 45?"         # the embedded model tiny-qwen3 answers

A word alone is the model if it has the form of one (an embedded model, a folder, owner/name), and a
text with spaces is the prompt; so is any other word with --model or --url.

The prompt goes through the model's chat template if it has one. --raw continues it as it is.
Without a prompt, in a terminal, this is nanovllm chat.
"""

from __future__ import annotations

import argparse
import json
import sys

from nanovllm.cli import attach, chat, talk
from nanovllm.flags import Parser
from nanovllm.tools import terminal

USAGE = "[MODEL] [PROMPT] [options]"
PARSE = Parser.parse_intermixed_args  # options may stand between MODEL and PROMPT


def add_arguments(parser: Parser) -> None:
    words = "the model and the prompt, which is stdin if it is - or none; see above for one word"
    parser.add_argument("words", metavar="[MODEL] [PROMPT]", nargs="*", help=words)
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it is")
    answer = "write one object of JSON: text, finish_reason, usage, model"
    parser.add_argument("--json", action="store_true", help=answer)
    chat.add_conversation(parser)
    talk.add_arguments(parser, positional=False)


def main(args: argparse.Namespace) -> None:
    """Write the answer. Raises ValueError and OSError."""
    for name, value in (("--system", args.system), ("--file", args.file)):
        if args.raw and value:
            raise ValueError(f"{name} does not go with --raw, which uses no chat template")
    prompt = _take_words(args)
    if prompt is None and sys.stdin.isatty():
        if args.raw or args.json:
            raise ValueError("there is no prompt: nanovllm run MODEL PROMPT, or < FILE")
        chat.main(args)
        return
    if prompt in (None, "-"):
        prompt = sys.stdin.read()
    if not prompt or not prompt.strip():
        raise ValueError("the prompt is empty")
    parts = [attach.read(name) for name in args.file]
    _answer(args, talk.open_model(args), prompt, parts)


def _answer(
    args: argparse.Namespace, model: talk.Model, prompt: str, parts: list[attach.Part]
) -> None:
    if not args.raw and not model.has_template and (args.system is not None or parts):
        option = "--system" if args.system is not None else "--file"
        raise ValueError(f"the model has no chat template: leave out {option}")
    asked: talk.Messages | str = prompt
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
    """The prompt among the words, None if there is none; the model among them goes to `args`.

    Raises ValueError for one word that is neither a model nor, with its spaces, a prompt.
    """
    from nanovllm import hub

    first, rest = (args.words or [None])[0], args.words[1:]
    if first is None:
        return None
    if args.model is not None:
        if rest and first != args.model:
            raise ValueError(
                f"MODEL is {first!r}, but --model is {args.model!r}: give one of them, and quotes "
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
        f"Hub id (owner/name): write nanovllm run MODEL {' '.join(args.words)!r}"
    )
