"""The matrices of an adapter in host memory, in blocks.

O outputs | D depth | P parts of the outputs | X rank of the slots | L = P · X
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from nanovllm.models.lora.slots import Target, shapes
from nanovllm.models.model import Model

ALIGNMENT = 64  # bytes between the beginnings of two matrices are a multiple of this
BLOCK_BYTES = 2 << 20  # torch rounds the size of pinned memory up to a power of two


class Place(NamedTuple):
    """Where a matrix is: the number of its block, its first number there, and its shape."""

    block: int
    start: int
    shape: tuple[int, ...]


class HostAdapter(NamedTuple):
    """An adapter in host memory: blocks of numbers, and the places of its matrices in them: those
    of each of `targets(model)`, a [L, D], b [O, X] and perhaps c [O], which is added to the bias.
    Of experts a is [E, L, D] and b [E, O, X]."""

    blocks: list[Tensor]
    places: list[Place]

    def matrices(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """The matrices in a copy of the blocks."""
        return [
            blocks[block][start : start + math.prod(shape)].view(shape)
            for block, start, shape in self.places
        ]


def layout(model: Model, known: Sequence[Target], num_ranks: int) -> tuple[list[Place], list[int]]:
    """The places of a rank's matrices in blocks of memory, and the bytes of each block:
    BLOCK_BYTES, or the power of two that a larger matrix needs. `known` are the model's targets."""
    assert model.lora is not None
    dtype, rank = model.config.dtype, model.lora.max_rank
    unit = ALIGNMENT // dtype.itemsize
    places: list[Place] = []
    sizes: list[int] = []
    end = whole = 0  # numbers of the last block
    for target in known:
        for shape in shapes(target, rank, num_ranks):
            size = -(-math.prod(shape) // unit) * unit
            if end + size > whole:
                num_bytes = max(size * dtype.itemsize, BLOCK_BYTES)
                sizes.append(1 << (num_bytes - 1).bit_length())
                end, whole = 0, sizes[-1] // dtype.itemsize
            places.append(Place(len(sizes) - 1, end, shape))
            end += size
    return places, sizes
