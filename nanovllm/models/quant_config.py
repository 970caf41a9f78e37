"""Checks of values of a `quantization_config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]
MODELOPT_FILE = "hf_quant_config.json"  # where older exports of ModelOpt have theirs
# These may be missing.
OPTIONAL = frozenset({"fmt", "activation_scheme", "quantization_status", "symmetric"})


def require(config: Config, name: str, *allowed: object) -> None:
    """Refuse a value that is there and is not allowed. `allowed` with None: it may be missing."""
    found = config.get(name)
    if found not in allowed and not (found is None and name in OPTIONAL):
        raise ValueError(
            f"quantization_config has {name} {found!r}, which is not supported: only "
            f"{', '.join(map(repr, allowed))}"
        )


def block(size: Any) -> tuple[int, int]:
    is_pair = isinstance(size, (list, tuple)) and len(size) == 2
    if not is_pair or not all(isinstance(one, int) and one > 0 for one in size):
        raise ValueError(
            f"quantization_config has blocks of {size!r}: it must be two numbers above 0"
        )
    return size[0], size[1]


def group(config: Config) -> int:
    found = config.get("group_size")
    if not isinstance(found, int) or not (found > 0 or found == -1):
        raise ValueError(
            f"quantization_config has group_size {found!r}: it must be a number above 0, or -1"
        )
    return found
