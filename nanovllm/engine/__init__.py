"""The engine turns requests into increments, step by step. `Engine` is in `engine.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovllm.engine.engine import Engine

__all__ = ["Engine"]


def __getattr__(name: str) -> Any:
    """Imports `Engine` on first use: other modules of this package do not need torch."""
    if name == "Engine":
        from nanovllm.engine.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
