"""A conversation with a model, in this process or (--url) behind a server.

    nanovllm chat Qwen/Qwen3-0.6B
    nanovllm chat --url http://127.0.0.1:8000

Ctrl-C ends an answer, Ctrl-D the program. /new begins a new conversation, /system TEXT does so with
a system message, /again asks for another answer, /quit ends.
"""

from __future__ import annotations

import argparse
import sys

from nanovllm.cli import talk
from nanovllm.flags import Parser
from nanovllm.tools import terminal
from nanovllm.tools.command_line import MISTAKES
from nanovllm.typos import nearest

USAGE = "[MODEL] [options]"
COMMANDS = ("/new", "/system", "/again", "/quit", "/help")
HELP = """/new: forget the conversation
/system TEXT: begin a new one with this system message; without TEXT: with none
/again: another answer to the last message
/quit: end, as Ctrl-D does"""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    talk.add_arguments(parser, positional=True)


def main(args: argparse.Namespace) -> None:
    """Talk until the end of the input. Raises ValueError and OSError for wrong options."""
    model = talk.open_model(args)
    if not model.has_template:
        raise ValueError("the model has no chat template: use nanovllm run --raw")
    if sys.stdin.isatty():
        import readline  # noqa: F401 (input() then edits lines)
    chat = Chat(model, args.system)
    while chat.turn():
        pass


class Chat:
    """A conversation and its commands."""

    def __init__(self, model: talk.Model, system: str | None) -> None:
        self.model = model
        self._begin(system)

    def turn(self) -> bool:
        """Read a line and carry it out. Returns False at the end of the input."""
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return False
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit ends)")
            return True
        if line.startswith("/"):
            return self._command(*line.partition(" ")[::2])
        if line:
            self.messages.append({"role": "user", "content": line})
            self._answer()
        return True

    def _command(self, name: str, text: str) -> bool:
        if name in ("/quit", "/exit"):
            return False
        if name == "/new":
            self._begin(self.system)
        elif name == "/system":
            self._begin(text.strip() or None)
        elif name == "/again":
            if self.messages and self.messages[-1]["role"] == "assistant":
                self.messages.pop()
            if self.messages and self.messages[-1]["role"] == "user":
                self._answer()
        elif name == "/help":
            print(HELP)
        else:
            print(f"unknown command {name}{nearest(name, COMMANDS, '/help')}")
        return True

    def _begin(self, system: str | None) -> None:
        self.system = system
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def _answer(self) -> None:
        """Show and keep the answer to the last message; drop the message if there is none."""
        texts: list[str] = []

        def write(text: str) -> None:
            texts.append(text)
            _show(text)

        try:
            self.model.answer(self.messages, write, _show)
        except KeyboardInterrupt:
            _show(" …")
        except MISTAKES as error:
            print(f"\nerror: {terminal.printable(str(error))}", file=sys.stderr)
            if not texts:
                self.messages.pop()
                return
        print()
        self.messages.append({"role": "assistant", "content": "".join(texts)})


def _show(text: str) -> None:
    terminal.write(text, sys.stdout)
