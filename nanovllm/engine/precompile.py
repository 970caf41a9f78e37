"""Fills a store without weights: every bucket is built and run once, with one layer of each sort, by several processes.

A process that runs a bucket leaves behind everything that a start of that bucket needs: its programs, and the kernels that
Triton specialises by shapes. What a program is does not depend on how many layers call it, nor on weights, so the model
here is one layer of each window, with random numbers in it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from nanovllm import env, hub, log
from nanovllm.compile.program import CompileRequired
from nanovllm.config import EngineConfig
from nanovllm.engine import artifacts, startup
from nanovllm.engine.runner import Runner
from nanovllm.engine.workers import DONE, Bucket, Outcome, Workers, buckets_of
from nanovllm.models import weights
from nanovllm.models.config import ModelConfig


def fill(config: EngineConfig, count: int | None, progress: Callable[[Outcome, int], object]) -> list[Outcome]:
    """Build every bucket of `config` into its store with `count` processes; `progress(outcome, number of buckets)`.

    None for as many as suit the device: where a step is one program a process has the whole model and sizes the cache by
    the memory that it finds free, so there it is one.

    Raises ValueError for what the options ask and the model or device has not, WorkerFailed, and OSError where the store
    cannot be made or written.
    """
    platform = startup.select_platform(config)
    folder = hub.resolve(config.model, weights=False)
    store = artifacts.open_store(config, env.read(), must_keep=True)
    _, cfg, _ = startup.read_model_config(folder, config, platform, store)
    layout = startup.make_layout(config, cfg, platform)
    platform.prepare(store.folder / "cpp", env.read().cxx)  # the libraries once, not in every process
    buckets = buckets_of(layout)
    if count is None:
        count = 1 if platform.whole_steps else min(8, max(1, (os.cpu_count() or 2) // 2))
    workers = Workers(config, buckets, count)
    try:
        outcomes = workers.wait(lambda outcome: progress(outcome, len(buckets)))
    finally:
        workers.close()
    artifacts.mark_ready(store, platform, config, cfg, layout)
    return outcomes


def small_model(cfg: ModelConfig) -> ModelConfig:
    """The model with one layer of each window: it has all the programs of the whole one."""
    windows = tuple(dict.fromkeys(cfg.layer_windows))
    return replace(cfg, num_layers=len(windows), layer_windows=windows)


def small_runner(config: EngineConfig, compiler_options: dict[str, Any] | None = None) -> Runner:
    """A runner of `small_model` with random weights, the buckets of `config`, and two cache blocks.

    Where a step is one program, that program knows every layer and the size of the cache: there both are the engine's own.
    """
    environment = env.read()
    platform = startup.select_platform(config)
    store = artifacts.open_store(config, environment)
    model, cfg, _ = startup.read_model_config(hub.resolve(config.model, weights=False), config, platform, store)
    platform.prepare(store.folder / "cpp", environment.cxx)
    layout = startup.make_layout(config, cfg, platform)
    small = cfg if platform.whole_steps else small_model(cfg)
    params = weights.random(model, small, platform.device, 0, lambda _: None, config.quantization)
    compiler = startup.make_compiler(config, platform, environment, store)
    if compiler.lowering is None:
        raise CompileRequired(platform.lowering()[1])
    for name, value in (compiler_options or {}).items():
        setattr(compiler, name, value)
    runner = Runner(model, small, params, layout, platform, compiler)
    if platform.whole_steps:
        _, _, _, runner = startup.with_cache(config, layout, cfg, lambda _: runner, platform)
    return runner


def _work() -> None:
    """One process: a line with the options, then a line for every bucket; a line is written for every bucket done."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints, prints to stderr
    log.configure()
    job = sys.stdin.readline()
    if not job:
        return  # started early, and not needed
    config = EngineConfig(**json.loads(job))
    runner = small_runner(config)
    for line in sys.stdin:
        bucket: Bucket = tuple(json.loads(line))
        compiler, kernels = runner.compiler, len(runner.platform.kernels_compiled())
        programs, found = compiler.num_compiled, compiler.num_loaded
        runner.run_bucket(*bucket)
        kernels = len(runner.platform.kernels_compiled()) - kernels
        done = [bucket, compiler.num_compiled - programs, compiler.num_loaded - found, kernels]
        print(DONE + json.dumps(done), file=out, flush=True)


if __name__ == "__main__":
    _work()
