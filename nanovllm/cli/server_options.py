"""The options of `nanovllm serve` on the command line: flags made from `ServerConfig`."""

from __future__ import annotations

import argparse

from nanovllm.api.config import ServerConfig
from nanovllm.flags import Arguments, add_flags
from nanovllm.option_names import NO_ACCESS_LOG, SERVER_FLAGS


def add_server_options(to: Arguments) -> None:
    """Add a flag for each option of the server, also under vLLM's names."""
    add_flags(to, ServerConfig, also=SERVER_FLAGS)
    to.add_argument(
        *NO_ACCESS_LOG, dest="access_log", action="store_false", default=argparse.SUPPRESS,
        help="the same as --no-access-log",
    )  # fmt: skip
    auto = (
        "vLLM parses tool calls only with this flag; here they are always parsed, unless "
        "tool_call_parser is none"
    )
    to.add_argument("--enable-auto-tool-choice", action="store_true", help=auto)
