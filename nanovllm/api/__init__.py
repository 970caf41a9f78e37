"""HTTP: an OpenAI-compatible server on an `AsyncEngine`. It needs the extra `serve`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from nanovllm.api.config import ServerConfig

if TYPE_CHECKING:
    from nanovllm.config import EngineConfig

__all__ = ["ServerConfig", "serve"]


def serve(
    engine: EngineConfig, server: ServerConfig, on_ready: Callable[[str], object] | None = None
) -> int:
    """Serve a model over HTTP until SIGTERM or SIGINT. Returns the exit code.

    0: it has ended in order. 1: the engine or an API process has failed. `on_ready` gets the URL
    once requests are answered. Call it in the main thread. Raises ValueError for options that the
    engine refuses, and OSError for an address that cannot be used.
    """
    from nanovllm.api import start  # imports uvicorn

    return start.serve(engine, server, on_ready)
