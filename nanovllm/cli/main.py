"""nanovllm: an inference engine for large language models."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

from nanovllm import env, programs
from nanovllm.flags import Parser
from nanovllm.startup import bytecode
from nanovllm.tools import command_line
from nanovllm.typos import nearest


class Command(NamedTuple):
    """A module with `USAGE`, `add_arguments(parser)` and `main(args)`, and its summary. It may have
    `PARSE`, a method of the parser to use instead of `parse_args`.

    has_engine: an engine runs in this process or a child of it, so torch is imported.

    The modules' top-level imports are light, so that --help is fast.
    """

    module: str
    summary: str
    has_engine: bool = True


COMMANDS = {
    "serve": Command("nanovllm.cli.serve", "serve OpenAI's API over HTTP"),
    "chat": Command("nanovllm.cli.chat", "chat with a model in the terminal"),
    "run": Command("nanovllm.cli.run", "answer one prompt"),
    "bench throughput": Command("nanovllm.cli.bench.throughput", "tokens per second of an engine"),
    "bench latency": Command("nanovllm.cli.bench.latency", "the same, one request at a time"),
    "bench serve": Command(
        "nanovllm.cli.bench.serve", "throughput and latency of a server", has_engine=False
    ),
    "batch": Command("nanovllm.cli.batch", "answer a file of prompts"),
    "embed": Command("nanovllm.cli.embed", "embed the lines of a file"),
    "precompile": Command("nanovllm.cli.precompile", "compile a model's programs ahead of time"),
    "quantize": Command(
        "nanovllm.cli.quantize", "write a quantized copy of a model", has_engine=False
    ),
    "cache": Command(
        "nanovllm.cli.cache", "list, verify or prune compiled programs", has_engine=False
    ),
    "list": Command("nanovllm.cli.list_models", "list the local models", has_engine=False),
    "pull": Command("nanovllm.cli.pull", "download a model", has_engine=False),
    "rm": Command("nanovllm.cli.rm", "remove downloaded models", has_engine=False),
    "report": Command("nanovllm.cli.report", "draw a step and the cost of each kernel"),
    "info": Command("nanovllm.cli.info", "show devices, and an engine's settings"),
    "completion": Command(
        "nanovllm.cli.completion", "print a shell completion script", has_engine=False
    ),
}


def entry() -> int:
    """The console script: the exit status of the command in `sys.argv`."""
    return command_line.run(main)


def main(words: Sequence[str] | None = None) -> int | None:
    """Run the command that the words start with."""
    words = sys.argv[1:] if words is None else words
    groups = {name.split()[0] for name in COMMANDS if " " in name}
    num_words = 2 if words and words[0] in groups else 1
    name = " ".join(words[:num_words])
    if name in COMMANDS:
        return run(name, words[num_words:])
    group = words[0] if num_words == 2 else ""
    program = f"nanovllm {group}".strip()
    asked = words[num_words - 1] if len(words) >= num_words else "--help"
    if asked in ("-h", "--help"):
        print(_overview(program, group), end="")
        return 0
    if asked == "--version" and not group:
        from nanovllm import __version__

        print(f"nanovllm {__version__}")
        return 0
    known = {one.removeprefix(group).split()[0] for one in COMMANDS if one.startswith(group)}
    what = "option" if asked.startswith("-") else "command"
    hint = nearest(asked, sorted(known), f"{program} --help")
    print(f"{program}: error: unknown {what} {asked}{hint}", file=sys.stderr)
    return command_line.STATUS


def run(name: str, words: Sequence[str] | None = None, *, program: str = "") -> int | None:
    """Run a command of `COMMANDS` with the words after its name; None: those of `sys.argv`.

    `program` is the name of a script that is an alias of the command. Raises SystemExit on SIGTERM.
    """
    program = program or f"nanovllm {name}"
    with programs.sigterm_as_exit():
        return _run(name, words, program)


def _run(name: str, words: Sequence[str] | None, program: str) -> int | None:
    module, parser = load(name, program)
    try:
        args = getattr(module, "PARSE", Parser.parse_args)(parser, words)
        if getattr(args, "quiet", False):
            env.be_quiet()
        programs.begin()
        env.drop_relative()
        if COMMANDS[name].has_engine:
            folder = getattr(args, "compile_cache", None)
            bytecode.keep(lambda: env.read().store_folder(folder))
        return module.main(args)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return programs.INTERRUPTED


def load(name: str, program: str) -> tuple[Any, Parser]:
    """(module, parser) of a command."""
    module: Any = import_module(COMMANDS[name].module)
    parser = Parser(prog=program, usage=f"{program} {module.USAGE}", description=module.__doc__)
    module.add_arguments(parser)
    return module, parser


def _overview(program: str, group: str) -> str:
    names = [name for name in COMMANDS if name.startswith(group)]
    lines = [f"  {name.removeprefix(group).strip():<18}{COMMANDS[name].summary}" for name in names]
    head = [f"usage: {program} COMMAND [options]", "", str(__doc__), "", "commands:"]
    return "\n".join([*head, *lines, "", f"{program} COMMAND --help lists its options.", ""])
