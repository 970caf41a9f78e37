"""Metrics of an engine in vLLM's form: a list of named gauges and counters."""

from __future__ import annotations

import logging
import time
from collections import Counter as Count
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nanovllm.schedule.request import Request
from nanovllm.schedule.scheduler import Scheduler

if TYPE_CHECKING:
    from nanovllm.runner.expert_stats import ExpertStats

logger = logging.getLogger(__name__)

PREFIX = "nanovllm:"
LOG_EVERY_S = 10.0
FINISH_REASONS = ("stop", "length", "abort", "error")


@dataclass(frozen=True)
class Metric:
    """A number with a name and labels."""

    name: str
    value: float
    labels: dict[str, str] = field(default_factory=dict)


class Gauge(Metric):
    """A number that goes up and down."""


class Counter(Metric):
    """A number that only goes up."""


class EngineMetrics:
    """Counts of an engine's past and current work.

    `experts` is None unless experts are in host memory.
    """

    def __init__(self, scheduler: Scheduler, experts: ExpertStats | None = None) -> None:
        self._scheduler, self.experts = scheduler, experts
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0  # of finished requests, like the next two
        self.num_cached_tokens = 0
        self.num_looked_up_tokens = 0
        self.num_steps = 0
        self.media_wait_seconds = 0.0
        self._num_finished: Count[str] = Count(dict.fromkeys(FINISH_REASONS, 0))

    @contextmanager
    def waiting_for_media(self, is_idle: bool) -> Iterator[None]:
        """Measures a wait for images or videos while there was no other work."""
        start = time.perf_counter()
        yield
        if is_idle:
            self.media_wait_seconds += time.perf_counter() - start

    def finished(self, request: Request, reason: str) -> None:
        """Count a request that ends."""
        self._num_finished[reason] += 1
        self.num_generated_tokens += len(request.output_ids)
        if request.num_cached is not None:
            self.num_cached_tokens += request.num_cached
            self.num_looked_up_tokens += len(request.prompt_ids)

    @property
    def cache_usage(self) -> float:
        """The share of cache blocks in use by requests."""
        pool = self._scheduler.cache.pool
        return 1 - pool.num_free / (pool.num_blocks - 1)

    def read(self) -> list[Metric]:
        """All metrics. Those of experts are counted when no request is left."""
        scheduler = self._scheduler
        active = [*scheduler.running, *scheduler.waiting]
        admitted = [request for request in active if request.num_cached is not None]
        gauges: dict[str, float] = {
            "num_requests_running": len(scheduler.running),
            "num_requests_waiting": len(scheduler.waiting),
            "kv_cache_usage_perc": self.cache_usage,
        }
        counters: dict[str, float] = {
            "prompt_tokens": self.num_prompt_tokens,
            "generation_tokens": self.num_generated_tokens
            + sum(len(request.output_ids) for request in active),
            "prefix_cache_query_tokens": self.num_looked_up_tokens
            + sum(len(request.prompt_ids) for request in admitted),
            "prefix_cache_hit_tokens": self.num_cached_tokens
            + sum(request.num_cached or 0 for request in admitted),
            "num_preemptions": scheduler.num_preemptions,
            "num_steps": self.num_steps,
            "media_wait_seconds": self.media_wait_seconds,
        }
        if self.experts is not None:
            from nanovllm.models.experts.offloaded import COUNTERS  # imports torch

            gauges["expert_hit_rate"] = self.experts.batch.hit_rate
            total = self.experts.total
            counters |= {f"experts_{name}": getattr(total, name) for name in COUNTERS}
            counters["experts_moved_bytes"] = total.moved_bytes
            counters["experts_bus_seconds"] = total.bus_seconds
        found: list[Metric] = [Gauge(PREFIX + name, value) for name, value in gauges.items()]
        found += [Counter(PREFIX + name, value) for name, value in counters.items()]
        found += self._drafts()
        return found + [
            Counter(PREFIX + "request_success", num, {"finished_reason": reason})
            for reason, num in self._num_finished.items()
        ]

    def _drafts(self) -> list[Metric]:
        """What was drafted and accepted, by vLLM's names; none without proposals."""
        names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_undrafted")
        counts, most = self._scheduler.counts, self._scheduler.max_proposals
        if not most:
            return []
        found: list[Metric] = [
            Counter(f"{PREFIX}spec_decode_{name}", getattr(counts, name))
            for name in (*names, "num_forced_tokens")
        ]
        name = f"{PREFIX}spec_decode_num_accepted_tokens_per_pos"
        found += [
            Counter(name, counts.accepted_at[place], {"position": str(place)})
            for place in range(most)
        ]
        name = f"{PREFIX}spec_decode_num_steps"
        return found + [
            Counter(name, num, {"draft_tokens": str(drafts)})
            for drafts, num in sorted(counts.steps.items())
        ]


class StatsLog:
    """Logs throughput, requests and cache use every ten seconds of work."""

    def __init__(self, metrics: EngineMetrics, scheduler: Scheduler) -> None:
        self._metrics, self._scheduler = metrics, scheduler
        self._since, self._before = time.monotonic(), (0, 0)

    def after_step(self) -> None:
        seconds = time.monotonic() - self._since
        if seconds < LOG_EVERY_S:
            return
        metrics, running = self._metrics, self._scheduler.running
        growing = sum(len(request.output_ids) for request in running)
        counts = metrics.num_prompt_tokens, metrics.num_generated_tokens + growing
        prompt, generated = (now - before for now, before in zip(counts, self._before))
        logger.info(
            "%.0f prompt tokens/s, %.0f generated tokens/s, %d running, %d waiting, %.1f%% of the "
            "cache in use", prompt / seconds, max(0, generated) / seconds, len(running),
            len(self._scheduler.waiting), 100 * metrics.cache_usage,
        )  # fmt: skip
        self._since, self._before = time.monotonic(), counts
