"""FX graph to a list of operator calls, run in order as straight-line Python, uncompiled.

Where a platform has kernels for our ops, a region is a handful of calls into them and into torch's
library. Inductor would add checks around each call, and importing it takes seconds at every start.
A call list loads in a millisecond. It is data: it can only name operators.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from nanovllm.kernels import ops

KIND = "calls"
NAMESPACES = ("aten", "nanovllm")
GETITEM = "getitem"

# Inductor would call these library functions as well.
_LIBRARY = {"mm", "addmm", "bmm", "baddbmm", "embedding", "index_select"}
# The most small ops in a call list. Inductor could fuse each into another launch, but starting
# Inductor takes seconds.
MAX_SMALL_OPS = 2

_LITERALS = (bool, int, float, str)
_TORCH_CONSTANTS = (torch.dtype, torch.layout, torch.memory_format)

Calls = list[list[Any]]  # [op, args, kwargs] of each call


class NotListable(ValueError):
    """The graph holds something other than operator calls on plain arguments."""


class CallList:
    """Operator calls in order.

    Values are numbered: the inputs come first, then the result of each call. `calls[i]` is [op,
    args, kwargs] and makes value `num_inputs + i`; the argument {"v": n} stands for value n.
    """

    def __init__(self, num_inputs: int, calls: Calls, outputs: list[int]) -> None:
        self.num_inputs, self.calls, self.outputs = num_inputs, calls, outputs
        self.run = _build(num_inputs, calls, outputs)
        self._direct: Callable[..., Sequence[Tensor]] | None = None

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        if _must_dispatch():
            return self.run(*inputs)
        if self._direct is None:
            self._direct = self._without_dispatch(inputs)
        return self._direct(*inputs)

    def _without_dispatch(self, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
        """The calls with our kernels themselves in the place of our ops, where all is on a CPU:
        torch's dispatch takes as long as a small kernel there, and not all steps are recorded."""
        if any(type(one) is not Tensor or one.device.type != "cpu" for one in inputs):
            return self.run
        return _build(self.num_inputs, self.calls, self.outputs, "CPU")

    def step_through(
        self, inputs: Sequence[Tensor], visit: Callable[[Any, list[Any], dict[str, Any]], Any]
    ) -> list[Tensor]:
        """Replace each call by `visit(op, args, kwargs)`, which returns its result.

        All values are kept until the end.
        """
        values: list[Any] = list(inputs)
        for name, args, kwargs in self.calls:
            op = operator.getitem if name == GETITEM else _op(name)
            real: list[Any] = [_real(arg, values) for arg in args]
            values.append(visit(op, real, {key: _real(arg, values) for key, arg in kwargs.items()}))
        return [values[number] for number in self.outputs]

    def stored(self) -> tuple[str, bytes]:
        """(kind of artifact, its bytes), from which `load` makes an equal list."""
        content = {"num_inputs": self.num_inputs, "calls": self.calls, "outputs": self.outputs}
        return KIND, json.dumps(content, separators=(",", ":")).encode()


def load(content: bytes) -> CallList:
    """The call list of `CallList.stored()`. Raises ValueError for any other bytes."""
    try:
        read = json.loads(content)
        return CallList(read["num_inputs"], read["calls"], read["outputs"])
    except Exception as error:  # invalid bytes may raise any error
        raise ValueError(f"not a call list: {error!r}") from error


def lower(graph: GraphModule, fakes: Sequence[Tensor]) -> CallList:
    """List a graph's calls. Raises NotListable for all but operators on plain arguments."""
    numbers: dict[Node, int] = {}
    calls: Calls = []
    outputs: list[int] = []
    for node in graph.graph.nodes:
        if node.op == "call_function":
            args, kwargs = _written(list(node.args), numbers), _written(node.kwargs, numbers)
            calls.append([_op_name(node.target), args, kwargs])
        elif node.op == "output":
            outputs = [numbers[value] for value in node.args[0]]
            break
        elif node.op != "placeholder":
            raise NotListable(f"{node.op} {node.target} is not a call of an operator")
        numbers[node] = len(numbers)
    return CallList(len(fakes), calls, outputs)


def is_enough(graph: GraphModule) -> bool:
    """True if a compiler could fuse next to nothing: a call list is as fast as compiled code."""
    small = 0
    for node in graph.graph.nodes:
        target = node.target
        if node.op != "call_function" or target is operator.getitem:
            continue
        if not isinstance(target, torch._ops.OpOverload) or target.namespace not in NAMESPACES:
            return False
        computes = target.namespace == "aten" and not target.is_view
        small += computes and target._schema.name.removeprefix("aten::") not in _LIBRARY
    return small <= MAX_SMALL_OPS


def _op_name(target: Any) -> str:
    if target is operator.getitem:
        return GETITEM
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in NAMESPACES:
        raise NotListable(f"{target} is not an operator of {' or '.join(NAMESPACES)}")
    return str(target)


def _written(value: Any, numbers: dict[Node, int]) -> Any:
    """An argument as JSON: a literal, or a list or dict of arguments, or one of three references.

    {"v": number of a value}, {"t": name of a torch constant}, {"d": name of a device}
    """
    if isinstance(value, Node):
        return {"v": numbers[value]}
    if value is None or isinstance(value, _LITERALS):
        return value
    if isinstance(value, (list, tuple)):
        return [_written(item, numbers) for item in value]
    if isinstance(value, dict):
        return {name: _written(item, numbers) for name, item in value.items()}
    if isinstance(value, _TORCH_CONSTANTS):
        return {"t": str(value)}
    if isinstance(value, torch.device):
        return {"d": str(value)}
    raise NotListable(f"argument {value!r} is not a plain value")


def _must_dispatch() -> bool:
    """Whether someone watches the ops that torch dispatches: the profiler, or a mode."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._autograd._profiler_enabled()


def _build(
    num_inputs: int, calls: Calls, outputs: list[int], dispatch_key: str = ""
) -> Callable[..., Sequence[Tensor]]:
    """Straight-line Python for the calls; it drops each value after its last use.

    With a `dispatch_key` the kernels that are registered for it are called without torch.
    """
    last_use: dict[int, int] = {}
    for call_idx, (_, args, kwargs) in enumerate(calls):
        for number in _values(args) + _values(kwargs):
            assert number < num_inputs + call_idx, f"call {call_idx} uses later value {number}"
            last_use[number] = call_idx
    names: dict[str, Any] = {}
    lines = [f"def run({', '.join(f'v{i}' for i in range(num_inputs))}):"]
    for call_idx, (name, args, kwargs) in enumerate(calls):
        out = num_inputs + call_idx
        written = [_source(arg, names) for arg in args]
        if name == GETITEM:
            lines.append(f"    v{out} = {written[0]}[{written[1]}]")
        else:
            op = _op(name)
            names[f"f{call_idx}"] = ops.kernel_of(op, dispatch_key) or op._op
            written += [f"{_identifier(key)}={_source(arg, names)}" for key, arg in kwargs.items()]
            lines.append(f"    v{out} = f{call_idx}({', '.join(written)})")
        done = {n for n in _values(args) + _values(kwargs) if last_use[n] == call_idx}
        if out not in last_use and out not in outputs:
            done.add(out)
        if dropped := sorted(done - set(outputs)):
            lines.append(f"    del {', '.join(f'v{number}' for number in dropped)}")
    lines.append(f"    return ({''.join(f'v{int(number)}, ' for number in outputs)})")
    exec("\n".join(lines), names)
    return names["run"]


def _op(name: str) -> torch._ops.OpOverload:
    """The operator of a name like "aten.mm.default"."""
    namespace, op, overload = name.split(".")
    if namespace not in NAMESPACES:
        raise ValueError(f"operator {name!r} is not of {' or '.join(NAMESPACES)}")
    found = getattr(getattr(getattr(torch.ops, namespace), op), overload)
    assert isinstance(found, torch._ops.OpOverload), name
    return found


def _identifier(name: str) -> str:
    if not name.isidentifier():
        raise ValueError(f"{name!r} is not the name of an argument")
    return name


def _source(value: Any, names: dict[str, Any]) -> str:
    """Python source for a written argument.

    Only numbers of values are inserted into the source; everything else is bound to a name.
    """
    if isinstance(value, list):
        return f"[{', '.join(_source(item, names) for item in value)}]"
    if isinstance(value, dict) and "v" in value:
        return f"v{int(value['v'])}"
    name = f"c{len(names)}"
    names[name] = _constant(value)
    return name


def _constant(value: Any) -> Any:
    if isinstance(value, dict):
        (tag, text), *_ = value.items()
        constant = torch.device(text) if tag == "d" else getattr(torch, text.removeprefix("torch."))
        assert isinstance(constant, (torch.device, *_TORCH_CONSTANTS)), text
        return constant
    if value is not None and not isinstance(value, _LITERALS):
        raise ValueError(f"argument {value!r} is not a plain value")
    return value


def _real(value: Any, values: Sequence[Any]) -> Any:
    """The Python value of a written argument, given all values so far."""
    if isinstance(value, list):
        return [_real(item, values) for item in value]
    return values[value["v"]] if isinstance(value, dict) and "v" in value else _constant(value)


def _values(value: Any) -> list[int]:
    """The numbers of all values that a written argument refers to."""
    if isinstance(value, dict):
        return [value["v"]] if "v" in value else _values(list(value.values()))
    return [n for item in value for n in _values(item)] if isinstance(value, list) else []
