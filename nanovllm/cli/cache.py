"""Lists, verifies or prunes a store of compiled programs.

nanovllm cache list [DIR]
nanovllm cache verify [DIR]
nanovllm cache prune [DIR] --max-bytes 500M
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from nanovllm import env
from nanovllm.flags import Parser

USAGE = "list|verify|prune [DIR] [--max-bytes SIZE]"
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("action", choices=("list", "verify", "prune"))
    folder = "the folder of compile_cache (default: NANOVLLM_CACHE, or ~/.cache/nanovllm)"
    add("folder", metavar="DIR", type=Path, nargs="?", help=folder)
    most = "remove the least recently used entries until the store has this size, such as 500M"
    add("--max-bytes", type=_bytes, metavar="SIZE", help=most)


def main(args: argparse.Namespace) -> int:
    """Exit status 1: `verify` found damage. Raises ValueError for a folder that is no store or that
    others may write to, and OSError."""
    if (args.action == "prune") != (args.max_bytes is not None):
        raise ValueError("use --max-bytes with prune, and only with it")
    folder = args.folder or env.read().store_folder(None)
    if not (folder / "entries").is_dir():
        raise ValueError(f"{folder} is not a store of compiled programs")
    from nanovllm.tools import cache  # imports torch

    if args.action == "list":
        print(cache.listed(folder))
        return 0
    if args.action == "prune":
        print(cache.pruned(folder, args.max_bytes))
        return 0
    found = cache.problems(folder)
    print("\n".join(found) or f"{folder}: no damage found")
    return 1 if found else 0


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: use 1000000, 500K, 500M or 2G")
    return int(match[1]) * UNITS[match[2]]
