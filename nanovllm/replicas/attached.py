"""What a request has beside its prompt's tokens, as bytes: images, embeddings, positions.

A message to a replica is JSON. If anything is attached, a zero byte follows, then JSON that
describes it, another zero byte, and a safetensors file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import torch as safe
from torch import Tensor

from nanovllm.engine.intake import Embeddings
from nanovllm.runner.towers import Encodable
from nanovllm.schedule.request import Content

Images = Sequence[tuple[Content, Encodable]]


class Attached(NamedTuple):
    """Arguments of `Engine.add_request`; `images` are those of a `MediaPrompt`."""

    embeddings: Embeddings = ()
    positions: np.ndarray | None = None
    images: Images = ()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name: what is there twice has one name, since safetensors has no tensors that share
        memory."""
        found = {f"embeds {_key(embeds)}": embeds for _, embeds in self.embeddings}
        if self.positions is not None:
            found["positions"] = torch.from_numpy(np.ascontiguousarray(self.positions))
        for content, image in self.images:
            for name, value in image._asdict().items():
                if isinstance(value, Tensor):
                    found[f"{name} {content.key}"] = value
        found = {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}
        storages = [tensor.untyped_storage().data_ptr() for tensor in found.values()]
        return {
            name: tensor.clone() if storages.index(storage) < i and "embeds" in name else tensor
            for i, ((name, tensor), storage) in enumerate(zip(found.items(), storages))
        }


def _key(embeds: Tensor) -> str:
    """Equal for views of the same memory as the same numbers."""
    return f"{embeds.data_ptr()} {list(embeds.shape)} {embeds.stride()} {embeds.dtype}"


def dump(message: bytes, attached: Attached) -> bytes:
    """A JSON message with what is attached to it."""
    tensors = attached.tensors
    if not tensors:
        return message
    starts = [(int(start), _key(embeds)) for start, embeds in attached.embeddings]
    images = []
    for content, image in attached.images:
        values = image._asdict().items()
        rest = {name: value for name, value in values if not isinstance(value, Tensor)}
        images.append([content.start, content.num, content.key, rest])
    return b"\0".join((message, json.dumps([starts, images]).encode(), safe.save(tensors)))


def load(payload: bytes) -> tuple[bytes, Attached]:
    """The JSON message, and what is attached to it."""
    end = payload.find(b"\0")
    if end < 0:
        return payload, Attached()
    message, start = payload[:end], payload.find(b"\0", end + 1) + 1
    described = payload[end + 1 : start - 1]
    tensors = safe.load(payload[start:])
    starts, found = json.loads(described)
    images = []
    for start, num, key, values in found:
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        names = (name for name in Encodable._fields if f"{name} {key}" in tensors)
        fields |= {name: tensors[f"{name} {key}"] for name in names}
        images.append((Content(start, num, bytes.fromhex(key)), Encodable(**fields)))
    positions = tensors.get("positions")
    return message, Attached(
        [(start, tensors[f"embeds {key}"]) for start, key in starts],
        None if positions is None else positions.numpy(),
        images,
    )
