"""Combines the metrics of several engines."""

from __future__ import annotations

from collections.abc import Sequence

from nanovllm.engine.metrics import Counter, Gauge, Metric

SHARES = ("kv_cache_usage_perc", "expert_hit_rate")  # combined as means, not sums


class LastMetrics:
    """The metrics of an engine when they were last read, with the counts of the engines in whose
    place it was started."""

    def __init__(self) -> None:
        self._now: list[Metric] = []
        self._before: list[Metric] = []

    def note(self, metrics: list[Metric]) -> None:
        self._now = metrics

    def rest(self) -> None:
        """The engine does nothing any more."""
        self._now = [
            Gauge(one.name, 0, one.labels) if isinstance(one, Gauge) else one for one in self._now
        ]

    def follow(self, lost: LastMetrics) -> None:
        """Count on from a lost engine."""
        lost.rest()
        for one in lost.all:
            (self._before if isinstance(one, Counter) else self._now).append(one)

    @property
    def all(self) -> list[Metric]:
        return aggregate([self._now, self._before]) if self._before else self._now


def aggregate(of_engines: Sequence[Sequence[Metric]]) -> list[Metric]:
    """Sums over engines (means for shares), ordered as in the first engine that has the metric."""
    found: dict[tuple[str, str], list[Metric]] = {}
    for metrics in of_engines:
        for one in metrics:
            found.setdefault((one.name, str(sorted(one.labels.items()))), []).append(one)
    return [
        type(group[0])(group[0].name, _total(group), group[0].labels) for group in found.values()
    ]


def _total(group: Sequence[Metric]) -> float:
    total = sum(one.value for one in group)
    return total / len(group) if group[0].name.endswith(SHARES) else total
