"""/metrics for Prometheus: the engine's counters and the API processes' latencies.

Metrics that exist in vLLM with the same meaning have its names ("vllm:..."), so that its dashboards
work. All others begin with "nanovllm:".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_1_0_0 as CONTENT_TYPE
from prometheus_client.registry import Collector

from nanovllm.api.latencies import OFFSETS, Histogram, Latencies
from nanovllm.engine.metrics import Counter, Metric

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric as Family

__all__ = ["CONTENT_TYPE", "render"]

# The engine's names (after "nanovllm:") that vLLM has a metric for: its name and help text.
# Counters get the suffix "_total".
NAMES = {
    "num_requests_running": ("vllm:num_requests_running", "Running requests."),
    "num_requests_waiting": ("vllm:num_requests_waiting", "Requests waiting to be scheduled."),
    "kv_cache_usage_perc": ("vllm:kv_cache_usage_perc", "Fraction of KV blocks in use, 0 to 1."),
    "prompt_tokens": ("vllm:prompt_tokens", "Prompt tokens."),
    "generation_tokens": ("vllm:generation_tokens", "Generated tokens."),
    "prefix_cache_query_tokens": (
        "vllm:prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache.",
    ),
    "prefix_cache_hit_tokens": (
        "vllm:prefix_cache_hits",
        "Prompt tokens found in the prefix cache.",
    ),
    "num_preemptions": ("vllm:num_preemptions", "Preemptions of requests."),
    "spec_decode_num_drafts": (
        "vllm:spec_decode_num_drafts",
        "Rows of steps that verified draft tokens.",
    ),
    "spec_decode_num_draft_tokens": ("vllm:spec_decode_num_draft_tokens", "Verified draft tokens."),
    "spec_decode_num_accepted_tokens": (
        "vllm:spec_decode_num_accepted_tokens",
        "Accepted draft tokens.",
    ),
    "spec_decode_num_accepted_tokens_per_pos": (
        "vllm:spec_decode_num_accepted_tokens_per_pos",
        "Accepted draft tokens, by their position after the newest token.",
    ),
    "request_success": ("vllm:request_success", "Finished requests, by finish reason."),
}
HELP = {
    "nanovllm:num_steps": "Model steps.",
    "nanovllm:spec_decode_num_steps": "Decode steps, by the most draft tokens of a row.",
    "nanovllm:spec_decode_num_undrafted": "Rows of steps with drafts whose parameters allow none.",
    "nanovllm:spec_decode_num_forced_tokens": "Accepted draft tokens that a grammar forced.",
    "nanovllm:media_wait_seconds": "Seconds with no work except waiting for media.",
}


def render(
    metrics: Sequence[Metric],
    latencies: Sequence[Latencies] = (),
    labels: Mapping[str, str] | None = None,
) -> bytes:
    """The metrics in Prometheus' text format, of the type `CONTENT_TYPE`.

    metrics: the engine's. latencies: those of all API processes; they are summed.
    labels: added to all metrics; vLLM's dashboards select by "model_name".
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Metrics(metrics, latencies, labels or {}))
    return generate_latest(registry)


class _Metrics(Collector):
    """A snapshot of the metrics."""

    def __init__(
        self, metrics: Sequence[Metric], latencies: Sequence[Latencies], labels: Mapping[str, str]
    ) -> None:
        self._metrics, self._latencies = metrics, latencies
        self._names, self._values = list(labels), list(labels.values())

    def collect(self) -> Iterator[Family]:
        families: dict[str, Any] = {}
        for metric in self._metrics:
            if metric.name not in families:
                families[metric.name] = self._family(metric)
            families[metric.name].add_metric([*self._values, *metric.labels.values()], metric.value)
        yield from families.values()
        if self._latencies:
            read = [one.read() for one in self._latencies]
            totals = [sum(values) for values in zip(*read)]
            for histogram, offset in OFFSETS.items():
                yield self._histogram(histogram, totals[offset : offset + histogram.size])

    def _family(self, metric: Metric) -> Family:
        name, meaning = NAMES.get(
            metric.name.removeprefix("nanovllm:"),
            (metric.name, HELP.get(metric.name, metric.name.partition(":")[2].replace("_", " "))),
        )
        kind = CounterMetricFamily if isinstance(metric, Counter) else GaugeMetricFamily
        return kind(name, meaning, labels=[*self._names, *metric.labels])

    def _histogram(self, histogram: Histogram, values: Sequence[float]) -> Family:
        *counts, total = values
        bounds = [*map(str, histogram.bounds), "+Inf"]
        family = HistogramMetricFamily(histogram.name, histogram.help, labels=self._names)
        family.add_metric(self._values, list(zip(bounds, accumulate(counts))), total)
        return family
