"""A picture of one bucket: its graphs before and after each pass, the kernels that came out, and what each of them costs.

    python -m nanovllm.tools.report_data --model tiny-qwen3 --bs 4 -o report.html

This file knows records: stages of graphs, calls with their times. What fills them, a model on a device, is above this
layer (`nanovllm/engine/picture.py`) and is reached by name when this is run as a program.
"""

from __future__ import annotations

import importlib
import operator
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanovllm.compile.buckets import smallest_fit
from nanovllm.compile.lower.calls import CallList
from nanovllm.tools.costs import cost

if TYPE_CHECKING:
    from torch.fx import GraphModule

REPEATS = 20  # of a call in one measurement


@dataclass(frozen=True)
class Node:
    """One call of a graph, with getitems folded into their readers."""

    name: str
    label: str
    shapes: str
    parents: tuple[str, ...]  # other calls
    inputs: tuple[str, ...]  # the region's inputs and constants, as text
    ours: bool

    @property
    def call(self) -> tuple[str, str, tuple[str, ...]]:
        """What is the same when a pass leaves a call alone; names are not, where the graph was traced again."""
        return self.label, self.shapes, self.inputs


@dataclass(frozen=True)
class Stage:
    name: str
    nodes: tuple[Node, ...]
    code: str

    def shapes_and_calls(self) -> set[tuple[str, str, tuple[str, ...]]]:
        return {node.call for node in self.nodes}


@dataclass(frozen=True)
class Call:
    """One call of a program as measured: seconds of one, and what it moves and computes."""

    op: str
    shapes: str
    seconds: float
    num_bytes: int
    flops: int


@dataclass
class Region:
    """A region of the bucket; `times` is how often a step runs it."""

    name: str
    times: int = 1
    stages: list[Stage] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    lowering: str = ""


@dataclass(frozen=True)
class Limits:
    """Of the device, as measured: bytes per second of a large copy, flops per second of a large product."""

    bandwidth: float
    flops: float

    def seconds(self, call: Call) -> float:
        return max(call.num_bytes / self.bandwidth, call.flops / self.flops)


@dataclass(frozen=True)
class Padding:
    """One bucket's part in a trace of batch sizes."""

    bucket: int
    num_steps: int
    num_rows: int  # asked for

    @property
    def waste(self) -> float:
        return 1 - self.num_rows / (self.num_steps * self.bucket) if self.num_steps else 0.0


@dataclass(frozen=True)
class Report:
    title: str
    facts: dict[str, str]
    limits: Limits
    regions: tuple[Region, ...]
    padding: tuple[Padding, ...]
    trace_name: str


def stage_of(name: str, graph: GraphModule) -> Stage:
    """What a page shows of a graph; taken at once, since passes change graphs in place."""
    reads: dict[Any, list[Any]] = {}
    nodes: list[Node] = []
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is operator.getitem:
            reads[node] = [_source(node.args[0])]
            continue
        parents, inputs = [], []
        for name_of_arg, value in _arguments(node):
            source = _source(value)
            if getattr(source, "op", None) == "call_function":
                parents.append(source.name)
            elif getattr(source, "op", None) == "placeholder":
                inputs.append(source.name)
            elif value is not None:
                inputs.append(f"{name_of_arg} = {value}")
        nodes.append(
            Node(
                node.name,
                str(node.target).removeprefix("nanovllm.").removesuffix(".default"),
                _shapes(node.meta.get("val")),
                tuple(dict.fromkeys(parents)),
                tuple(dict.fromkeys(inputs)),
                str(node.target).startswith("nanovllm."),
            )
        )
    return Stage(name, tuple(nodes), graph.print_readable(print_output=False, include_stride=False))


def measure(
    listed: CallList, inputs: Sequence[Tensor], seconds: Callable[[Callable[[], object]], float]
) -> list[Call]:
    """Make the listed calls one by one and time each by `seconds(call)`, with its real arguments."""
    calls: list[Call] = []

    def visit(op: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        result = op(*args, **kwargs)
        if op is not operator.getitem and not op.is_view:
            num_bytes, flops = cost(op, args, kwargs, result)
            name = str(op).removeprefix("nanovllm.").removesuffix(".default")
            calls.append(
                Call(name, _shapes(result), seconds(lambda: op(*args, **kwargs)), num_bytes, flops)
            )
        return result

    listed.step_through(inputs, visit)
    return calls


def timer(
    record: Callable[[Callable[[], None]], Callable[[], None]], synchronize: Callable[[], None]
) -> Callable[[Callable[[], object]], float]:
    """Seconds of one call, the best of a few replays of `REPEATS` recorded ones."""

    def seconds(call: Callable[[], object]) -> float:
        def repeated() -> None:
            for _ in range(REPEATS):
                call()

        replay = record(repeated)
        best = float("inf")
        for _ in range(5):
            synchronize()
            started = time.perf_counter()
            replay()
            synchronize()
            best = min(best, time.perf_counter() - started)
        return best / REPEATS

    return seconds


def measure_limits(
    device: torch.device, dtype: torch.dtype, seconds: Callable[[Callable[[], object]], float]
) -> Limits:
    """What a copy of 256 MiB and a square product reach; of two products the one that fills the device."""
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    flops = 0.0
    for size in (1024, 8192):
        a = torch.ones(size, size, dtype=dtype, device=device)
        taken = seconds(lambda a=a: a @ a)  # type: ignore[misc]
        flops = max(flops, 2 * size**3 / taken)
        if taken > 1e-3:
            break
    return Limits(bandwidth, flops)


def padding_of(batch_sizes: Sequence[int], ladder: Sequence[int]) -> tuple[Padding, ...]:
    """What a trace of batch sizes fills of each bucket; larger batches run in several steps, as in the engine."""
    steps = dict.fromkeys(ladder, 0)
    rows = dict.fromkeys(ladder, 0)
    for size in batch_sizes:
        while size > 0:
            part = min(size, ladder[-1])
            bucket = smallest_fit(ladder, part)
            steps[bucket] += 1
            rows[bucket] += part
            size -= part
    return tuple(Padding(bucket, steps[bucket], rows[bucket]) for bucket in ladder)


def _arguments(node: Any) -> list[tuple[str, Any]]:
    """(name, value) of a call's arguments, lists taken apart."""
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema else []
    named = [*zip([*names, *map(str, range(len(node.args)))], node.args), *node.kwargs.items()]
    found: list[tuple[str, Any]] = []
    for name, value in named:
        whole = isinstance(value, (list, tuple)) and any(hasattr(item, "op") for item in value)
        found += [(name, item) for item in value] if whole else [(name, value)]
    return found


def _source(value: Any) -> Any:
    """The call or input behind getitems."""
    while getattr(value, "target", None) is operator.getitem:
        value = value.args[0]
    return value


def _shapes(value: Any) -> str:
    if isinstance(value, Tensor):
        short = {"torch.float32": "f32", "torch.bfloat16": "bf16", "torch.float16": "f16", "torch.int64": "i64",
                 "torch.int32": "i32", "torch.bool": "b8"}  # fmt: skip
        return (
            f"{short.get(str(value.dtype), str(value.dtype))}[{', '.join(map(str, value.shape))}]"
        )
    if isinstance(value, (tuple, list)):
        return ", ".join(_shapes(item) for item in value)
    return ""


if __name__ == "__main__":
    # by name: this layer knows no models
    sys.exit(importlib.import_module("nanovllm.tools.report").main())
