"""An OpenAI-compatible HTTP server around an `AsyncEngine`. Needs the extra `serve`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanovllm.api.config import ServerConfig

if TYPE_CHECKING:
    from nanovllm.config import EngineConfig

__all__ = ["ServerConfig", "serve"]


def serve(engine: EngineConfig, server: ServerConfig) -> int:
    """Serve a model over HTTP until SIGTERM or SIGINT. Returns the exit code.

    0: a clean shutdown. 1: the engine or an API process failed. 130: a second SIGINT arrived.
    Call it in the main thread. The URL is logged once the server accepts requests. Raises
    ValueError for options that the engine refuses, OSError for an address that cannot be bound.
    """
    from nanovllm.api import start  # imports msgspec

    return start.serve(engine, server)
