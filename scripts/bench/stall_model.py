"""Predicts throughput and delays of served requests without a device, for bounds on prefill steps.

    python scripts/bench/stall_model.py --shape Qwen3-8B --max-stall-ms auto 30 100

It runs the real `Scheduler` and takes the time of each step from a table of an H200. docs/log.md
("A model of the scheduler") has the source of the tables and the errors of the predictions. HTTP
and the processes of a server are not modelled. Each line of JSON is one load under one bound;
"auto" is the default of CUDA, and "offline" has no streams.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm.cli.bench.workload import draw_requests
from nanovllm.compile.buckets import smallest_fit
from nanovllm.platforms.cuda import TRAITS
from nanovllm.sampling import SamplingParams
from nanovllm.schedule.blocks import BlockPool
from nanovllm.schedule.kv_cache_manager import KVCacheManager
from nanovllm.schedule.plan import StepPlan
from nanovllm.schedule.prefill_latency_bound import PrefillLatencyBound
from nanovllm.schedule.request import Request
from nanovllm.schedule.scheduler import Scheduler
from nanovllm.tools import command_line

NUM_BLOCKS = 12_000  # as many as 8B has on an H200; 0.6B has more, but these loads need fewer
LONG_PROMPT, NUM_STREAMS, LONG_ARRIVES_MS = 32_768, 32, 1_000.0


@dataclass(frozen=True)
class Costs:
    """Milliseconds of a model's steps on a device.

    prefill_ms: of a prefill step without attention, for each bucket of tokens.
    pair_ms: of one query token and one key token in the attention of prompts.
    decode_ms: of a decode step without attention, for each bucket of rows.
    key_ms: of one key token in the attention of a decode step with many rows.
    rates: the share of that speed that a step with so many rows reaches.
    """

    prefill_ms: dict[int, float]
    pair_ms: float
    decode_ms: dict[int, float]
    key_ms: float
    rates: dict[int, float]

    def of(self, plan: StepPlan) -> float:
        if plan.is_prefill:
            bucket = smallest_fit(tuple(self.prefill_ms), sum(plan.num_tokens))
            pairs = sum(n * (end - n / 2) for n, end in zip(plan.num_tokens, plan.seq_lens))
            return self.prefill_ms[bucket] + self.pair_ms * pairs
        num_rows = len(plan.rows)
        rate = float(np.interp(num_rows, tuple(self.rates), tuple(self.rates.values())))
        bucket = smallest_fit(tuple(self.decode_ms), num_rows)
        return self.decode_ms[bucket] + self.key_ms * sum(plan.seq_lens) / rate


RATES = {1: 0.3, 8: 0.57, 32: 0.85, 64: 0.9, 128: 1.0}
COSTS = {
    "Qwen3-0.6B": Costs(
        {32: 1.0, 128: 1.1, 512: 1.7, 1024: 2.5, 2048: 4.2, 4096: 7.8, 8192: 15.2},
        5.0e-7,
        {
            1: 0.62, 2: 0.66, 4: 0.68, 8: 0.7, 16: 0.75, 24: 0.92, 32: 0.93, 48: 0.94, 64: 0.94,
            96: 0.98, 128: 1.0, 160: 1.06, 176: 1.09, 208: 1.12, 224: 1.14, 256: 1.17,
        },
        27.6e-6,
        RATES,
    ),
    "Qwen3-8B": Costs(
        {32: 4.5, 128: 5.2, 512: 12.0, 1024: 23.0, 2048: 44.0, 4096: 87.5, 8192: 174.0},
        1.2e-6,
        {
            1: 4.1, 2: 4.2, 4: 4.2, 8: 4.3, 16: 4.35, 24: 4.5, 32: 4.6, 48: 4.7, 64: 4.75,
            96: 5.1, 128: 5.3, 160: 5.85, 176: 6.2, 208: 6.4, 224: 7.1, 256: 6.85,
        },
        35.5e-6,
        RATES,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Arrival:
    ms: float
    prompt_len: int
    answer_len: int


@dataclass
class Trace:
    """When the tokens of each request are emitted, in milliseconds; and the time of each step."""

    arrivals: Sequence[Arrival]
    token_ms: list[list[float]]
    prefill_ms: list[float] = field(default_factory=list)
    decode_ms: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Throughput, times to first token, gaps. Of a load that ends with a long prompt, the last
        ones are only those between its arrival and its first token."""
        first = [times[0] - one.ms for one, times in zip(self.arrivals, self.token_ms)]
        gaps = np.concatenate([np.diff(times) for times in self.token_ms])
        if self.arrivals[-1].prompt_len == LONG_PROMPT:
            begin, end = self.arrivals[-1].ms, self.token_ms[-1][0]
            ends = np.concatenate([times[1:] for times in self.token_ms])
            gaps, first = gaps[(ends > begin) & (ends - gaps < end)], first[-1:]
        seconds = max(times[-1] for times in self.token_ms) / 1e3
        found = {
            "tokens_per_second": sum(map(len, self.token_ms)) / seconds,
            "first_ms_p50": np.percentile(first, 50), "first_ms_p99": np.percentile(first, 99),
            "gap_ms_p50": np.percentile(gaps, 50), "gap_ms_p99": np.percentile(gaps, 99),
            "gap_ms_worst": gaps.max(),
            "num_prefills": len(self.prefill_ms), "prefill_seconds": sum(self.prefill_ms) / 1e3,
            "num_decodes": len(self.decode_ms), "decode_seconds": sum(self.decode_ms) / 1e3,
        }  # fmt: skip
        return {name: round(float(value), 2) for name, value in found.items()}


def simulate(
    scheduler: Scheduler, costs: Costs, arrivals: Sequence[Arrival], *, streamed: bool
) -> Trace:
    """Run the requests to their ends, as `Engine.advance` does with one step of run-ahead."""
    trace = Trace(arrivals, [[] for _ in arrivals])
    coming, requests = deque(enumerate(arrivals)), dict[int, Request]()
    in_flight: deque[tuple[StepPlan, float]] = deque()
    now = device_ms = 0.0
    while coming or scheduler.has_work:
        while coming and coming[0][1].ms <= now:
            idx, one = coming.popleft()
            requests[idx] = _request(idx, one, streamed)
            scheduler.add(requests[idx])
        plan = scheduler.schedule(may_preempt=not in_flight)
        if plan is not None:
            now += 0.05 + 0.0025 * len(plan.rows)  # of the host: 0.65 ms at 256 rows
            taken_ms = costs.of(plan)
            (trace.prefill_ms if plan.is_prefill else trace.decode_ms).append(taken_ms)
            device_ms = max(device_ms, now) + taken_ms
            in_flight.append((plan, device_ms))
        if in_flight and (plan is None or len(in_flight) > TRAITS.run_ahead):
            done, end_ms = in_flight.popleft()
            now = max(now, end_ms)
            for idx, wanted in zip(done.request_ids, done.is_sampled):
                if wanted:
                    trace.token_ms[idx].append(now)
                    _answer(scheduler, requests[idx])
        elif plan is None:
            now = max(now, coming[0][1].ms)
    return trace


def _request(idx: int, one: Arrival, streamed: bool) -> Request:
    params = SamplingParams(max_tokens=one.answer_len, ignore_eos=True)
    prompt = [0] * one.prompt_len
    return Request(idx, prompt, params, 0, one.answer_len, frozenset(), incremental=streamed)


def _answer(scheduler: Scheduler, request: Request) -> None:
    scheduler.tokens_known(request, 1, [0])
    if len(request.output_ids) == request.max_output:
        scheduler.finish(request, "length")


def new_scheduler(costs: Costs, max_stall_ms: float | None, max_num_seqs: int) -> Scheduler:
    """A scheduler with CUDA's default sizes, and its default bound if `max_stall_ms` is None."""
    stall = PrefillLatencyBound(
        max_stall_ms or TRAITS.max_stall_ms, tuple(costs.prefill_ms.items()), costs.pair_ms
    )
    return Scheduler(
        KVCacheManager(BlockPool(NUM_BLOCKS, TRAITS.block_size, enable_prefix_caching=False)),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=TRAITS.batched_tokens,
        max_decode_rows=TRAITS.decode_rows[-1],
        max_prefill_rows=64,
        stall=stall.in_proportion() if max_stall_ms is None else stall,
    )


def bench_load(num_seqs: int = 256) -> list[Arrival]:
    """The requests of `bench.py`, all at once."""
    prompts, answer_lens = draw_requests(num_seqs, (100, 1024), 151_936)
    return [Arrival(0.0, len(prompt), num) for prompt, num in zip(prompts, answer_lens)]


def rate_load(num: int, per_second: float) -> list[Arrival]:
    """Requests of 128 tokens and answers of 128, at random times."""
    rng, now, found = random.Random(0), 0.0, []
    for _ in range(num):
        now += 1e3 * rng.expovariate(per_second) if per_second < math.inf else 0.0
        found.append(Arrival(now, 128, 128))
    return found


def long_load() -> list[Arrival]:
    """A long prompt that arrives among streams."""
    streams = [Arrival(0.0, 128, 1500)] * NUM_STREAMS
    return [*streams, Arrival(LONG_ARRIVES_MS, LONG_PROMPT, 1)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=[*COSTS], nargs="+", default=[*COSTS])
    add("--max-stall-ms", nargs="+", default=["auto"], metavar="MS", help='numbers, or "auto"')
    args = parser.parse_args()
    loads = {
        "256 requests": bench_load(), "offline": bench_load(),
        "1000 × 128, 20/s": rate_load(1000, 20), "1000 × 128, 50/s": rate_load(1000, 50),
        "1000 × 128 at once": rate_load(1000, math.inf),
        f"{LONG_PROMPT} tokens among {NUM_STREAMS} streams": long_load(),
    }  # fmt: skip
    for shape in args.shape:
        for asked in args.max_stall_ms:
            max_ms = None if asked == "auto" else float(asked)
            for load, arrivals in loads.items():
                scheduler = new_scheduler(COSTS[shape], max_ms, 256 if "8B" in shape else 1024)
                trace = simulate(scheduler, COSTS[shape], arrivals, streamed=load != "offline")
                about = {"shape": shape, "max_stall_ms": asked, "load": load}
                print(json.dumps(about | trace.summary(), ensure_ascii=False), flush=True)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
