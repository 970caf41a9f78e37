"""Removes models, with all their revisions, from the Hugging Face Hub's cache.

nanovllm rm Qwen/Qwen3-0.6B
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from dataclasses import replace

from nanovllm import hub
from nanovllm.cli import hub_models
from nanovllm.flags import Parser
from nanovllm.typos import nearest

USAGE = "MODEL... [--yes]"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("models", metavar="MODEL", nargs="+", help="a Hub id (owner/name)")
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask for confirmation")


def main(args: argparse.Namespace) -> int:
    """Exit status 1: the user declined. Raises ValueError for a model that is not in the cache, and
    OSError."""
    cache = hub_models.scanned()
    here = {one.repo_id: one for one in hub_models.models(cache)}
    names = list(dict.fromkeys(args.models))
    for name in names:
        if name not in here:
            raise ValueError(_absent(name, here))
    assert cache is not None, "it has these models"
    # repositories may share commit hashes: look up each in its own repository only
    plans = [
        replace(cache, repos=frozenset({here[name]})).delete_revisions(
            *(revision.commit_hash for revision in here[name].revisions)
        )
        for name in names
    ]
    num_bytes = sum(plan.expected_freed_size for plan in plans)
    what = f"{', '.join(names)} ({hub_models.size(num_bytes)})"
    if not args.yes and not _agrees(what):
        print("nothing was removed")
        return 1
    for plan in plans:
        plan.execute()
    print(f"removed {what}")
    return 0


def _absent(name: str, here: Collection[str]) -> str:
    if name in hub.EMBEDDED:
        return f"{name} is embedded in nanovllm and cannot be removed"
    return f"{name!r} is not a model in the Hub's cache{nearest(name, here, 'nanovllm list')}"


def _agrees(what: str) -> bool:
    """Ask for confirmation. Raises ValueError without a terminal."""
    if not sys.stdin.isatty():
        raise ValueError(f"this would remove {what}: use --yes, since there is no terminal")
    try:
        return input(f"remove {what}? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
