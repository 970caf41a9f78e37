"""What a request has beside its prompt's tokens, as bytes: images, embeddings, positions.

A message to a replica is JSON, then a zero byte and a safetensors file if anything is attached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import torch as safe
from torch import Tensor

from nanovllm.intake import Embeddings
from nanovllm.runner.runner import Encodable
from nanovllm.schedule.request import Content

Images = Sequence[tuple[Content, Encodable]]


class Attached(NamedTuple):
    """Arguments of `Engine.add_request`."""

    embeddings: Embeddings = ()
    positions: np.ndarray | None = None
    images: Images = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        tensors = [x for _, x in self.embeddings] + [one.pixels for _, one in self.images]
        positions = 0 if self.positions is None else self.positions.nbytes
        return positions + sum(tensor.nbytes for tensor in tensors)


def dump(message: bytes, attached: Attached) -> bytes:
    """A JSON message with what is attached to it."""
    tensors: dict[str, Tensor] = {}
    for i, (start, embeds) in enumerate(attached.embeddings):
        tensors |= {f"embeds {i}": _plain(embeds), f"start {i}": torch.tensor(int(start))}
    if attached.positions is not None:
        tensors["positions"] = torch.from_numpy(np.ascontiguousarray(attached.positions))
    for i, (content, image) in enumerate(attached.images):
        numbers = [content.start, content.num, *image.grid]
        digest = torch.frombuffer(bytearray(content.digest), dtype=torch.uint8)
        tensors |= {
            f"pixels {i}": _plain(image.pixels),
            f"image {i}": torch.tensor(numbers),
            f"digest {i}": digest,
        }
    return message + b"\0" + safe.save(tensors) if tensors else message


def load(payload: bytes) -> tuple[bytes, Attached]:
    """The JSON message, and what is attached to it."""
    message, has_more, content = payload.partition(b"\0")
    if not has_more:
        return message, Attached()
    tensors = safe.load(content)

    def of_kind(name: str) -> list[Tensor]:
        num = sum(key.startswith(f"{name} ") for key in tensors)
        return [tensors[f"{name} {i}"] for i in range(num)]

    starts = [int(start) for start in of_kind("start")]
    images = []
    for pixels, numbers, digest in zip(of_kind("pixels"), of_kind("image"), of_kind("digest")):
        start, num, *grid = numbers.tolist()
        shape: Any = tuple(grid)
        content_of = Content(start, num, digest.numpy().tobytes())
        images.append((content_of, Encodable(pixels, shape)))
    positions = tensors.get("positions")
    return message, Attached(
        list(zip(starts, of_kind("embeds"))),
        None if positions is None else positions.numpy(),
        images,
    )


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()
