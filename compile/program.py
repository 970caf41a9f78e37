"""From region to program: trace, passes, lowering; and the promise that nothing compiles once warm-up is over."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from nanovllm.compile.trace import dump, rebuild, tensors, trace

logger = logging.getLogger(__name__)

Pass = Callable[[GraphModule, Sequence[Tensor]], GraphModule]
Lowering = Callable[[GraphModule, Sequence[Tensor]], Callable[..., Sequence[Tensor]]]


class CompiledAfterWarmUp(RuntimeError):
    """A program was asked for that warm-up did not build."""


@dataclass(frozen=True)
class Program:
    """One compiled region of one bucket. Takes the region's inputs, nested as they were traced."""

    name: str
    run: Callable[..., Sequence[Tensor]]
    result: object  # fake tensors, nested as the region's result is

    def __call__(self, *inputs: object) -> Any:
        return rebuild(self.result, list(self.run(*tensors(inputs))))


@dataclass
class Compiler:
    """Builds programs and keeps them by key. With `lowering` None a region runs as the Python function it is.

    `strict` turns a compile after `seal()` into an error; otherwise it is a warning, since a late answer is better
    than none in production.
    """

    lowering: Lowering | None
    passes: tuple[tuple[str, Pass], ...] = ()
    dump_dir: Path | None = None
    varying: tuple[str, ...] = ()  # see `trace`
    strict: bool = False
    num_compiled: int = 0
    sealed: bool = False
    _programs: dict[tuple[object, ...], Callable[..., Any]] = field(default_factory=dict)

    def program(
        self, name: str, key: tuple[object, ...], function: Callable[..., Any], inputs: dict[str, object]
    ) -> Callable[..., Any]:
        """The program for (name, *key), built on first use from `function` and example `inputs`."""
        full_key = (name, *key)
        known = self._programs.get(full_key)
        if known is None:
            known = self._build("_".join(map(str, full_key)), function, inputs)
            self._programs[full_key] = known
        return known

    def seal(self) -> None:
        """Warm-up is over: from here on every program must already exist."""
        self.sealed = True

    def _build(self, name: str, function: Callable[..., Any], inputs: dict[str, object]) -> Callable[..., Any]:
        if self.lowering is None:
            return function
        if self.sealed:
            message = f"program {name} is compiled after warm-up"
            if self.strict:
                raise CompiledAfterWarmUp(message)
            logger.warning(message)
        started = time.perf_counter()
        graph, fakes, result = trace(function, inputs, varying=self.varying)
        self._dump(graph, name, "0_traced")
        for pass_idx, (pass_name, graph_pass) in enumerate(self.passes, start=1):
            graph = graph_pass(graph, fakes)
            self._dump(graph, name, f"{pass_idx}_{pass_name}")
        run = self.lowering(graph, fakes)
        self.num_compiled += 1
        logger.debug("compiled %s in %.2f s", name, time.perf_counter() - started)
        return Program(name, run, result)

    def _dump(self, graph: GraphModule, name: str, stage: str) -> None:
        if self.dump_dir is not None:
            dump(graph, self.dump_dir / f"{name}.{stage}.py")
