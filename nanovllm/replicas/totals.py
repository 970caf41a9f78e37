"""Combines the metrics of several engines."""

from __future__ import annotations

from collections.abc import Sequence

from nanovllm.engine.metrics import Metric

SHARES = ("kv_cache_usage_perc", "expert_hit_rate")  # combined as means, not sums


def totals(of_engines: Sequence[Sequence[Metric]]) -> list[Metric]:
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
