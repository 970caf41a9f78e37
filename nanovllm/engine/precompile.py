"""Fills a store without weights: every bucket is built and run once, with one layer of each sort, by several processes.

A process that runs a bucket leaves behind everything that a start of that bucket needs: its programs, and the kernels that
Triton specialises by shapes. What a program is does not depend on how many layers call it, nor on weights, so the model
here is one layer of each window, with random numbers in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from nanovllm import env, hub, log
from nanovllm.compile.program import CompileRequired
from nanovllm.config import EngineConfig
from nanovllm.engine import artifacts, startup
from nanovllm.engine.runner import Runner
from nanovllm.engine.workers import Bucket, Outcome, Workers, buckets_of
from nanovllm.models import weights
from nanovllm.models.config import ModelConfig
from nanovllm.platforms import Platform


def fill(config: EngineConfig, count: int, progress: Callable[[Outcome, int], object]) -> list[Outcome]:
    """Build every bucket of `config` into its store with `count` processes; `progress(outcome, number of buckets)`.

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


def small_runner(
    config: EngineConfig, compiler_options: dict[str, Any] | None = None, platform: Platform | None = None
) -> Runner:
    """A runner of `small_model` with random weights, the buckets of `config`, and two cache blocks.

    Where a step is one program, that program knows every layer and the size of the cache: there both are the engine's own.
    """
    environment = env.read()
    platform = platform or startup.select_platform(config)
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


def _fork(ends: Sequence[Sequence[int]]) -> bool:
    """Fork a process for each three of pipe ends, which become its stdin, stdout and stderr. In those True; in the process
    that forks False, once all have ended."""
    # so that they need not import it: what tracing needs, symbolic shapes with Dynamo
    from torch._dynamo.source import ConstantSource  # noqa: F401
    from torch.fx.experimental import proxy_tensor, symbolic_shapes  # noqa: F401

    with contextlib.suppress(ImportError):
        from triton.runtime.cache import triton_key

        from nanovllm.kernels import triton_kernels, triton_step  # noqa: F401

        triton_key()  # a digest of all of Triton's files, kept
    for own in ends:
        if os.fork() == 0:
            for target, one in enumerate(own):
                os.dup2(one, target)
            _close(ends)
            return True
    _close(ends)
    silence = os.open(os.devnull, os.O_RDWR)
    os.dup2(silence, 2)  # the first one's, who is the last to hold it from here on
    for _ in ends:
        os.wait()
    return False


def _close(ends: Sequence[Sequence[int]]) -> None:
    for one in (one for three in ends for one in three):
        os.close(one)


def _work(started: float, job: str) -> None:
    """One process: a line with a bucket, and a line back once it is done; before the first a line with the seconds that it
    took to be ready. `started` is the time at which it was spawned."""
    seconds = {"imports": time.time() - started}
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints, prints to stderr
    log.configure()
    lap = time.perf_counter()
    config = EngineConfig(**json.loads(job))
    platform = startup.select_platform(config)
    torch.zeros(1, device=platform.device)  # takes a while on a GPU, and nothing need be known of the model for it
    platform.synchronize()
    seconds["device"] = time.perf_counter() - lap
    print(json.dumps(seconds), file=out, flush=True)
    runner: Runner | None = None
    for line in sys.stdin:
        lap = time.perf_counter()
        bucket: Bucket = tuple(json.loads(line))
        # the config is kept in the store by now, so that transformers is not imported
        runner = runner or small_runner(config, platform=platform)
        compiler, kernels = runner.compiler, len(runner.platform.kernels_compiled())
        programs, found = compiler.num_compiled, compiler.num_loaded
        runner.run_bucket(*bucket)
        kernels = len(runner.platform.kernels_compiled()) - kernels
        numbers = (compiler.num_compiled - programs, compiler.num_loaded - found, kernels)
        print(json.dumps([bucket, *numbers, round(time.perf_counter() - lap, 3)]), file=out, flush=True)


def main() -> None:
    """Arguments: the time at which it was spawned, the options as JSON, and for each process to fork three pipe ends."""
    ends = [[int(one) for one in three.split(",")] for three in sys.argv[3:]]
    if ends and not _fork(ends):
        return
    try:
        _work(float(sys.argv[1]), sys.argv[2])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0)  # nothing is left to do, and taking down torch and the device's libraries would take a second


if __name__ == "__main__":
    main()
