"""Devices, one module each. Importing this package does not import torch.

To add a device, add its line to `DEVICES` and write a module of the same name in this package with

    problem(index) -> str | None        why the device with this number cannot be used here
    create(index, options) -> Platform  the platform; `options` maps names of `LLM`'s options to
                                        values, None for those that are not set

The module must not import packages that only its own device needs, such as Triton, at the top.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from nanovllm.platforms.base import Platform


class DeviceEntry(NamedTuple):
    """A line of `DEVICES`.

    indexed: True if "name:N" names device number N.
    options: options of `LLM` that only this device has.
    ray_resource: Ray's name for devices of this kind; None: Ray does not assign them.
    """

    indexed: bool = False
    options: tuple[str, ...] = ()
    ray_resource: str | None = None


# device="auto" selects the first usable one
DEVICES = {
    "cuda": DeviceEntry(indexed=True, ray_resource="GPU"),
    "npu": DeviceEntry(indexed=True, options=("npu_graph_mode", "npu_graph_options")),
    "mps": DeviceEntry(),
    "cpu": DeviceEntry(ray_resource="CPU"),
}


def select(
    device: str, *, graph_batch_sizes: Sequence[int] | None = None, **options: Any
) -> Platform:
    """The platform for "auto", a name in `DEVICES`, or a name with a number such as "cuda:1".

    `options` are those of `DEVICES`. Raises ValueError for a device that cannot be used here, and
    for options of another device.
    """
    kind, _, number = device.partition(":")
    may_have_index = DEVICES.get(kind, DeviceEntry()).indexed and number.isdigit()
    if kind not in ("auto", *DEVICES) or (number and not may_have_index):
        indexed = ", ".join(f"{name}:N" for name, entry in DEVICES.items() if entry.indexed)
        names = ", ".join(("auto", *DEVICES))
        raise ValueError(f"device {device!r} is not supported: use one of {names} or {indexed}")
    index = int(number or 0)
    for name in DEVICES if kind == "auto" else (kind,):
        module = importlib.import_module(f"{__name__}.{name}")
        problem = module.problem(index)
        if problem is None:
            _refuse_foreign(name, options)
            return module.create(index, {**options, "graph_batch_sizes": graph_batch_sizes})
    raise ValueError(
        f"device {device!r} is not available: {problem}. Otherwise use device='cpu' or 'auto'"
    )


def unusable() -> dict[str, str | None]:
    """Why the first device of each kind cannot be used here; None if it can."""
    return {name: importlib.import_module(f"{__name__}.{name}").problem(0) for name in DEVICES}


def _refuse_foreign(device: str, options: dict[str, Any]) -> None:
    """Raise ValueError for an option that is set and belongs to another device."""
    owners = {option: name for name, entry in DEVICES.items() for option in entry.options}
    for option, value in options.items():
        if value is not None and owners[option] != device:
            raise ValueError(
                f"{option} is {value!r}, but the device is {device!r}: it is an option of device "
                f"{owners[option]!r}"
            )


__all__ = ["DEVICES", "select", "unusable"]
