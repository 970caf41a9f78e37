"""Answers over HTTP, with OpenAI's API, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from nanovllm.cli.engine_options import add_engine_options, engine_config
from nanovllm.flags import Parser, add_flags, given

USAGE = "[MODEL] [options]"
# the packages of the extra `serve` that the server cannot do without
NEEDED = ("starlette", "uvicorn", "uvloop", "httptools", "msgspec", "prometheus_client")


def add_arguments(parser: Parser) -> None:
    server = _server_config()
    of_server = parser.add_argument_group("options of the server")
    add_flags(of_server, server)
    add_engine_options(parser, positional=True, skip=server.__dataclass_fields__)


def main(args: argparse.Namespace) -> int | None:
    """The exit status of the server. Raises ValueError for a wrong option, and if a package of the
    extra `serve` is missing."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(
            f"nanovllm serve needs {', '.join(missing)}: pip install 'nanovllm[serve]'"
        )
    server = _server_config()
    engine = engine_config(args, skip=server.__dataclass_fields__)
    # by its name: the package imports what only the extra has
    api: Any = import_module("nanovllm.api")
    return api.serve(engine, server(**given(args, server)))


def _server_config() -> Any:
    return import_module("nanovllm.api.config").ServerConfig
