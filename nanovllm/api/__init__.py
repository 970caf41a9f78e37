"""An OpenAI-compatible HTTP server for an `AsyncEngine`. It needs the extra `serve`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanovllm.api.config import ServerConfig

if TYPE_CHECKING:
    from nanovllm.config import EngineConfig

__all__ = ["ServerConfig", "serve"]


def serve(engine: EngineConfig, server: ServerConfig) -> int:
    """Serve a model over HTTP until SIGTERM or SIGINT. Returns the exit code.

    0: it has ended in order. 1: the engine or an API process has failed. 130: SIGINT came twice.
    Call it in the main thread. The log has the URL once requests are answered. Raises ValueError
    for options that the engine refuses, and OSError for an address that cannot be used.
    """
    from nanovllm.api import start  # imports msgspec

    return start.serve(engine, server)
