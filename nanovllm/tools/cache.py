"""Lists and prunes a store of compiled programs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from nanovllm.compile.store import SUBFOLDERS, Store, num_kernels, problems, prune

__all__ = ["listed", "problems", "pruned"]


def listed(folder: Path) -> str:
    """A line for each entry, and the sizes of all."""
    entries = sorted(Store(folder).entries(), key=lambda entry: (entry.name, entry.path.name))
    lines = []
    for entry in entries:
        torch = entry.ingredients.get("torch", "?")
        about = f"{entry.kind:8}  {entry.num_bytes:>8}  torch {torch:12}  {entry.name}"
        lines.append(f"{entry.path.name[:16]}  {about}")
    counts = sorted(Counter(entry.kind for entry in entries).items())
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts) or "none"
    num_objects = len({entry.object for entry in entries})
    objects = f"{num_objects} objects, {num_kernels(folder)} Triton kernels"
    lines.append(f"{len(entries)} entries ({kinds}), {objects}")
    lines += [f"{name:9} {_size(folder / name):>12,} bytes" for name in SUBFOLDERS]
    return "\n".join(lines)


def pruned(folder: Path, max_bytes: int) -> str:
    """Remove least recently used entries down to `max_bytes`; returns a summary."""
    freed = prune(folder, max_bytes)
    left = sum(_size(folder / name) for name in SUBFOLDERS)
    return f"{freed:,} bytes freed, {left:,} are left"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
