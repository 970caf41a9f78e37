"""How the GPU scripts time a launch."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

MIN_MS, MOST_REPLAYS = 3.0, 20


def time_launches(function: Callable[..., Any], calls: list[tuple[Any, ...]]) -> float:
    """Microseconds of one call: median over replays of a graph that holds a call with each of the arguments.

    Short lists are repeated until there are 28 calls, since the start of a graph is timed with them and takes some 20 µs;
    a single call is taken for a chain of launches, long enough by itself.
    """
    calls = calls * -(-28 // len(calls)) if len(calls) > 1 else calls
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    # by hand: torch's context manager collects garbage, which takes longer than all that is measured
    with torch.cuda.stream(stream):
        function(*calls[0])
        graph.capture_begin()
        for call in calls:
            function(*call)
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    graph.replay()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < MIN_MS and len(times) < MOST_REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times) * 1000 / len(calls)
