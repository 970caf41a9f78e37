"""The work of a worker: building buckets and compiling kernels into the store.

Running a bucket stores everything that a start needs for it: its programs, and the kernels that
Triton specialises by shapes. With the smallest bucket of rows it is also the plan of decode steps
as one kernel. Programs depend neither on weights nor on the number of layers, so the
model is reduced and its weights are random. A dry run of a bucket, on fake tensors, stores its
programs and lists the kernels that it launches; any worker can then compile them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from nanovllm.compile.lower.calls import CallList
from nanovllm.compile.program import Compiler, CompileRequired, Program
from nanovllm.compile.trace import rebuild, tensors
from nanovllm.config import EngineConfig
from nanovllm.models import loader
from nanovllm.models.experts.offloaded import Offloader
from nanovllm.models.loader import Target
from nanovllm.models.model import Model, Params
from nanovllm.models.shards import Shard
from nanovllm.models.vision import weights
from nanovllm.platforms.base import DryRun, Platform
from nanovllm.platforms.regions import SplitRegion
from nanovllm.runner.pool_runner import PoolRunner
from nanovllm.runner.runner import Runner
from nanovllm.runner.warmup import dry_run_bucket
from nanovllm.startup.build import make_compiler, with_cache
from nanovllm.startup.pooling import for_task
from nanovllm.startup.resolve import ResolvedConfig, resolve_without_weights

logger = logging.getLogger(__name__)


def small_runner(
    resolved: ResolvedConfig,
    compiler_options: dict[str, Any] | None = None,
    mode: AbstractContextManager[object] | None = None,
) -> Runner:
    """A runner of the reduced model with random weights and two cache blocks.

    Where a step is one program, the program depends on the number of layers and the size of the
    cache: there the model is not reduced, and the cache is the engine's. With `mode` tensors are
    made under it, and weights have no numbers. Raises CompileRequired if graphs are impossible on
    this device.
    """
    platform, spec = resolved.platform, resolved.spec
    if spec.draft is not None and spec.draft.model is not None:
        spec = replace(spec, draft=replace(spec.draft, model=spec.draft.model.reduced()))
    model = resolved.model if platform.traits.whole_steps else resolved.model.reduced()
    compiler = _compiler(resolved, compiler_options)
    with mode or nullcontext():
        target = Target(platform.device, shard=Shard(0, model.config.num_ranks))
        if (
            spec.offload is not None
        ):  # the host's experts are on the device as well, since they are small
            host = SplitRegion(platform.device)
            target = target._replace(place=Offloader(spec.offload, host, platform.device))

        def make(one: Model) -> Params:
            return _weights(one, target, has_numbers=mode is None)

        params = make(model)
        if spec.draft is not None and spec.draft.model is not None:
            params = loader.with_second(params, spec.draft.model, make(spec.draft.model))
        params = weights.with_towers(params, model, partial(weights.random, target=target, seed=0))
        runner = Runner(model, params, spec, platform, compiler)
    return with_cache(resolved, lambda _: runner)[0] if platform.traits.whole_steps else runner


def small_pool_runner(
    resolved: ResolvedConfig,
    compiler_options: dict[str, Any] | None = None,
    mode: AbstractContextManager[object] | None = None,
) -> PoolRunner:
    """`small_runner` of a model that pools."""
    model, platform = resolved.model.reduced(), resolved.platform
    compiler = _compiler(resolved, compiler_options)
    with mode or nullcontext():
        target = Target(platform.device, shard=Shard(0, model.config.num_ranks))
        params = _weights(model, target, has_numbers=mode is None)
        params = weights.with_towers(params, model, partial(weights.random, target=target, seed=0))
        return PoolRunner(model, params, resolved.spec, platform, compiler)


def _compiler(resolved: ResolvedConfig, options: dict[str, Any] | None) -> Compiler:
    compiler = make_compiler(resolved)
    if compiler.lowering is None:
        raise CompileRequired(resolved.platform.lowering()[1])
    for name, value in (options or {}).items():
        setattr(compiler, name, value)
    return compiler


def _weights(model: Model, target: Target, *, has_numbers: bool) -> Any:
    """Random weights, or ones without numbers."""
    if has_numbers:
        return loader.random(model, target, 0, lambda _: None)
    return loader.undefined(model, target)


def _dry_run_bucket(runner: Runner | PoolRunner, kind: str, size: int, dry_run: DryRun) -> None:
    if isinstance(runner, PoolRunner):
        runner.dry_run_bucket(size, dry_run)
    else:
        dry_run_bucket(runner, kind, size, dry_run)


class Builder:
    """Does the tasks of one worker.

    It reads the config with the first bucket. By then the store has a copy, so it need not import
    transformers.
    """

    def __init__(self, config: EngineConfig, platform: Platform) -> None:
        self._config, self._platform = config, platform
        self._dry_run = platform.dry_run()

    def do(self, verb: str, what: Any) -> Any:
        """Answer a task: for a kernel its seconds, for a bucket a dict.

        numbers: those of an `Outcome`. kernels: the kernels that a dry-run bucket launches.
        has_run: whether it ran on the device. problem: why it could not be dry-run, or None.
        """
        started = time.perf_counter()
        if verb == "compile":
            assert self._dry_run is not None
            self._dry_run.compile(what)
            return round(time.perf_counter() - started, 3)
        answer = self._run_dry(*what) if verb == "dry_run" else self._run(*what)
        answer["numbers"].append(round(time.perf_counter() - started, 3))
        return answer

    def _run_dry(self, kind: str, size: int) -> dict[str, Any]:
        """Without a dry run, or if it fails, the bucket is run. So are calls of towers:
        Inductor makes their programs, and only running them finds the kernels."""
        dry_run = self._dry_run
        if dry_run is None or kind in ("vision", "audio"):
            return self._run(kind, size)
        dry_run.kernels.clear()
        try:
            fakes = self._fakes
            numbers = self._counted(
                fakes.compiler, lambda: _dry_run_bucket(fakes, kind, size, dry_run)
            )
        except Exception as error:  # code that fails on fake tensors may work on real ones
            logger.debug("%s %d is run, since it cannot be dry-run", kind, size, exc_info=True)
            problem = " ".join(f"{type(error).__name__}: {error}".split())
            return self._run(kind, size, problem)
        kernels = dict(dry_run.kernels)
        return {"numbers": numbers, "kernels": kernels, "has_run": False, "problem": None}

    def _run(self, kind: str, size: int, problem: str | None = None) -> dict[str, Any]:
        runner = self._runner
        numbers = self._counted(runner.compiler, lambda: runner.run_bucket(kind, size))
        return {"numbers": numbers, "kernels": {}, "has_run": True, "problem": problem}

    def _counted(self, compiler: Compiler, build: Callable[[], object]) -> list[float]:
        """Programs compiled, programs found, and kernels compiled by `build`."""

        def counts() -> list[int]:
            num_kernels = len(self._platform.kernels_compiled())
            return [compiler.num_compiled, compiler.num_loaded, num_kernels]

        before = counts()
        build()
        return [after - earlier for earlier, after in zip(before, counts())]

    @cached_property
    def _choice(self) -> ResolvedConfig:
        return for_task(resolve_without_weights(self._config, self._platform))

    @cached_property
    def _runner(self) -> Runner | PoolRunner:
        return self._small()

    @cached_property
    def _fakes(self) -> Runner | PoolRunner:
        assert self._dry_run is not None
        return self._small({"instead": self._call}, self._dry_run.mode)

    def _small(
        self,
        options: dict[str, Any] | None = None,
        mode: AbstractContextManager[object] | None = None,
    ) -> Runner | PoolRunner:
        make = small_runner if self._choice.pooling is None else small_pool_runner
        return make(self._choice, options, mode)

    def _call(self, program: Program, *inputs: object) -> Any:
        """A program's fake result. Raises TypeError if it is not a list of known calls."""
        if not isinstance(program.run, CallList):
            raise TypeError(f"{program.name} is not a call list")
        assert self._dry_run is not None
        result = program.run.step_through(tensors(inputs), self._dry_run.visit)
        return rebuild(program.result, result)
