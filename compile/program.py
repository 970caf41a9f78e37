"""From region to program: load its artifact, or trace, run the passes and lower.

A region is a pure function of tensors, such as one layer. A program is one region compiled for one
bucket. An artifact is a program as the store keeps it, or what else is read from graphs. After
warm-up no program is compiled.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from nanovllm.compile.key import Key
from nanovllm.compile.keys import narrowed, program_key
from nanovllm.compile.store import Artifact, Store
from nanovllm.compile.trace import dump, input_leaves, nested_like, nesting, rebuild, tensors, trace

if TYPE_CHECKING:
    from torch.fx import GraphModule

logger = logging.getLogger(__name__)

T = TypeVar("T")
Region = Callable[..., Any]
Pass = Callable[["GraphModule", Sequence[Tensor]], "GraphModule"]
# A program can be stored if the lowering's result has `stored() -> (kind, content)` and the module
# lower/<kind>.py has `load(content)`.
Lowering = Callable[["GraphModule", Sequence[Tensor]], Callable[..., Sequence[Tensor]]]
Watcher = Callable[[str, str, "GraphModule"], None]

LOADABLE = ("calls", "inductor", "torchair")


class CompiledAfterWarmUp(RuntimeError):
    """A step needs a program that warm-up did not build."""


class CompileRequired(RuntimeError):
    """The store lacks artifacts, and compile_cache_mode='require' forbids compiling."""


@dataclass(frozen=True)
class Program:
    """One region compiled for one bucket. Takes the region's inputs, nested as in the trace."""

    name: str
    run: Callable[..., Sequence[Tensor]]
    result: object  # an example of the region's result; only its nesting matters

    def __call__(self, *inputs: object) -> Any:
        return rebuild(self.result, list(self.run(*tensors(inputs))))


@dataclass
class Compiler:
    """Builds programs and keeps them.

    lowering: None runs regions as plain Python.
    dump_dir: the folder to which the graph is written after every stage.
    varying: inputs whose first dimension is symbolic, see `trace`.
    frozen: inputs of regions that are weights or tables: neither their memory nor their values
        change. Their placeholders have `node.meta["frozen"]` when a graph is lowered.
    strict: a compile after `seal()` is an error; otherwise it is a warning, since in production a
        late answer is better than none.
    store: artifacts are loaded from it and saved to it.
    ingredients: the ingredients that the keys of all artifacts share.
    require: compile nothing. Regions without an artifact run as Python until `seal()` lists them.
    watch: called as `watch(program's name, stage, graph)` after every stage.
    instead: called as `instead(program, *inputs)` in place of every program.
    agree: the smallest of a number over all ranks, which need the same programs in the same order:
        one of them compiles, and the others load what it stored.
    is_first: True on the rank that compiles.
    """

    lowering: Lowering | None
    passes: tuple[tuple[str, Pass], ...] = ()
    dump_dir: Path | None = None
    varying: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    strict: bool = False
    store: Store | None = None
    ingredients: Mapping[str, str] = field(default_factory=dict)
    require: bool = False
    watch: Watcher | None = None
    instead: Callable[..., Any] | None = None
    agree: Callable[[int], int] | None = None
    is_first: bool = True
    num_compiled: int = 0
    num_loaded: int = 0
    sealed: bool = False
    missing: list[str] = field(default_factory=list)
    _programs: dict[tuple[object, ...], Callable[..., Any]] = field(default_factory=dict)

    def program(
        self, name: str, key: tuple[object, ...], function: Region, inputs: dict[str, object]
    ) -> Callable[..., Any]:
        """The program (name, *key) of region `function`; `key` holds its bucket and window.

        The first use loads the program, or builds it with example `inputs`.
        """
        full_key = (name, *key)
        known = self._programs.get(full_key)
        if known is None:
            known = self._make("_".join(map(str, full_key)), function, inputs)
            self._programs[full_key] = known
        return known if self.instead is None else partial(self.instead, known)

    def from_store(
        self,
        name: str,
        kind: str,
        reading: Region,
        inputs: Mapping[str, object],
        *,
        sources: Mapping[str, str],
        make: Callable[[], bytes],
        load: Callable[[bytes], T],
    ) -> T:
        """`load(make())`, without `make` if the store has these bytes.

        They depend on `reading`, bound to the regions that it traces, and on `inputs`, as a program
        does on its region and inputs, and on `sources` besides. `kind` is the artifact's. If `load`
        raises ValueError for stored bytes, they are made again with a warning.

        Nothing is compiled: `require` allows it, each rank does it alone, and the graphs are
        neither dumped nor watched.
        """
        store = None if self.lowering is None else self.store
        if store is None:
            return load(make())
        common = {**self.ingredients, **sources}
        key = program_key(reading, inputs, varying=self.varying, common=common)
        found = self._found(name, key, lambda artifact: load(_content(artifact, (kind,))))
        if found is not None:
            return found
        content = make()
        store.save(key, Artifact(name, kind, content, None, dict(key.ingredients)))
        return load(content)

    def observe(self, wrap: Callable[[Program], Callable[..., Any]]) -> None:
        """Replace every program by `wrap(program)`."""
        for key, program in self._programs.items():
            if isinstance(program, Program):
                self._programs[key] = wrap(program)

    def seal(self) -> None:
        """End warm-up: from now on every program must exist.

        Raises CompileRequired if `require` is set and artifacts were missing.
        """
        self.sealed = True
        if self.missing:
            where = self.store.folder if self.store else "no store"
            raise CompileRequired(
                f"{len(self.missing)} program(s) are not in {where}, and compile_cache_mode is "
                "'require':\n  " + "\n  ".join(self.missing)
            )

    def _make(self, name: str, function: Region, inputs: dict[str, object]) -> Region | Program:
        if self.lowering is None:
            if logger.isEnabledFor(logging.DEBUG):
                leaves = [f"{leaf} {_described(tensor)}" for leaf, tensor in input_leaves(inputs)]
                logger.debug("%s runs eagerly: %s", name, ", ".join(leaves))
            return function
        key, found = None, None
        if self.store is not None:
            key = program_key(function, inputs, varying=self.varying, common=self.ingredients)
            # dumps and watchers need the graphs, which only tracing makes
            if self.dump_dir is None and self.watch is None:
                found = self._stored(name, key)
            if self.agree is not None and not self.agree(found is not None):
                found = (
                    None if self.is_first or self.require else self._compiled_by_first(name, key)
                )
        if found is not None:
            return found
        if self.require:
            why = self.store.why_missing(name, key) if self.store and key else "there is no store"
            self.missing.append(f"{name}: {why}")
            return function
        program = self._build(name, function, inputs)
        stored = getattr(program.run, "stored", None)
        if self.store is not None and key is not None and stored is not None:
            kind, content = stored()
            result, ingredients = nesting(program.result), dict(key.ingredients)
            self.store.save(key, Artifact(name, kind, content, result, ingredients))
        if self.store is not None and self.agree is not None and self.is_first:
            self.agree(True)
        return program

    def _compiled_by_first(self, name: str, key: Key) -> Program | None:
        """Wait until the first rank has compiled a program; None if it could not be stored."""
        assert self.agree is not None
        self.agree(True)
        return self._stored(name, key)

    def _stored(self, name: str, key: Key) -> Program | None:
        """The program of an artifact, or None."""

        def load(artifact: Artifact) -> Program:
            content = _content(artifact, LOADABLE)
            lowering = importlib.import_module(f"nanovllm.compile.lower.{artifact.kind}")
            return Program(name, lowering.load(content), nested_like(artifact.result))

        program = self._found(name, key, load)
        self.num_loaded += program is not None
        return program

    def _found(self, name: str, key: Key, load: Callable[[Artifact], T]) -> T | None:
        """What the store has, or None. An artifact that cannot be loaded causes a warning."""
        assert self.store is not None
        artifact = self.store.find(key)
        if artifact is None:
            return None
        try:
            return load(artifact)
        except ValueError as error:
            message = "what is stored as %s cannot be used (%s): making it again"
            logger.warning(message, name, error)
            return None

    def _build(self, name: str, function: Region, inputs: dict[str, object]) -> Program:
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
        owners = [name for name, tree in inputs.items() for _ in tensors(tree)]
        for node, owner in zip(graph.graph.find_nodes(op="placeholder"), owners, strict=True):
            node.meta["frozen"] = owner in self.frozen
        run = self.lowering(graph, fakes)
        self.num_compiled += 1
        logger.debug("compiled %s in %.2f s", name, time.perf_counter() - started)
        return Program(name, run, result)

    def _show(self, graph: GraphModule, name: str, stage: str) -> None:
        if self.dump_dir is not None:
            dump(graph, self.dump_dir / f"{name}.{stage}.py")
        if self.watch is not None:
            self.watch(name, stage, graph)


def _content(artifact: Artifact, kinds: Sequence[str]) -> bytes:
    """Raises ValueError for an artifact of another kind."""
    if artifact.kind not in kinds:
        raise ValueError(f"its kind is {artifact.kind!r}, not one of {', '.join(kinds)}")
    return artifact.content


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} {tensor.device}"
