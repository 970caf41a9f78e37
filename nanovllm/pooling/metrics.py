"""Counts of the work of an engine that pools."""

from __future__ import annotations

from nanovllm.engine.metrics import PREFIX, Counter, Gauge, Metric

REASONS = ("stop", "abort", "error")


class PoolingMetrics:
    """Counts of an engine's work."""

    def __init__(self) -> None:
        self.num_prompt_tokens = self.num_steps = self.num_waiting = self.num_running = 0
        self.num_finished = dict.fromkeys(REASONS, 0)

    def read(self) -> list[Metric]:
        gauges = {
            "num_requests_running": self.num_running, "num_requests_waiting": self.num_waiting
        }  # fmt: skip
        counters = {"prompt_tokens": self.num_prompt_tokens, "num_steps": self.num_steps}
        found: list[Metric] = [Gauge(PREFIX + name, num) for name, num in gauges.items()]
        found += [Counter(PREFIX + name, num) for name, num in counters.items()]
        return found + [
            Counter(PREFIX + "request_success", num, {"finished_reason": reason})
            for reason, num in self.num_finished.items()
        ]
