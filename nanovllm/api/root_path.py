"""Support for a proxy that exposes the server under a path."""

from __future__ import annotations

from typing import Any

from nanovllm.api.http import Receive, Scope, Send


def below(root_path: str, app: Any) -> Any:
    """The application, which then also accepts paths under `root_path`; "" changes nothing."""
    return _Below(root_path, app) if root_path else app


class _Below:
    def __init__(self, root_path: str, app: Any) -> None:
        self._root_path, self._app = root_path, app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path == self._root_path or path.startswith(f"{self._root_path}/"):
            rest = path[len(self._root_path) :] or "/"
            scope = {**scope, "path": rest, "root_path": self._root_path}
        await self._app(scope, receive, send)
