"""Fills a store without weights: every bucket is built once, with one layer of each sort, by several processes.

A process that runs a bucket leaves behind everything that a start of that bucket needs: its programs, and the kernels that
Triton specialises by shapes. Programs do not depend on how many layers call them, nor on weights, so the model here is
the reduced one (`Model.reduced`) with random weights. To rehearse a bucket, on fake tensors, leaves its programs and names
the kernels, which any process can then compile.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch

from nanovllm import env, hub, log
from nanovllm.compile.lower.calls import CallList
from nanovllm.compile.program import Compiler, CompileRequired, Program
from nanovllm.compile.trace import rebuild, tensors, trace
from nanovllm.config import EngineConfig
from nanovllm.models import loader as weights
from nanovllm.platforms import preload
from nanovllm.platforms.base import Platform
from nanovllm.runner.runner import Runner
from nanovllm.startup import artifacts
from nanovllm.startup import load as startup
from nanovllm.startup.compile_farm.processes import ANSWER
from nanovllm.startup.compile_farm.workers import Outcome, Workers, buckets_of

logger = logging.getLogger(
    "nanovllm.startup.compile_farm.builder"
)  # also where this is the program


def fill(
    config: EngineConfig, count: int | None, progress: Callable[[Outcome, int], object]
) -> list[Outcome]:
    """Build every bucket of `config` into its store with `count` processes; `progress(outcome, number of buckets)`.

    None for as many as suit the device: where a step is one program a process has the whole model and sizes the cache by
    the memory that it finds free, so there it is one.

    Raises ValueError for what the options ask and the model or device has not, WorkerFailed, and OSError where the store
    cannot be made or written.
    """
    platform = startup.select_platform(config)
    folder = hub.resolve(config.model, weights=False)
    store = artifacts.open_store(config, env.read(), must_keep=True)
    model, _ = startup.read_model(folder, config, platform, store)
    spec = startup.make_spec(config, model, platform)
    platform.prepare(
        store.folder / "cpp", env.read().cxx
    )  # the libraries once, not in every process
    buckets = buckets_of(spec.layout)
    if count is None:
        count = 1 if platform.traits.whole_steps else min(8, max(1, (os.cpu_count() or 2) // 2))
    workers = Workers(config, buckets, count)
    try:
        outcomes = workers.wait(lambda outcome: progress(outcome, len(buckets)))
    finally:
        workers.close()
    artifacts.mark_ready(store, platform, config, model, spec)
    return outcomes


def small_runner(
    config: EngineConfig,
    compiler_options: dict[str, Any] | None = None,
    platform: Platform | None = None,
    mode: AbstractContextManager[object] | None = None,
) -> Runner:
    """A runner of the reduced model with random weights, the buckets of `config`, and two cache blocks; its tensors made
    under `mode`, which may be one for fake ones.

    Where a step is one program, that program knows every layer and the size of the cache: there both are the engine's own.
    """
    environment = env.read()
    platform = platform or startup.select_platform(config)
    store = artifacts.open_store(config, environment)
    folder = hub.resolve(config.model, weights=False)
    model, _ = startup.read_model(folder, config, platform, store)
    spec = startup.make_spec(config, model, platform)
    platform.prepare(store.folder / "cpp", environment.cxx)
    small = model if platform.traits.whole_steps else model.reduced()
    compiler = startup.make_compiler(config, platform, environment, model, store)
    if compiler.lowering is None:
        raise CompileRequired(platform.lowering()[1])
    for name, value in (compiler_options or {}).items():
        setattr(compiler, name, value)
    with mode or contextlib.nullcontext():
        params = weights.random(small, platform.device, 0, lambda _: None, spec.weight_format)
        runner = Runner(small, params, spec, platform, compiler)
    if platform.traits.whole_steps:
        _, _, runner = startup.with_cache(config, spec, model, lambda _: runner, platform)
    return runner


class Builder:
    """Does the tasks of one process. Its runners are made with the first bucket: by then the config is in the store, so that
    transformers is not imported."""

    def __init__(self, config: EngineConfig, platform: Platform) -> None:
        self._config, self._platform = config, platform
        self._rehearsal = platform.rehearsal()

    def do(self, verb: str, what: Any) -> Any:
        """Of a kernel the seconds that it took; of a bucket the numbers of an `Outcome`, the kernels that were found, whether
        the device has run it, and, where it was to be rehearsed and could not, why."""
        started = time.perf_counter()
        if verb == "compile":
            assert self._rehearsal is not None
            self._rehearsal.compile(what)
            return round(time.perf_counter() - started, 3)
        numbers, kernels, has_run, problem = self._bucket(verb, *what)
        numbers.append(round(time.perf_counter() - started, 3))
        return {"numbers": numbers, "kernels": kernels, "has_run": has_run, "problem": problem}

    def _bucket(
        self, verb: str, kind: str, size: int
    ) -> tuple[list[float], dict[str, int], bool, str | None]:
        problem = None
        if verb == "rehearse" and self._rehearsal is not None:
            rehearsal = self._rehearsal
            rehearsal.kernels.clear()
            try:
                numbers = self._counted(
                    self._fakes.compiler, lambda: self._fakes.rehearse_bucket(kind, size, rehearsal)
                )
                return numbers, dict(rehearsal.kernels), False, None
            except Exception as error:  # whatever does not go on fake tensors goes on real ones
                logger.debug(
                    "%s %d is run, since it cannot be rehearsed", kind, size, exc_info=True
                )
                problem = " ".join(f"{type(error).__name__}: {error}".split())
        return (
            self._counted(self._runner.compiler, lambda: self._runner.run_bucket(kind, size)),
            {},
            True,
            problem,
        )

    def _counted(self, compiler: Compiler, build: Callable[[], object]) -> list[float]:
        """Programs compiled, programs found, and kernels compiled by `build`."""
        programs, found, kernels = (
            compiler.num_compiled,
            compiler.num_loaded,
            len(self._platform.kernels_compiled()),
        )
        build()
        return [
            compiler.num_compiled - programs,
            compiler.num_loaded - found,
            len(self._platform.kernels_compiled()) - kernels,
        ]

    @cached_property
    def _runner(self) -> Runner:
        return small_runner(self._config, platform=self._platform)

    @cached_property
    def _fakes(self) -> Runner:
        assert self._rehearsal is not None
        return small_runner(
            self._config, {"instead": self._call}, self._platform, self._rehearsal.mode
        )

    def _call(self, program: Program, *inputs: object) -> Any:
        """A program's fake result. Raises TypeError if it is not a list of known calls."""
        if not isinstance(program.run, CallList):
            raise TypeError(f"{program.name} is not a call list")
        assert self._rehearsal is not None
        return rebuild(
            program.result, program.run.step_through(tensors(inputs), self._rehearsal.visit)
        )


def _fork(config: EngineConfig, ends: Sequence[Sequence[int]]) -> bool:
    """Fork as many processes as stdin says, none if it ends without a word; three of pipe ends become the stdin, stdout and
    stderr of each. In those True; in the process that forks False, once all have ended."""
    preload.import_compilers()
    trace(
        lambda x: x + 1, {"x": torch.zeros(2, 2)}, varying=("x",)
    )  # the first makes tables that the others use
    with contextlib.suppress(
        OSError, ValueError
    ):  # a store that cannot be used: the process that asks says so
        artifacts.open_store(config, env.read(), must_keep=True)
        preload.build_driver()
    gc.freeze()  # collecting would write to every object, and so copy all memory for each process
    wanted = ends[
        : int(os.read(0, 16) or 0)
    ]  # not by `sys.stdin`, which the forks use and which reads ahead
    for own in wanted:
        if os.fork() == 0:
            for target, one in enumerate(own):
                os.dup2(one, target)
            _close(ends)
            return True
    _close(ends)
    silence = os.open(os.devnull, os.O_RDWR)
    os.dup2(silence, 2)  # the first one's, who is the last to hold it from here on
    for _ in wanted:
        os.wait()
    return False


def _close(ends: Sequence[Sequence[int]]) -> None:
    for one in (one for three in ends for one in three):
        os.close(one)


def _work(started: float, config: EngineConfig) -> None:
    """One process: a line with a bucket, and a line back once it is done; before the first a line with the seconds that it
    took to be ready. `started` is the time at which it was spawned."""
    seconds = {"imports": time.time() - started}
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints, prints to stderr
    log.configure()
    lap = time.perf_counter()
    platform = startup.select_platform(config)
    # What can be done before anything is known of the model. No context of the device: who only rehearses and compiles needs
    # none, and to end fourteen takes two seconds, for which the first process has to wait.
    platform.prepare(artifacts.open_store(config, env.read()).folder / "cpp", env.read().cxx)
    seconds["device"] = time.perf_counter() - lap
    print(ANSWER + json.dumps(seconds), file=out, flush=True)
    builder = Builder(config, platform)
    for line in sys.stdin:
        print(ANSWER + json.dumps(builder.do(*json.loads(line))), file=out, flush=True)


def main() -> None:
    """Arguments: the time at which it was spawned, the options as JSON, and for each process that it may fork three pipe
    ends."""
    config = EngineConfig(**json.loads(sys.argv[2]))
    ends = [[int(one) for one in three.split(",")] for three in sys.argv[3:]]
    if ends and not _fork(config, ends):
        return
    try:
        _work(float(sys.argv[1]), config)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(
            0
        )  # nothing is left to do, and taking down torch and the device's libraries would take a second


if __name__ == "__main__":
    main()
