"""The data of a report on one bucket (`nanovllm.tools.report`): its graphs before and after each
pass, and its calls with their times, bytes and flops."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanovllm.compile.buckets import smallest_fit
from nanovllm.compile.lower.calls import CallList
from nanovllm.tools.costs import cost, tokens_per_expert
from nanovllm.tools.device_limits import DeviceLimits, Work, best_seconds

if TYPE_CHECKING:
    from torch.fx import GraphModule

Timer = Callable[[Work], float]  # the seconds of one call
CALLS_PER_RUN = 20  # one call is too short for the host's clock


@dataclass(frozen=True)
class Node:
    """One call of a graph. A getitem is not a node: its readers read its source."""

    name: str
    label: str
    shapes: str
    parents: tuple[str, ...]  # other calls
    inputs: tuple[str, ...]  # the region's inputs and constants, as text
    ours: bool  # an op of nanovllm's

    @property
    def call(self) -> tuple[str, str, tuple[str, ...]]:
        """Identifies a call across passes. Names change if the graph is traced again."""
        return self.label, self.shapes, self.inputs


@dataclass(frozen=True)
class Stage:
    name: str
    nodes: tuple[Node, ...]
    code: str

    def shapes_and_calls(self) -> set[tuple[str, str, tuple[str, ...]]]:
        return {node.call for node in self.nodes}


@dataclass(frozen=True)
class MeasuredCall:
    """One measured call of a program: its seconds, the bytes it moves and its flops.

    `tokens_per_expert` has an entry for each expert of a call that multiplies by experts.
    """

    op: str
    shapes: str
    seconds: float
    num_bytes: int
    flops: int
    tokens_per_expert: tuple[int, ...] = ()

    def limit(self, limits: DeviceLimits) -> float:
        """The seconds that the device needs at least."""
        return limits.seconds(self.num_bytes, self.flops)


@dataclass
class RegionReport:
    """A region of the bucket. A step runs it `times` times."""

    name: str
    times: int = 1
    stages: list[Stage] = field(default_factory=list)
    calls: list[MeasuredCall] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The time of all calls of one run."""
        return sum(call.seconds for call in self.calls)


@dataclass(frozen=True)
class Padding:
    """The steps of a trace of batch sizes that run in one bucket."""

    bucket: int
    num_steps: int
    num_rows: int  # of requests, without padding

    @property
    def waste(self) -> float:
        return 1 - self.num_rows / (self.num_steps * self.bucket) if self.num_steps else 0.0


@dataclass(frozen=True)
class Report:
    title: str
    facts: dict[str, str]
    limits: DeviceLimits
    regions: tuple[RegionReport, ...]
    padding: tuple[Padding, ...]
    trace_name: str


def stage_of(name: str, graph: GraphModule) -> Stage:
    """The nodes and the code of a graph. Copies them, because passes change graphs in place."""
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
        label, shapes = _label(node.target), _shapes(node.meta.get("val"))
        is_ours = str(node.target).startswith("nanovllm.")
        # every parent and input once, in order
        read = tuple(dict.fromkeys(parents)), tuple(dict.fromkeys(inputs))
        nodes.append(Node(node.name, label, shapes, *read, is_ours))
    return Stage(name, tuple(nodes), graph.print_readable(print_output=False, include_stride=False))


def measure(listed: CallList, inputs: Sequence[Tensor], seconds: Timer) -> list[MeasuredCall]:
    """Make the listed calls one by one. Time each with `seconds(call)` and its real arguments."""
    calls: list[MeasuredCall] = []

    def visit(op: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        result = op(*args, **kwargs)
        if op is not operator.getitem and not op.is_view:
            num_bytes, flops = cost(op, args, kwargs, result)
            taken = seconds(lambda: op(*args, **kwargs))
            per_expert = tokens_per_expert(op, args, kwargs)
            calls.append(
                MeasuredCall(_label(op), _shapes(result), taken, num_bytes, flops, per_expert)
            )
        return result

    listed.step_through(inputs, visit)
    return calls


def timer(
    record: Callable[[Callable[[], None]], Callable[[], None]], synchronize: Callable[[], None]
) -> Timer:
    """A function that returns the seconds of one call: the best of a few replays of
    `CALLS_PER_RUN` calls. `record` captures a function and returns its replay."""

    def seconds(call: Work) -> float:
        def repeated() -> None:
            for _ in range(CALLS_PER_RUN):
                call()

        return best_seconds(record(repeated), synchronize) / CALLS_PER_RUN

    return seconds


def padding_of(batch_sizes: Sequence[int], ladder: Sequence[int]) -> tuple[Padding, ...]:
    """How a trace of batch sizes fills each bucket. A batch larger than the last bucket runs in
    several steps, as in the engine."""
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
    """(name, value) of each argument of a call. A list of nodes gives one pair per item."""
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema else []
    named = [*zip([*names, *map(str, range(len(node.args)))], node.args), *node.kwargs.items()]
    found: list[tuple[str, Any]] = []
    for name, value in named:
        whole = isinstance(value, (list, tuple)) and any(hasattr(item, "op") for item in value)
        found += [(name, item) for item in value] if whole else [(name, value)]
    return found


def _source(value: Any) -> Any:
    """The call or input that a chain of getitems reads from."""
    while getattr(value, "target", None) is operator.getitem:
        value = value.args[0]
    return value


def _label(op: Any) -> str:
    return str(op).removeprefix("nanovllm.").removesuffix(".default")


_SHORT = {
    torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16",
    torch.int64: "i64", torch.int32: "i32", torch.bool: "b8",
}  # fmt: skip


def _shapes(value: Any) -> str:
    if isinstance(value, Tensor):
        dtype = _SHORT.get(value.dtype, str(value.dtype))
        return f"{dtype}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return ", ".join(_shapes(item) for item in value)
    return ""
