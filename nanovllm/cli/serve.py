"""Serves OpenAI's API over HTTP, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from nanovllm import extras
from nanovllm.api.config import ServerConfig
from nanovllm.cli.engine_options import add_engine_options, engine_config
from nanovllm.flags import Parser, add_flags, given

USAGE = "[MODEL] [options]"
# the extra `serve`
NEEDED = (
    "httptools", "llguidance", "msgspec", "prometheus_client", "starlette", "uvicorn", "uvloop",
)  # fmt: skip


def add_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("options of the server")
    add_flags(group, ServerConfig)
    auto = (
        "vLLM needs it to read calls of tools; here they are read unless tool_call_parser is none"
    )
    group.add_argument("--enable-auto-tool-choice", action="store_true", help=auto)
    add_engine_options(parser, positional=True, skip=ServerConfig.__dataclass_fields__)


def main(args: argparse.Namespace) -> int:
    """The exit status of the server. Raises ValueError for a wrong option, and if a package of the
    extra `serve` is missing."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(f"nanovllm serve needs {', '.join(missing)}: {extras.install('serve')}")
    from nanovllm import api

    server = ServerConfig(**given(args, ServerConfig))
    if args.enable_auto_tool_choice and server.tool_call_parser == "none":
        raise ValueError("enable_auto_tool_choice needs a tool_call_parser other than 'none'")
    engine = engine_config(args, skip=ServerConfig.__dataclass_fields__)
    return api.serve(engine, server)
