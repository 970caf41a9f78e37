"""Answers over HTTP, with OpenAI's API, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from nanovllm.api.config import ServerConfig
from nanovllm.cli.engine_options import add_engine_options, engine_config
from nanovllm.flags import Parser, add_flags, given

USAGE = "[MODEL] [options]"
# the extra `serve`
NEEDED = (
    "httptools", "llguidance", "msgspec", "prometheus_client", "starlette", "uvicorn", "uvloop",
)  # fmt: skip


def add_arguments(parser: Parser) -> None:
    add_flags(parser.add_argument_group("options of the server"), ServerConfig)
    add_engine_options(parser, positional=True, skip=ServerConfig.__dataclass_fields__)


def main(args: argparse.Namespace) -> int:
    """The exit status of the server. Raises ValueError for a wrong option, and if a package of the
    extra `serve` is missing."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(
            f"nanovllm serve needs {', '.join(missing)}: pip install 'nanovllm[serve]'"
        )
    from nanovllm import api

    engine = engine_config(args, skip=ServerConfig.__dataclass_fields__)
    return api.serve(engine, ServerConfig(**given(args, ServerConfig)))
