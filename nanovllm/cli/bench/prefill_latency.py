"""Measures the gaps between tokens of streams while a long prompt is prefilled: --stall."""

from __future__ import annotations

import argparse
import math
import random
import time
from dataclasses import dataclass, field
from typing import Any

from nanovllm.cli.bench.engines import engine_of, load
from nanovllm.engine.engine import Engine
from nanovllm.sampling import SamplingParams

NUM_STEPS = 100  # in each phase


def measure_prefill_latency(
    args: argparse.Namespace, model: str, max_model_len: int
) -> dict[str, Any]:
    """Milliseconds between two tokens of a stream, as its reader measures them, in three phases:
    before a long prompt arrives, until its first token, and afterwards."""
    llm, about = load(args, model, args.stall_rows + 1, max_model_len)
    engine, rng = engine_of(llm), random.Random(0)
    stall = engine.scheduler.stall
    runs = [
        _Run(engine, rng, max_model_len).measure(args.stall_rows, args.stall)
        for _ in range(args.runs)
    ]
    llm.close()
    prefill_ms = {str(tokens): round(ms, 3) for tokens, ms in stall.step_ms} if stall else None
    return {
        **about,
        "workload": "stall",
        "rows": args.stall_rows,
        "long_prompt_tokens": args.stall,
        "max_stall_ms": round(stall.max_ms, 3) if stall else None,
        "prefill_ms": prefill_ms,
        "attention_ms_per_million": round(1e6 * stall.attention_ms, 4) if stall else None,
        "worst_ms": max(run["during"]["worst"] for run in runs),
        "runs": runs,
    }


@dataclass
class _Run:
    engine: Engine
    rng: random.Random
    max_model_len: int
    last: dict[int, float] = field(default_factory=dict)  # time of each stream's last token
    gaps: dict[str, list[float]] = field(
        default_factory=lambda: {"before": [], "during": [], "after": []}
    )
    long_id: int = -1
    arrived: float = math.inf  # when the long prompt was added
    first: float = math.inf  # when its first token arrived
    is_warm: bool = False

    def measure(self, num_rows: int, long_len: int) -> dict[str, Any]:
        short_len = min(128, self.max_model_len // 4)
        params = SamplingParams(
            temperature=0.6, ignore_eos=True, max_tokens=self.max_model_len - short_len
        )
        for _ in range(num_rows):
            self.last[self.engine.add_request(self._prompt(short_len), params)] = 0.0
        num_started = num_after = 0  # steps since every stream has a token, and since `first`
        while num_after < NUM_STEPS:
            self.is_warm = num_started > NUM_STEPS
            self._step()
            num_started += all(self.last.values())
            num_after += self.first < math.inf
            if self.long_id < 0 and num_started == 2 * NUM_STEPS:
                self.arrived = time.perf_counter()
                self.long_id = self.engine.add_request(
                    self._prompt(long_len), SamplingParams(max_tokens=1, ignore_eos=True)
                )
        self.engine.abort_all(self.last)
        first_token_ms = round(1e3 * (self.first - self.arrived), 2)
        return {"first_token_ms": first_token_ms} | {k: _spread(v) for k, v in self.gaps.items()}

    def _step(self) -> None:
        outputs = self.engine.step()
        now = time.perf_counter()
        for output in outputs:
            if output.completion is not None and output.request_id in self.last:
                raise ValueError(
                    f"a stream ended too early: raise --max-model-len ({self.max_model_len})"
                )
            if output.request_id == self.long_id:
                self.first = min(self.first, now)
            elif self.is_warm:
                begun = self.last[output.request_id]
                during = "during" if begun < self.first else "after"
                phase = "before" if now <= self.arrived else during
                self.gaps[phase].append(1e3 * (now - begun))
            self.last[output.request_id] = now

    def _prompt(self, length: int) -> list[int]:
        vocab_size = self.engine.model_config.vocab_size
        return [self.rng.randrange(min(10000, vocab_size)) for _ in range(length)]


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = {"median": len(ordered) // 2, "p99": len(ordered) * 99 // 100, "worst": -1}
    return {name: round(ordered[idx], 3) for name, idx in at.items()}
