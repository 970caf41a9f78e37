"""An artifact's key: everything that can change what lowering produces, and nothing else.

A start that finds its artifacts does not trace, so the key cannot be the graph. It holds everything
that determines the graph: the region and its bound arguments, the shapes of its inputs, the sources
that make programs, the versions of libraries, and the platform's description of the device. Paths,
times and environment variables are not part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from nanovllm.compile.key import Key
from nanovllm.compile.trace import classes, input_leaves, static_leaves

ROOT = Path(__file__).resolve().parent
# The files of compile/ that make programs, and those that make plans of one kernel besides. The
# others choose buckets, name programs and store them, or use a plan at each start.
MAKING = ("trace.py", "program.py", "passes/*.py", "lower/*.py")
PLANNING = tuple(f"lower/persistent/{name}.py" for name in ("graph_reader", "plan", "stored_plan"))


def program_key(
    function: Callable[..., Any],
    inputs: Mapping[str, object],
    *,
    varying: Sequence[str],
    common: Mapping[str, str],
) -> Key:
    """The key of a region's program for example `inputs`.

    `common` holds the ingredients that all programs of a start share; for `varying` see `trace`.
    """
    leaves, endings = input_leaves(inputs), tuple(varying)
    own = {f"input {name}": _tensor(leaf, name.endswith(endings)) for name, leaf in leaves}
    for tree_name, tree in inputs.items():
        own |= {f"size {name}": str(size) for name, size in static_leaves(tree_name, tree)}
        # a weight's class has its product
        own |= {f"class {name}": found for name, found in classes(tree_name, tree)}
    return Key({"region": json.dumps(describe(function)), **own, **common})


def describe(value: object) -> Any:
    """A region and its bound arguments, as JSON. Raises TypeError for values of other types.

    If a dataclass declares GRAPH_FIELDS, only these fields count; `narrowed` keeps a region from
    reading others.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (float, torch.dtype)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return [describe(item) for item in value]
    if isinstance(value, FunctionType):
        return f"{value.__module__}:{value.__qualname__}"
    if isinstance(value, partial):
        keywords = {name: describe(bound) for name, bound in sorted(value.keywords.items())}
        return [describe(value.func), *map(describe, value.args), *([keywords] if keywords else [])]
    if is_dataclass(value) and not isinstance(value, type):
        return {name: describe(getattr(value, name)) for name in graph_fields(value)}
    if isinstance(value, torch._ops.OpOverload):
        return str(value)
    raise TypeError(
        f"{value!r} cannot be part of a key: bind a region to numbers, names and dataclasses only"
    )


def graph_fields(value: Any) -> tuple[str, ...]:
    """The fields of a dataclass that a region may read."""
    declared: tuple[str, ...] | None = getattr(type(value), "GRAPH_FIELDS", None)
    return tuple(field.name for field in fields(value)) if declared is None else declared


class _Narrow:
    """Wraps a dataclass: only its GRAPH_FIELDS, and what its methods make of them, can be read."""

    def __init__(self, value: Any) -> None:
        self.__dict__["_value"] = value

    def __getattr__(self, name: str) -> Any:
        value = self.__dict__["_value"]
        found = getattr(type(value), name, None)
        if isinstance(found, property) and found.fget is not None:
            return found.fget(self)
        if isinstance(found, FunctionType):
            return MethodType(found, self)
        if name not in graph_fields(value):
            raise AttributeError(
                f"a region reads {type(value).__name__}.{name}, which is not in its GRAPH_FIELDS, "
                "so no artifact's key holds it"
            )
        return _narrow(getattr(value, name))


def _narrow(value: Any) -> Any:
    return _Narrow(value) if hasattr(type(value), "GRAPH_FIELDS") else value


def narrowed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The region, wrapped for tracing: reading a field that its key does not hold is an error."""
    if not isinstance(function, partial):
        return function
    return partial(function.func, *map(_narrow, function.args), **function.keywords)


def source_digest(paths: Iterable[Path], root: Path) -> str:
    """One digest of files: their paths relative to `root` and their contents."""
    total = hashlib.sha256()
    for path in sorted(paths):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(root).as_posix()}\0{content}\n".encode())
    return total.hexdigest()[:16]


def plan_sources() -> dict[str, str]:
    """The ingredient for the sources that make plans and no programs."""
    return {"source plans": source_digest((ROOT / name for name in PLANNING), ROOT)}


def own_sources() -> dict[str, str]:
    """The ingredients for the sources of compile/ and kernels/ that make programs."""
    from nanovllm.kernels import ops

    making = [path for pattern in MAKING for path in ROOT.glob(pattern)]
    kernels = Path(ops.__file__).resolve().parent
    running = [path for kind in ("py", "cpp", "h") for path in kernels.rglob(f"*.{kind}")]
    return {
        "source compile": source_digest(making, ROOT),
        "source kernels": source_digest(running, kernels),
    }


def _tensor(tensor: Tensor, varies: bool) -> str:
    sizes = ["*" if varies and i == 0 else str(size) for i, size in enumerate(tensor.shape)]
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype}[{', '.join(sizes)}] strides {list(tensor.stride())} {tensor.device}"
