"""From region to program: the stored artifact, or trace, passes, lowering; and the promise that nothing compiles once
warm-up is over."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nanovllm.compile.keys import Key, narrowed, program_key
from nanovllm.compile.store import Artifact, Store
from nanovllm.compile.trace import dump, named_leaves, nested_like, nesting, rebuild, tensors, trace

if TYPE_CHECKING:
    from torch.fx import GraphModule

logger = logging.getLogger(__name__)

Pass = Callable[["GraphModule", Sequence[Tensor]], "GraphModule"]
# What a lowering returns can be stored if it has `stored() -> (kind, bytes)`, and lower/<kind>.py a `load(bytes)`.
Lowering = Callable[["GraphModule", Sequence[Tensor]], Callable[..., Sequence[Tensor]]]
Watcher = Callable[[str, str, "GraphModule"], None]

LOADABLE = ("plan", "inductor", "torchair")


class CompiledAfterWarmUp(RuntimeError):
    """A program was asked for that warm-up did not build."""


class CompileRequired(RuntimeError):
    """Something would have to be compiled, and the engine was told to take everything from its store."""


@dataclass(frozen=True)
class Program:
    """One compiled region of one bucket. Takes the region's inputs, nested as they were traced."""

    name: str
    run: Callable[..., Sequence[Tensor]]
    result: (
        object  # tensors, nested as the region's result is; their values and shapes do not matter
    )

    def __call__(self, *inputs: object) -> Any:
        return rebuild(self.result, list(self.run(*tensors(inputs))))


@dataclass
class Compiler:
    """Builds programs and keeps them by key. With `lowering` None a region runs as the Python function it is.

    With a `store` programs come from there, and go there once built; `ingredients` is what their keys have in common.
    `require` forbids building: the regions stand in for what is missing, so that `seal()` can name all of it.
    `strict` turns a compile after `seal()` into an error; otherwise it is a warning, since a late answer is better
    than none in production. `watch(program, stage, graph)` sees the graph after every stage; `instead(program, *inputs)` is
    called in the place of every program.
    """

    lowering: Lowering | None
    passes: tuple[tuple[str, Pass], ...] = ()
    dump_dir: Path | None = None
    varying: tuple[str, ...] = ()  # see `trace`
    strict: bool = False
    store: Store | None = None
    ingredients: Mapping[str, str] = field(default_factory=dict)
    require: bool = False
    watch: Watcher | None = None
    instead: Callable[..., Any] | None = None
    num_compiled: int = 0
    num_loaded: int = 0
    sealed: bool = False
    missing: list[str] = field(default_factory=list)
    _programs: dict[tuple[object, ...], Callable[..., Any]] = field(default_factory=dict)

    def program(
        self,
        name: str,
        key: tuple[object, ...],
        function: Callable[..., Any],
        inputs: dict[str, object],
    ) -> Callable[..., Any]:
        """The program for (name, *key), loaded or built on first use from `function` and example `inputs`."""
        full_key = (name, *key)
        known = self._programs.get(full_key)
        if known is None:
            known = self._make("_".join(map(str, full_key)), function, inputs)
            self._programs[full_key] = known
        return known if self.instead is None else partial(self.instead, known)

    def observe(self, wrap: Callable[[Program], Callable[..., Any]]) -> None:
        """Put what `wrap` makes of it in the place of every program that there is."""
        for key, program in self._programs.items():
            if isinstance(program, Program):
                self._programs[key] = wrap(program)

    def seal(self) -> None:
        """Warm-up is over: from here on every program must already exist. Raises CompileRequired for what is missing."""
        self.sealed = True
        if self.missing:
            where = self.store.folder if self.store else "no store"
            raise CompileRequired(
                f"{len(self.missing)} program(s) are not in {where}, and compile_cache_mode is 'require':\n  "
                + "\n  ".join(self.missing)
            )

    def _make(
        self, name: str, function: Callable[..., Any], inputs: dict[str, object]
    ) -> Callable[..., Any]:
        if self.lowering is None:
            if logger.isEnabledFor(logging.DEBUG):
                leaves = [
                    leaf
                    for tree_name, tree in inputs.items()
                    for leaf in named_leaves(tree_name, tree)
                ]
                logger.debug(
                    "%s runs eagerly: %s",
                    name,
                    ", ".join(f"{leaf} {_described(t)}" for leaf, t in leaves),
                )
            return function
        key = None
        if self.store is not None:
            key = program_key(function, inputs, varying=self.varying, common=self.ingredients)
            # whoever wants to see graphs needs them made
            if self.dump_dir is None and self.watch is None and (found := self._stored(name, key)):
                return found
        if self.require:
            why = self.store.why_missing(name, key) if self.store and key else "there is no store"
            self.missing.append(f"{name}: {why}")
            return function
        program = self._build(name, function, inputs)
        stored = getattr(program.run, "stored", None)
        if self.store is not None and key is not None and stored is not None:
            kind, content = stored()
            ingredients = dict(key.ingredients)
            self.store.save(
                key, Artifact(name, kind, content, nesting(program.result), ingredients)
            )
        return program

    def _stored(self, name: str, key: Key) -> Program | None:
        """The program as an earlier start left it, or None; what cannot be read is reported and made again."""
        assert self.store is not None
        artifact = self.store.find(key)
        if artifact is None:
            return None
        try:
            if artifact.kind not in LOADABLE:
                raise ValueError(
                    f"it is of kind {artifact.kind!r}, not one of {', '.join(LOADABLE)}"
                )
            run = importlib.import_module(f"nanovllm.compile.lower.{artifact.kind}").load(
                artifact.content
            )
            program = Program(name, run, nested_like(artifact.result))
        except ValueError as error:
            logger.warning(
                "the stored program %s cannot be used (%s): it is made again", name, error
            )
            return None
        self.num_loaded += 1
        return program

    def _build(self, name: str, function: Callable[..., Any], inputs: dict[str, object]) -> Program:
        assert self.lowering is not None
        if self.sealed:
            message = f"program {name} is compiled after warm-up"
            if self.strict:
                raise CompiledAfterWarmUp(message)
            logger.warning(message)
        started = time.perf_counter()
        graph, fakes, result = trace(narrowed(function), inputs, varying=self.varying)
        self._show(graph, name, "0_traced")
        for pass_idx, (pass_name, graph_pass) in enumerate(self.passes, start=1):
            graph = graph_pass(graph, fakes)
            self._show(graph, name, f"{pass_idx}_{pass_name}")
        run = self.lowering(graph, fakes)
        self.num_compiled += 1
        logger.debug("compiled %s in %.2f s", name, time.perf_counter() - started)
        return Program(name, run, result)

    def _show(self, graph: GraphModule, name: str, stage: str) -> None:
        if self.dump_dir is not None:
            dump(graph, self.dump_dir / f"{name}.{stage}.py")
        if self.watch is not None:
            self.watch(name, stage, graph)


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} {tensor.device}"
