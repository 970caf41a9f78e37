"""Looks after a store of compiled programs.

python -m nanovllm.tools.cache list DIR
python -m nanovllm.tools.cache verify DIR
python -m nanovllm.tools.cache prune DIR --max-bytes 500M
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

from nanovllm.compile.store import SUBFOLDERS, Store, num_kernels, problems, prune

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1: `verify` found damage, or the folder is no store or not ours alone."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("list", "verify", "prune"))
    parser.add_argument("folder", type=Path, help="what compile_cache or NANOVLLM_CACHE names")
    parser.add_argument(
        "--max-bytes", type=_bytes, help="what may stay, like 500M; least recently used goes first"
    )
    args = parser.parse_args(arguments)
    if (args.command == "prune") != (args.max_bytes is not None):
        parser.error("--max-bytes goes with prune, and prune needs it")
    if not (args.folder / "entries").is_dir():
        print(f"{args.folder} is no store of compiled programs", file=sys.stderr)
        return 1
    try:
        return {"list": _list, "verify": _verify, "prune": _prune}[args.command](
            args.folder, args.max_bytes
        )
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1


def _list(folder: Path, _: int | None) -> int:
    entries = sorted(Store(folder).entries(), key=lambda entry: (entry.name, entry.path.name))
    for entry in entries:
        torch = entry.ingredients.get("torch", "?")
        print(
            f"{entry.path.name[:16]}  {entry.kind:8}  {entry.num_bytes:>8}  torch {torch:12}  {entry.name}"
        )
    kinds = ", ".join(
        f"{count} {kind}"
        for kind, count in sorted(Counter(entry.kind for entry in entries).items())
    )
    num_objects = len({entry.object for entry in entries})
    print(
        f"{len(entries)} entries ({kinds or 'none'}), {num_objects} objects, {num_kernels(folder)} Triton kernels"
    )
    for name in SUBFOLDERS:
        print(f"{name:9} {_size(folder / name):>12,} bytes")
    return 0


def _verify(folder: Path, _: int | None) -> int:
    found = problems(folder)
    print("\n".join(found) or f"{folder}: everything is whole")
    return 1 if found else 0


def _prune(folder: Path, max_bytes: int | None) -> int:
    assert max_bytes is not None
    freed = prune(folder, max_bytes)
    print(f"{freed:,} bytes freed, {sum(_size(folder / name) for name in SUBFOLDERS):,} are left")
    return 0


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 1000000, 500K, 500M or 2G")
    return int(match[1]) * UNITS[match[2]]


if __name__ == "__main__":
    sys.exit(main())
