"""Traffic of offloaded experts over the bus (`expert_offload`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nanovllm.models.experts.offloaded import COUNTERS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExpertTraffic:
    """Experts of all layers and steps, counted as in `reference.offload.COUNTERS`.

    expert_bytes: bytes of one expert. bus_rate: measured bytes per second; None if every expert is
    on the device.
    """

    needed: int
    resident: int
    fetched: int
    in_place: int
    streamed: int
    ahead: int
    expert_bytes: int
    bus_rate: float | None

    @property
    def hit_rate(self) -> float:
        """The share of needed experts that were on the device; 1 if none was needed."""
        return self.resident / self.needed if self.needed else 1.0

    @property
    def moved_bytes(self) -> int:
        num = self.fetched + self.in_place + self.streamed + self.ahead
        return num * self.expert_bytes

    @property
    def bus_seconds(self) -> float:
        """The time of these bytes at the measured rate: an upper bound on what steps lost to the
        bus."""
        return self.moved_bytes / self.bus_rate if self.bus_rate else 0.0

    def __str__(self) -> str:
        rate = "" if self.bus_rate is None else f" at {self.bus_rate / 1e9:.1f} GB/s"
        return (
            f"{self.hit_rate:.1%} of {self.needed} experts were resident; "
            f"{self.moved_bytes / 1e9:.2f} GB over the bus ({self.fetched} experts fetched, "
            f"{self.in_place} read in place, {self.streamed} streamed, {self.ahead} ahead), "
            f"about {self.bus_seconds:.3f} s{rate}"
        )

    def as_dict(self) -> dict[str, float]:
        """For a line of JSON."""
        return {
            **{name: getattr(self, name) for name in COUNTERS},
            "hit_rate": round(self.hit_rate, 4),
            "moved_bytes": self.moved_bytes,
            "bus_seconds": round(self.bus_seconds, 4),
        }


class ExpertStats:
    """The traffic of an engine: of the newest batch of requests, and since the engine was ready.

    A batch lasts from one idle moment of the engine to the next. `read` returns the device's
    counters.
    """

    def __init__(
        self, read: Callable[[], Sequence[int]], expert_bytes: int, bus_rate: float | None
    ) -> None:
        self._read, self._expert_bytes, self._bus_rate = read, expert_bytes, bus_rate
        self._first = self._newest = list(read())
        self._is_open = False  # a step has run since the last batch
        self.batch = self.total = self._since(self._first)

    def after_step(self, *, has_run: bool, is_idle: bool) -> None:
        """Record a call of the engine: whether a step has run, and whether the engine is now
        idle."""
        self._is_open |= has_run
        if self._is_open and is_idle:
            self._is_open = False
            self._end_batch()

    def _end_batch(self) -> None:
        """Read the counters, which waits for the device, and log the batch."""
        before, self._newest = self._newest, list(self._read())
        self.batch, self.total = self._since(before), self._since(self._first)
        logger.info("experts: %s", self.batch)

    def _since(self, before: Sequence[int]) -> ExpertTraffic:
        counts = [now - then for now, then in zip(self._newest, before)]
        named = dict(zip(COUNTERS, counts))
        return ExpertTraffic(**named, expert_bytes=self._expert_bytes, bus_rate=self._bus_rate)
