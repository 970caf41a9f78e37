"""Reads calls of a region's graph: products in bf16 and in codes, with their neighbours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from nanovllm.kernels import ops
from nanovllm.kernels.cuda import persistent
from nanovllm.kernels.cuda.persistent import CodeFormat

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

FP8_BLOCK = 128  # rows and columns that have a scale
OF_GROUPS = 1024  # depths of integers of 4 bits are multiples: scales are copied 16 bytes at a time


class Unfit(ValueError):
    """The kernel does not take a step; the message says why."""


class Reader:
    """The calls of a graph, in order, without views."""

    def __init__(self, graph: GraphModule) -> None:
        nodes = list(graph.graph.nodes)
        self.calls = [node for node in nodes if node.op == "call_function" and not _is_view(node)]
        (self.result,) = map(_source, graph.graph.output_node().args[0])  # type: ignore[arg-type]

    def take(self, target: Any, what: str) -> tuple[Node, tuple[Any, ...]]:
        """The next call and its arguments, sources in the places of views."""
        node = self.calls.pop(0) if self.calls else None
        if node is None or node.target is not target:
            found = "nothing" if node is None else str(node.target)
            raise Unfit(f"{found} is where the kernel has {what}")
        return node, tuple(map(_source, node.args))


def _is_view(node: Node) -> bool:
    return bool(getattr(node.target, "is_view", False))


def _source(value: Any) -> Any:
    while hasattr(value, "target") and _is_view(value):
        value = value.args[0]
    return value


class Product(NamedTuple):
    """A call and its inputs. If its weight is in codes, `codes` is their format; `has_head` is not
    set yet."""

    node: Any
    norm: Any
    weight: Any
    bias: Any
    eps: float
    codes: CodeFormat | None = None
    scale: Any = None
    offset: Any = None

    def named(self, name: str) -> dict[str, Any]:
        return {name: self.weight, f"{name}_scale": self.scale, f"{name}_offset": self.offset}


def product(
    reader: Reader,
    what: str,
    x: Any,
    *,
    residual: Any = None,
    norm: bool,
    silu: bool = False,
    may_have_bias: bool = False,
) -> Product:
    """Read the next call, a product of x. Raises Unfit."""
    target = reader.calls[0].target if reader.calls else None
    target = target if target in _OF_CODES else ops.fused_linear
    node, (found, norm_weight, *weight, bias, added, eps, has_silu) = reader.take(target, what)
    if bias is not None and not may_have_bias:
        raise Unfit(f"{what} has a bias")
    if x not in (found, None) or (norm_weight is not None) != norm or has_silu != silu:
        raise Unfit(f"{what} has other neighbours")
    if added is not residual:
        raise Unfit(f"{what} has another residual")
    found_product = Product(node, norm_weight, weight[0], bias, eps)
    for one in (norm_weight, bias):
        check_plain(what, one, torch.bfloat16)
    if target is ops.fused_linear:
        check_plain(what, weight[0], torch.bfloat16)
        return found_product
    return _OF_CODES[target](found_product, what, *weight)


def _of_fp8(found: Product, what: str, weight: Any, scale: Any, *sides: int) -> Product:
    check_plain(what, weight, torch.float8_e4m3fn)
    if sides not in ((1, 0), (1, weight.meta["val"].shape[1]), (FP8_BLOCK, FP8_BLOCK)):
        raise Unfit(f"{what} has scales for blocks of {sides[0]} rows and {sides[1]} columns")
    dtype = scale.meta["val"].dtype
    check_plain(what, scale, dtype if dtype is torch.bfloat16 else torch.float32)
    codes = CodeFormat(8, dtype, 0 if sides[0] == 1 else FP8_BLOCK)
    return found._replace(codes=codes, scale=scale)


def _of_int4(
    found: Product, what: str, code: Any, scale: Any, offset: Any, table: Any, *form: int
) -> Product:
    if table is not None or form != (4, persistent.GROUP_COLUMNS):
        raise Unfit(f"{what} has levels, or codes of {form[0]} bits in groups of {form[1]}")
    if found.bias is not None or code.meta["val"].shape[1] * 2 % OF_GROUPS:
        raise Unfit(f"{what} has a bias, or a depth that is not a multiple of {OF_GROUPS}")
    dtype = scale.meta["val"].dtype
    check_plain(what, code, torch.uint8)
    for one in (scale, offset):
        check_plain(what, one, dtype if dtype is torch.bfloat16 else torch.float16)
    codes = CodeFormat(4, dtype, has_offset=offset is not None)
    return found._replace(codes=codes, scale=scale, offset=offset)


_OF_CODES: Mapping[Any, Callable[..., Product]] = {
    ops.fused_fp8_linear: _of_fp8,
    ops.fused_packed_linear: _of_int4,
}


def check_plain(what: str, node: Node | None, dtype: torch.dtype) -> None:
    """Raises Unfit unless the node, if there is one, is a contiguous input of the region."""
    if node is None:
        return
    value = node.meta["val"]
    is_input = node.op == "placeholder"  # torch.fx calls inputs so
    if not is_input or value.dtype != dtype or not value.is_contiguous():
        name = "bf16" if dtype is torch.bfloat16 else str(dtype).removeprefix("torch.")
        raise Unfit(f"{what} has weights other than contiguous ones in {name}")
