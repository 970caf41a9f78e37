"""Latencies measured by the API processes, as histograms in shared memory.

Does not import prometheus_client: the supervisor needs only the size of the memory.
"""

from __future__ import annotations

import time
from array import array
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Histogram:
    """bounds: upper bounds of the buckets in seconds, ascending. One more bucket has the rest."""

    name: str
    help: str
    bounds: tuple[float, ...]

    @property
    def size(self) -> int:
        """The number of values: a count per bucket, and the sum."""
        return len(self.bounds) + 2


# from a millisecond, which small models reach, to the timeouts of clients
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
    """Latency histograms. One thread writes.

    memory: `SIZE_BYTES` bytes, initially zero. API processes share memory: each writes its own part
        and reads all parts, since a scrape may reach any process. Each number is one aligned
        write, so there is no lock; a reader may get a count before its share of the sum.
    """

    SIZE_BYTES = NUM_VALUES * 8

    def __init__(self, memory: memoryview | None = None) -> None:
        if memory is None:
            memory = memoryview(bytearray(self.SIZE_BYTES))
        if memory.nbytes != self.SIZE_BYTES:
            raise ValueError(f"the memory has {memory.nbytes} bytes: it must be {self.SIZE_BYTES}")
        self._values = memory.cast("B").cast("d")

    def timer(self, start: float | None = None) -> Timer:
        """A timer for one answer. start: its arrival by `time.perf_counter()`; None: now."""
        return Timer(self, time.perf_counter() if start is None else start)

    def observe(self, histogram: Histogram, seconds: float, times: int = 1) -> None:
        """Record a latency."""
        values, offset = self._values, OFFSETS[histogram]
        values[offset + bisect_left(histogram.bounds, seconds)] += times
        values[offset + histogram.size - 1] += seconds * times

    def read(self) -> array[float]:
        """All values: one histogram after another."""
        return array("d", self._values)


class Timer:
    """Measures the latencies of one answer."""

    __slots__ = ("_first", "_last", "_latencies", "_num_tokens", "_start")

    def __init__(self, latencies: Latencies, start: float) -> None:
        self._latencies, self._start = latencies, start
        self._first = self._last = 0.0
        self._num_tokens = 0

    def tokens(self, num: int) -> None:
        """Record new tokens. Tokens that arrive together share the time since the last ones."""
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
        """Record the end of the answer."""
        self._latencies.observe(WHOLE, time.perf_counter() - self._start)
        if self._num_tokens > 1:
            seconds = (self._last - self._first) / (self._num_tokens - 1)
            self._latencies.observe(PER_TOKEN, seconds)
