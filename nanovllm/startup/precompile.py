"""Fills a store ahead of time: runs every bucket once, with random weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing

from nanovllm.config import EngineConfig
from nanovllm.startup.artifacts import mark_ready
from nanovllm.startup.compile_farm.farm import CompileFarm
from nanovllm.startup.compile_farm.tasks import BuildOutcome
from nanovllm.startup.pooling import for_task
from nanovllm.startup.resolve import ResolvedConfig, resolve_without_weights


def fill(
    config: EngineConfig,
    count: int | None,
    progress: Callable[[BuildOutcome, int], object],
    begin: Callable[[ResolvedConfig], object] = lambda resolved: None,
) -> list[BuildOutcome]:
    """Build every bucket of `config` into its store; `progress(outcome, number of buckets)` each.

    `begin` is called before, with the choice for the options.
    count: worker processes; None for the device's default. It is 1 where a step is one program:
    that worker has the whole model, and sizes the cache by the free memory.

    Raises ValueError for options that model or device do not support, WorkerFailed, and OSError for
    a store that cannot be made or written.
    """
    # compiles C++ libraries, which workers then find
    resolved = for_task(resolve_without_weights(config, must_keep=True))
    buckets = resolved.spec.layout.buckets
    begin(resolved)
    if count is None:
        halved = min(8, max(1, (os.cpu_count() or 2) // 2))
        count = 1 if resolved.platform.traits.whole_steps else halved
    with closing(CompileFarm(config)) as farm:
        farm.build(buckets, count)
        outcomes = farm.wait(lambda outcome: progress(outcome, len(buckets)))
    mark_ready(resolved)
    return outcomes
