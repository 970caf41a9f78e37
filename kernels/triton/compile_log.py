"""Counts the kernels that Triton compiles. Kernels found in its cache folder are not counted."""

from __future__ import annotations

import logging
from typing import Any

from triton import knobs

logger = logging.getLogger(__name__)

_compiled: list[str] = []


def watch() -> None:
    """Record every compile from now on. A listener that was set before is kept and called."""
    if not isinstance(knobs.compilation.listener, _Listener):
        knobs.compilation.listener = _Listener(knobs.compilation.listener)


def compiled() -> list[str]:
    """Names of the kernels that this process compiled since `watch`, once per specialisation."""
    return list(_compiled)


class _Listener:
    def __init__(self, earlier: Any) -> None:
        self._earlier = earlier

    def __call__(
        self, *, src: Any, metadata: dict[str, Any], times: Any, cache_hit: bool, **rest: Any
    ) -> None:
        if not cache_hit:
            name = str(metadata.get("name", src))
            _compiled.append(name)
            stages = " ".join(
                f"{stage} {microseconds / 1e6:.2f}" for stage, microseconds in times.lowering_stages
            )
            logger.debug("compiled kernel %s in %.2f s: %s", name, times.total / 1e6, stages)
        if self._earlier is not None:
            self._earlier(src=src, metadata=metadata, times=times, cache_hit=cache_hit, **rest)
