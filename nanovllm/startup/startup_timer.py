"""The duration of each stage of a start."""

from __future__ import annotations

import time


class StartupTimer:
    """Seconds by stage: device, config, kernels, weights, compile (waiting for workers), tokenizer
    (waiting for it), cache, prefill, decode (captures included), stall (timing prefill), seal."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
