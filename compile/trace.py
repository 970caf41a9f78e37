"""One readable FX graph from a pure function and example inputs: static shapes, named placeholders, our ops kept whole."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch._subclasses import FakeTensorMode
    from torch.fx import GraphModule

# What tracing needs of torch is imported where it is used: a start whose programs are all stored does without sympy.


def named_leaves(name: str, tree: object) -> list[tuple[str, Tensor]]:
    """The tensors of a nested (Named)tuple, each with the path to it: `batch.pos_T` becomes ("batch_pos_T", tensor)."""
    if isinstance(tree, Tensor):
        return [(name, tree)]
    if tree is None:
        return []
    if not isinstance(tree, tuple):
        raise TypeError(
            f"input {name!r} is a {type(tree).__name__}: regions take tensors, None and tuples of them"
        )
    fields = getattr(tree, "_fields", range(len(tree)))
    return [
        leaf
        for field, value in zip(fields, tree)
        for leaf in named_leaves(f"{name}_{field}", value)
    ]


def tensors(tree: object) -> list[Tensor]:
    """The leaves alone, in the order in which a traced region takes them."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, tuple):
        return [leaf for value in tree for leaf in tensors(value)]
    assert tree is None, type(tree)
    return []


def rebuild(tree: object, leaves: list[Tensor]) -> object:
    """`tree` with its tensors replaced by `leaves`, taken from the front."""
    if isinstance(tree, Tensor):
        return leaves.pop(0)
    if isinstance(tree, tuple):
        values: list[Any] = [rebuild(value, leaves) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    return None


def nesting(tree: object) -> Any:
    """How a region's result is nested, as JSON: "tensor", None, or [name of the tuple's class, parts]."""
    if isinstance(tree, Tensor):
        return "tensor"
    if isinstance(tree, tuple):
        return [
            f"{type(tree).__module__}:{type(tree).__qualname__}",
            [nesting(value) for value in tree],
        ]
    assert tree is None, type(tree)
    return None


def nested_like(written: Any) -> object:
    """A tree that `nesting` writes like this, for `rebuild`. Only classes that are loaded anyway are taken.

    Raises ValueError where there is no such class.
    """
    if written is None:
        return None
    if written == "tensor":
        return _LEAF
    try:
        name, parts = written
        module, _, qualname = name.partition(":")
        found: Any = tuple if name == "builtins:tuple" else getattr(sys.modules[module], qualname)
        assert issubclass(found, tuple)
        values = [nested_like(part) for part in parts]
        return found(*values) if hasattr(found, "_fields") else tuple(values)
    except (KeyError, AttributeError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"{written!r} names no tuple class that is loaded") from error


_LEAF = torch.empty(0)


def trace(
    function: Callable[..., Any], inputs: dict[str, object], *, varying: Sequence[str] = ()
) -> tuple[GraphModule, list[Tensor], object]:
    """Trace `function(*inputs.values())`; returns the graph, the fakes of its placeholders, and the nested fake result.

    Nothing is computed and no memory is taken: real tensors among the inputs are replaced by fakes of their shape,
    strides, dtype and device. The graph takes the leaves of `inputs` in order and returns a flat tuple of tensors.
    Leaves whose names end in one of `varying` may have any first dimension when the program runs (the cache's number of
    blocks, say, which is no reason to compile again); all other dimensions are static.
    """
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    leaves = [leaf for name, tree in inputs.items() for leaf in named_leaves(name, tree)]
    trees = tuple(inputs.values())

    results: list[object] = []

    def flat(*args: Tensor) -> tuple[Tensor, ...]:
        remaining = list(args)
        results.append(function(*(rebuild(tree, remaining) for tree in trees)))
        return tuple(tensors(results[-1]))

    fake_mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [
        _fake(fake_mode, tensor, name, name.endswith(tuple(varying))) for name, tensor in leaves
    ]
    graph = make_traced(flat, fakes, fake_mode)
    name_placeholders(graph, [name for name, _ in leaves])
    return graph, fakes, results[-1]


def _fake(fake_mode: FakeTensorMode, tensor: Tensor, name: str, varies: bool) -> Tensor:
    if not varies:
        # a tensor of its own: Inductor would treat inputs that are views of one storage as aliases
        with fake_mode:
            return torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
            )
    # Dynamo, on import, settles where Inductor keeps its compiled code.
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    dims = [DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * (tensor.dim() - 1)]
    context: Any = StatelessSymbolicContext(dynamic_sizes=dims)
    return fake_mode.from_tensor(tensor, symbolic_context=context, source=ConstantSource(name))


def make_traced(
    function: Callable[..., Any],
    fakes: Sequence[Tensor],
    fake_mode: FakeTensorMode,
    decompositions: dict[Any, Callable[..., Any]] | None = None,
) -> GraphModule:
    """`make_fx` under one fake mode, without autograd; dead code removed."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with fake_mode, torch.no_grad():
        graph = make_fx(
            function, decomposition_table=decompositions or {}, _allow_non_fake_inputs=True
        )(*fakes)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def name_placeholders(graph: GraphModule, names: Sequence[str]) -> None:
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    assert len(placeholders) == len(names), (len(placeholders), len(names))
    for node, name in zip(placeholders, names):
        clean = re.sub(r"\W", "_", name)
        node._rename(clean)
        node.target = node.name
    graph.recompile()


def dump(graph: GraphModule, path: Path) -> None:
    """Write the graph as the Python it is, with shapes and dtypes as annotations."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    text = graph.print_readable(print_output=False, include_stride=False)
    # make_fx names the class "<lambda>", which is no Python
    path.write_text(text.replace("<lambda>", path.name.partition(".")[0], 1))
