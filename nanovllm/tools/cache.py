"""Lists, verifies or prunes a store of compiled programs.

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
from nanovllm.tools import command_line

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1: `verify` found damage. Raises ValueError for a folder that is no store or that
    others may write to, and OSError."""
    parser = argparse.ArgumentParser(
        prog="python -m nanovllm.tools.cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("list", "verify", "prune"))
    parser.add_argument("folder", type=Path, help="the folder of compile_cache or NANOVLLM_CACHE")
    parser.add_argument(
        "--max-bytes", type=_bytes, help="remove least recently used entries down to this, as 500M"
    )
    args = parser.parse_args(arguments)
    if (args.command == "prune") != (args.max_bytes is not None):
        parser.error("--max-bytes goes with prune, and prune needs it")
    if not (args.folder / "entries").is_dir():
        raise ValueError(f"{args.folder} is no store of compiled programs")
    run = {"list": _list, "verify": _verify, "prune": _prune}[args.command]
    return run(args.folder, args.max_bytes)


def _list(folder: Path, _: int | None) -> int:
    entries = sorted(Store(folder).entries(), key=lambda entry: (entry.name, entry.path.name))
    for entry in entries:
        torch = entry.ingredients.get("torch", "?")
        about = f"{entry.kind:8}  {entry.num_bytes:>8}  torch {torch:12}  {entry.name}"
        print(f"{entry.path.name[:16]}  {about}")
    counts = sorted(Counter(entry.kind for entry in entries).items())
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts) or "none"
    num_objects = len({entry.object for entry in entries})
    objects = f"{num_objects} objects, {num_kernels(folder)} Triton kernels"
    print(f"{len(entries)} entries ({kinds}), {objects}")
    for name in SUBFOLDERS:
        print(f"{name:9} {_size(folder / name):>12,} bytes")
    return 0


def _verify(folder: Path, _: int | None) -> int:
    found = problems(folder)
    print("\n".join(found) or f"{folder}: no damage found")
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
    sys.exit(command_line.run(main))
