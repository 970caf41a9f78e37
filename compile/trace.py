"""Trace a region and example inputs to a readable FX graph.

Shapes are static, placeholders are named after the inputs, and our ops stay whole.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch._subclasses import FakeTensorMode
    from torch.fx import GraphModule

# Functions below import torch's tracing: it imports sympy, which loading artifacts does not need.


def named_leaves(name: str, tree: object) -> list[tuple[str, Tensor]]:
    """The tensors of a nested (Named)tuple and their paths: `batch.slot_T` gives "batch_slot_T".

    A tuple may hold ints too, such as sizes: they are static, and `static_leaves` gives them.
    """
    if isinstance(tree, Tensor):
        return [(name, tree)]
    if tree is None or isinstance(tree, int):
        return []
    if not isinstance(tree, tuple):
        found = type(tree).__name__
        raise TypeError(
            f"input {name!r} is a {found}: regions take tensors, ints, None and tuples of them"
        )
    fields = getattr(tree, "_fields", range(len(tree)))
    return [leaf for key, part in zip(fields, tree) for leaf in named_leaves(f"{name}_{key}", part)]


def input_leaves(inputs: Mapping[str, object]) -> list[tuple[str, Tensor]]:
    """The tensors of a region's inputs and their paths, in the order that a program takes."""
    return [leaf for name, tree in inputs.items() for leaf in named_leaves(name, tree)]


def static_leaves(name: str, tree: object) -> list[tuple[str, int]]:
    """The ints of a nested (Named)tuple and their paths."""
    if isinstance(tree, int):
        return [(name, tree)]
    if not isinstance(tree, tuple):
        return []
    fields = getattr(tree, "_fields", range(len(tree)))
    return [x for key, part in zip(fields, tree) for x in static_leaves(f"{name}_{key}", part)]


def classes(name: str, tree: object) -> list[tuple[str, str]]:
    """The named tuples in a tree: their paths and the names of their classes."""
    if not isinstance(tree, tuple):
        return []
    fields = getattr(tree, "_fields", None)
    own = [] if fields is None else [(name, f"{type(tree).__module__}:{type(tree).__qualname__}")]
    numbered = zip(range(len(tree)) if fields is None else fields, tree)
    return own + [one for key, part in numbered for one in classes(f"{name}_{key}", part)]


def tensors(tree: object) -> list[Tensor]:
    """The tensors alone, in the order that a program takes."""
    found: list[Tensor] = []
    _gather(tree, found)
    return found


def _gather(tree: object, found: list[Tensor]) -> None:
    if isinstance(tree, tuple):
        for value in tree:  # most are tensors: steps on a CPU wait for this
            if isinstance(value, Tensor):
                found.append(value)
            elif value is not None:
                _gather(value, found)
    elif isinstance(tree, Tensor):
        found.append(tree)
    else:
        assert tree is None or isinstance(tree, int), type(tree)


def rebuild(tree: object, leaves: list[Tensor]) -> object:
    """`tree` with its tensors replaced by the first of `leaves`, which are removed from it."""
    if isinstance(tree, Tensor):
        return leaves.pop(0)
    if isinstance(tree, tuple):
        values: list[Any] = [rebuild(value, leaves) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    return tree


def nesting(tree: object) -> Any:
    """The nesting of a region's result as JSON: "tensor", None, or [name of tuple class, parts]."""
    if isinstance(tree, Tensor):
        return "tensor"
    if isinstance(tree, tuple):
        name = f"{type(tree).__module__}:{type(tree).__qualname__}"
        return [name, [nesting(value) for value in tree]]
    assert tree is None, type(tree)
    return None


def nested_like(written: Any) -> object:
    """A tree with this `nesting`, for `rebuild`.

    Raises ValueError unless the modules of all its classes are already imported.
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
        raise ValueError(f"{written!r} is not a tuple class of an imported module") from error


_LEAF = torch.empty(0)


def trace(
    function: Callable[..., Any], inputs: dict[str, object], *, varying: Sequence[str] = ()
) -> tuple[GraphModule, list[Tensor], object]:
    """Trace `function(*inputs.values())`.

    Returns the graph, the fake tensors of its placeholders, and the nested fake result. The graph
    takes the leaves of `inputs` in order and returns a flat tuple of tensors. Tracing replaces the
    inputs by fakes of their shapes, strides, dtypes and devices: it computes nothing and takes no
    memory.

    The first dimension of leaves whose names end in one of `varying` is symbolic, such as the
    number of cache blocks; all other dimensions are static.
    """
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    leaves = input_leaves(inputs)
    trees = tuple(inputs.values())

    results: list[object] = []

    def flat(*args: Tensor) -> tuple[Tensor, ...]:
        remaining = list(args)
        results.append(function(*(rebuild(tree, remaining) for tree in trees)))
        return tuple(tensors(results[-1]))

    fake_mode = FakeTensorMode(shape_env=ShapeEnv())
    endings = tuple(varying)
    fakes = [_fake(fake_mode, leaf, name, name.endswith(endings)) for name, leaf in leaves]
    graph = make_traced(flat, fakes, fake_mode)
    name_placeholders(graph, [name for name, _ in leaves])
    return graph, fakes, results[-1]


def _fake(fake_mode: FakeTensorMode, tensor: Tensor, name: str, varies: bool) -> Tensor:
    if not varies:
        # each in a separate storage: Inductor treats inputs that share a storage as aliases
        with fake_mode:
            sizes, strides = tensor.shape, tensor.stride()
            return torch.empty_strided(sizes, strides, dtype=tensor.dtype, device=tensor.device)
    # Importing Dynamo fixes the folder of Inductor's cache, so import it as late as possible.
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    dims = [DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * (tensor.dim() - 1)]
    context: Any = StatelessSymbolicContext(dynamic_sizes=dims)
    return fake_mode.from_tensor(tensor, symbolic_context=context, source=ConstantSource(name))


def make_traced(
    function: Callable[..., Any], fakes: Sequence[Tensor], fake_mode: FakeTensorMode
) -> GraphModule:
    """Call `make_fx` under a fake mode, without autograd, and remove dead code."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with fake_mode, torch.no_grad():
        graph = make_fx(function, _allow_non_fake_inputs=True)(*fakes)
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
    """Write the graph as Python code, with shapes and dtypes as annotations."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    text = graph.print_readable(print_output=False, include_stride=False)
    # make_fx names the class "<lambda>", which is not an identifier
    path.write_text(text.replace("<lambda>", path.name.partition(".")[0], 1))
