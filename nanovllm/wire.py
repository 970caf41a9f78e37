"""Messages between processes: msgpack. An array is its dtype, its shape and its bytes.

A message is a msgspec.Struct, a dataclass or a named tuple, and `decoder` checks the type of every
field. Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import msgspec
import numpy as np

T = TypeVar("T")


class Array(msgspec.Struct, array_like=True):
    """A tensor or an array: its contiguous bytes."""

    dtype: str
    shape: list[int]
    data: bytearray  # a view when encoding


def array(values: Any) -> Array:
    """Encode a tensor of any device and strides, or an array."""
    if isinstance(values, np.ndarray):
        raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        return Array(values.dtype.name, list(values.shape), cast(bytearray, raw))
    import torch

    on_host = values.detach().cpu().contiguous()
    raw = on_host.reshape(-1).view(torch.uint8).numpy().data
    name = str(on_host.dtype).removeprefix("torch.")
    return Array(name, list(on_host.shape), cast(bytearray, raw))


def tensor(found: Array) -> Any:
    """The tensor, over the bytes of the message. Raises ValueError for an unknown dtype."""
    import torch

    dtype = getattr(torch, found.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{found.dtype!r} is not a dtype")
    if not found.data:
        return torch.empty(found.shape, dtype=dtype)
    return torch.frombuffer(found.data, dtype=dtype).reshape(found.shape)


def decoder(kind: type[T]) -> Callable[[bytes], T]:
    """The function that reads a message of this type. Raises msgspec.ValidationError, which is a
    ValueError, for any other message."""
    return msgspec.msgpack.Decoder(kind, dec_hook=_of_fields).decode


def _fields(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return array(value)
    assert isinstance(value, np.generic), type(value)
    return value.item()


def _of_fields(kind: type, value: Any) -> Any:
    assert kind is np.ndarray, kind
    name, shape, data = value
    # a copy is aligned and writable, as torch requires
    return np.frombuffer(data, np.dtype(name)).reshape(shape).copy()


dump = msgspec.msgpack.Encoder(enc_hook=_fields).encode
