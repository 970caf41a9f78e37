"""A conversation with a model, in this process or (--url) behind a server.

    nanovllm chat Qwen/Qwen3-0.6B
    nanovllm chat --url http://127.0.0.1:8000

Ctrl-C stops an answer, Ctrl-D exits. /new starts a new conversation, /system TEXT starts one with a
system message, /file PATH attaches an image or a text to the next message, /again generates another
answer, /quit exits. For a message of several lines, paste it or enclose it in \"\"\".
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from nanovllm.cli import attach, chat_backend
from nanovllm.cli.input_lines import Input
from nanovllm.flags import Parser
from nanovllm.tools import terminal
from nanovllm.tools.command_line import MISTAKES
from nanovllm.typos import nearest

USAGE = "[MODEL] [options]"
COMMANDS = ("/new", "/system", "/file", "/again", "/quit", "/help")
HELP = """/new: start a new conversation
/system TEXT: start a new one with this system message; without TEXT: with none
/file PATH: attach an image or a text to the next message
/again: generate another answer to the last message
/quit: exit, like Ctrl-D
For a message of several lines, paste it or enclose it in \"\"\"."""


def add_arguments(parser: Parser) -> None:
    add_conversation(parser)
    chat_backend.add_arguments(parser, positional=True)


def add_conversation(parser: Parser) -> None:
    """Add the options of a conversation, which `run` also has."""
    add = parser.add_argument
    add("--system", metavar="TEXT", help="the system message")
    attached = "an image or a text for the first message; can be repeated"
    add("--file", metavar="PATH", action="append", default=[], help=attached)
    kept = "save terminal input for later sessions (default: yes)"
    add("--history", action=argparse.BooleanOptionalAction, default=True, help=kept)


def main(args: argparse.Namespace) -> None:
    """Chat until the end of the input. Raises ValueError and OSError for invalid options."""
    parts = [attach.read(name) for name in args.file]
    model = chat_backend.open_model(args)
    if not model.has_template:
        raise ValueError("the model has no chat template: use nanovllm run --raw")
    chat = Chat(model, args.system, Input(has_history=args.history), parts)
    try:
        while chat.turn():
            pass
    finally:
        chat.input.close()


class Chat:
    """A conversation and its commands."""

    def __init__(
        self,
        model: chat_backend.ChatBackend,
        system: str | None,
        source: Input,
        parts: list[attach.Part],
    ) -> None:
        """`parts` are attached to the first message."""
        self.model, self.input, self.parts = model, source, parts
        self._begin(system)

    def turn(self) -> bool:
        """Read a message or a command and run it. Returns False at the end of the input."""
        try:
            line = self.input.read()
        except EOFError:
            return False
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit exits)")
            return True
        if line.startswith("/") and "\n" not in line:
            return self._command(*line.partition(" ")[::2])
        if line:
            content, self.parts = attach.content(line, self.parts), []
            self.messages.append({"role": "user", "content": content})
            self._answer()
        return True

    def _command(self, name: str, text: str) -> bool:
        if name in ("/quit", "/exit"):
            return False
        if name == "/new":
            self._begin(self.system)
        elif name == "/system":
            self._begin(text.strip() or None)
        elif name == "/file":
            self._attach(text.strip())
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

    def _attach(self, path: str) -> None:
        try:
            self.parts.append(attach.read(path))
        except (ValueError, OSError) as error:
            print(f"error: {terminal.printable(str(error))}", file=sys.stderr)

    def _begin(self, system: str | None) -> None:
        self.system = system
        self.messages: list[dict[str, Any]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})

    def _answer(self) -> None:
        """Show and keep the answer to the last message; drop the message if there is no answer."""
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
