"""/metrics: counts of the engine, and latencies that an API process measures, for Prometheus.

A name begins with "vllm:" where vLLM has a metric with the same meaning, so that its dashboards
work. All other names begin with "nanovllm:".
"""

from __future__ import annotations

import time
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_1_0_0 as CONTENT_TYPE
from prometheus_client.registry import Collector

from nanovllm.metrics import Counter, Metric

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric as Family

__all__ = ["CONTENT_TYPE", "Latencies", "Timer", "render"]

# The engine's names (after "nanovllm:") that vLLM has a metric for: its name, and the meaning.
# Counters get the ending "_total".
NAMES = {
    "num_requests_running": ("vllm:num_requests_running", "Requests that have a state row."),
    "num_requests_waiting": ("vllm:num_requests_waiting", "Requests that wait to be admitted."),
    "kv_cache_usage_perc": ("vllm:kv_cache_usage_perc", "Share of cache blocks in use, 0 to 1."),
    "prompt_tokens": ("vllm:prompt_tokens", "Tokens of prompts."),
    "generation_tokens": ("vllm:generation_tokens", "Tokens that were generated."),
    "prefix_cache_query_tokens": (
        "vllm:prefix_cache_queries",
        "Prompt tokens that were looked up in the prefix cache.",
    ),
    "prefix_cache_hit_tokens": (
        "vllm:prefix_cache_hits",
        "Prompt tokens that were found in the prefix cache.",
    ),
    "num_preemptions": ("vllm:num_preemptions", "Requests that gave back their cache blocks."),
    "request_success": ("vllm:request_success", "Requests that have ended, by the reason."),
}
HELP = {
    "nanovllm:num_steps": "Steps of the model.",
    "nanovllm:media_wait_seconds": "Seconds without other work than to wait for images.",
}


@dataclass(frozen=True)
class Histogram:
    """bounds: upper bounds of its buckets, in seconds, ascending. One more bucket has the rest."""

    name: str
    help: str
    bounds: tuple[float, ...]

    @property
    def size(self) -> int:
        """The numbers that it keeps: a count for each bucket, and the sum."""
        return len(self.bounds) + 2


# from a millisecond, which a small model reaches, to the timeouts of clients
SHORT = (
    0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075,
    0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
LONG = (
    0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0,
    15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0,
)  # fmt: skip
FIRST_TOKEN, BETWEEN_TOKENS, PER_TOKEN, WHOLE = HISTOGRAMS = (
    Histogram("vllm:time_to_first_token_seconds", "From the request to its first token.", SHORT),
    Histogram("vllm:inter_token_latency_seconds", "Between two tokens of an answer.", SHORT),
    Histogram(
        "vllm:request_time_per_output_token_seconds",
        "Mean time between the tokens of an answer, for each answer.",
        SHORT,
    ),
    Histogram(
        "vllm:e2e_request_latency_seconds", "From the request to the end of an answer.", LONG
    ),
)
OFFSETS = dict(zip(HISTOGRAMS, accumulate((one.size for one in HISTOGRAMS), initial=0)))
NUM_VALUES = sum(one.size for one in HISTOGRAMS)


class Latencies:
    """The latencies of answers, as histograms. One thread writes.

    memory: `SIZE_BYTES` bytes, zeros at first. Several API processes share memory: each writes its
        own part and reads those of all, since a scrape reaches any of them. A number is one aligned
        write, so nothing is locked; a reader may see a count without its share of the sum.
    """

    SIZE_BYTES = NUM_VALUES * 8

    def __init__(self, memory: memoryview | None = None) -> None:
        if memory is None:
            memory = memoryview(bytearray(self.SIZE_BYTES))
        if memory.nbytes != self.SIZE_BYTES:
            raise ValueError(f"the memory has {memory.nbytes} bytes: it must be {self.SIZE_BYTES}")
        self._values = memory.cast("B").cast("d")

    def timer(self, start: float | None = None) -> Timer:
        """For one answer. start: when its request came, by `time.perf_counter()`; None is now."""
        return Timer(self, time.perf_counter() if start is None else start)

    def observe(self, histogram: Histogram, seconds: float, times: int = 1) -> None:
        """Count a latency."""
        values, offset = self._values, OFFSETS[histogram]
        values[offset + bisect_left(histogram.bounds, seconds)] += times
        values[offset + histogram.size - 1] += seconds * times

    def read(self) -> array[float]:
        """All numbers: the histograms one after the other."""
        return array("d", self._values)


class Timer:
    """Measures one answer."""

    __slots__ = ("_first", "_last", "_latencies", "_num_tokens", "_start")

    def __init__(self, latencies: Latencies, start: float) -> None:
        self._latencies, self._start = latencies, start
        self._first = self._last = 0.0
        self._num_tokens = 0

    def tokens(self, num: int) -> None:
        """New tokens have come. Those that come together share the time since the last ones."""
        if num < 1:
            return
        now = time.perf_counter()
        if self._num_tokens == 0:
            self._first = now
            self._latencies.observe(FIRST_TOKEN, now - self._start)
        else:
            self._latencies.observe(BETWEEN_TOKENS, (now - self._last) / num, num)
        self._last = now
        self._num_tokens += num

    def end(self) -> None:
        """The answer has ended, with its last tokens."""
        self._latencies.observe(WHOLE, time.perf_counter() - self._start)
        if self._num_tokens > 1:
            seconds = (self._last - self._first) / (self._num_tokens - 1)
            self._latencies.observe(PER_TOKEN, seconds)


def render(
    metrics: Sequence[Metric],
    latencies: Sequence[Latencies] = (),
    labels: Mapping[str, str] | None = None,
) -> bytes:
    """The text that Prometheus reads, of the type `CONTENT_TYPE`.

    metrics: of the engine. latencies: of all API processes; they are added up.
    labels: for all metrics; vLLM's dashboards select by "model_name".
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Metrics(metrics, latencies, labels or {}))
    return generate_latest(registry)


class _Metrics(Collector):
    """The metrics of one moment."""

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
