"""Models in the Hugging Face Hub's cache, and the models embedded in nanovllm."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from nanovllm import hub

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo, HFCacheInfo

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
AGES = ((365 * 86400, "year"), (30 * 86400, "month"), (7 * 86400, "week"), (86400, "day"),
        (3600, "hour"), (60, "minute"))  # fmt: skip


def scanned() -> HFCacheInfo | None:
    """The Hub's cache; None if there is none yet. Raises ValueError if it is not a folder."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return scan_cache_dir()
    except CacheNotFound:
        return None


def models(cache: HFCacheInfo | None) -> list[CachedRepoInfo]:
    """The models in a cache, sorted by name."""
    repos: Iterable[CachedRepoInfo] = () if cache is None else cache.repos
    return sorted(
        (one for one in repos if one.repo_type == "model"), key=lambda one: one.repo_id.lower()
    )


def has_weights(model: CachedRepoInfo) -> bool:
    """Whether any revision has a weight file that `hub.resolve` would download."""
    return any(
        Path(file.file_name).suffix in (".safetensors", ".gguf")
        for revision in model.revisions
        for file in revision.files
    )


def embedded_bytes(name: str) -> int:
    return sum(path.stat().st_size for path in hub.resolve(name).rglob("*") if path.is_file())


def size(num_bytes: float) -> str:
    """A human-readable size: 1.5 GB."""
    for factor, unit in UNITS:
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def age(when: float) -> str:
    """A human-readable age of a time (seconds since 1970): 3 days ago."""
    seconds = time.time() - when
    for factor, unit in AGES:
        if seconds >= factor:
            num = math.floor(seconds / factor)
            return f"{num} {unit}{'s' if num > 1 else ''} ago"
    return "now"
