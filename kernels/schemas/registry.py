"""The library of ops: how an op is defined, and the kernels that are registered for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("nanovllm", "DEF")
_registered: dict[tuple[str, str], Callable[..., Any]] = {}
_defined: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {}


def define(schema: str, meaning: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, meaning, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nanovllm::{name}", fake, lib=_library)
    _defined[name] = schema, meaning, fake
    return getattr(torch.ops.nanovllm, name).default


def define_ordered(name: str) -> Any:
    """An op like that of this name, whose sums have one order: see `order.py`."""
    schema, meaning, fake = _defined[name]
    return define(f"ordered_{schema}", meaning, fake)


def register_kernels(dispatch_key: str, kernels: dict[str, Callable[..., Any]]) -> None:
    """Register kernels {op name: kernel} for one dispatch key ("CUDA", "CPU", …).

    An op keeps the first kernel that is registered for a key.
    """
    for name, kernel in kernels.items():
        if (dispatch_key, name) not in _registered:
            _library.impl(name, kernel, dispatch_key)
            _registered[dispatch_key, name] = kernel


def kernel_of(target: object, dispatch_key: str) -> Callable[..., Any] | None:
    """The kernel registered for the op in an FX node's target; None if there is none."""
    return _registered.get((dispatch_key, op_name(target) or ""))


def has_kernel(op: object, device: torch.device) -> bool:
    """True if a kernel is registered for the op and for devices of this type."""
    return kernel_of(op, device.type.upper()) is not None


def op_name(target: object) -> str | None:
    """The name of the op in an FX node's target; None if it is not an op of this library."""
    return (
        target._schema.name.split("::")[1]
        if isinstance(target, torch._ops.OpOverload) and target.namespace == "nanovllm"
        else None
    )
