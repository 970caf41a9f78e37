"""Lists the models in the Hugging Face Hub's cache, and the embedded ones.

nanovllm list

USED is the time when a file of the model was last read, if the file system records it.
"""

from __future__ import annotations

import argparse
import sys

from nanovllm import hub
from nanovllm.cli import hub_models
from nanovllm.flags import Parser
from nanovllm.tools.terminal import printable

USAGE = "[options]"


def add_arguments(parser: Parser) -> None:
    """There are no options except --help."""


def main(args: argparse.Namespace) -> None:
    """Print the list. Raises ValueError and OSError for an unreadable cache."""
    cache = hub_models.scanned()
    rows = [("MODEL", "SIZE", "USED", "")]
    for one in hub_models.models(cache):
        note = "" if hub_models.has_weights(one) else "no weights"
        used = hub_models.age(one.last_accessed)
        rows.append((one.repo_id, hub_models.size(one.size_on_disk), used, note))
    for name in hub.EMBEDDED:
        rows.append((name, hub_models.size(hub_models.embedded_bytes(name)), "", "embedded"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for name, size, used, note in rows:
        line = f"{name:<{widths[0]}}  {size:>{widths[1]}}  {used:<{widths[2]}}  {note}"
        print(printable(line.rstrip()))
    for warning in [] if cache is None else cache.warnings:
        print(printable(f"nanovllm list: {' '.join(str(warning).split())}"), file=sys.stderr)
