"""Serves OpenAI's API over HTTP, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from nanovllm import extras
from nanovllm.api.config import ServerConfig
from nanovllm.cli.engine_options import add_engine_options, engine_config
from nanovllm.cli.server_options import add_server_options
from nanovllm.cli.watch import add_quiet
from nanovllm.flags import Parser, given
from nanovllm.option_names import OF_LOGS

USAGE = "[MODEL] [options]"
# the extra `serve`
NEEDED = (
    "httptools", "llguidance", "prometheus_client", "starlette", "uvicorn", "uvloop",
)  # fmt: skip
# an engine logs no requests, so these names mean the server's options here
OF_SERVER = {*ServerConfig.__dataclass_fields__, *OF_LOGS}


def add_arguments(parser: Parser) -> None:
    add_server_options(parser.add_argument_group("options of the server"))
    add_quiet(parser)
    add_engine_options(parser, positional=True, skip=OF_SERVER)


def main(args: argparse.Namespace) -> int:
    """The exit status of the server. Raises ValueError for an invalid option, and if a package of
    the extra `serve` is missing."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(f"nanovllm serve needs {', '.join(missing)}: {extras.install('serve')}")
    from nanovllm import api

    server = ServerConfig(**given(args, ServerConfig))
    if args.enable_auto_tool_choice and server.tool_call_parser == "none":
        raise ValueError("enable_auto_tool_choice needs a tool_call_parser other than 'none'")
    engine = engine_config(args, skip=OF_SERVER)
    return api.serve(engine, server)
