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
    """The places of a rank's matrices in blocks of memory, and the bytes of each block: those of a
    matrix, if it is larger than BLOCK_BYTES. `known` are the model's targets."""
    assert model.lora is not None
    dtype, rank = model.config.dtype, model.lora.max_rank
    unit, whole = ALIGNMENT // dtype.itemsize, BLOCK_BYTES // dtype.itemsize
    places: list[Place] = []
    sizes: list[int] = []
    end = whole
    for target in known:
        for shape in shapes(target, rank, num_ranks):
            size = -(-math.prod(shape) // unit) * unit
            if end + size > whole:
                sizes.append(max(size, whole) * dtype.itemsize)
                end = 0
            places.append(Place(len(sizes) - 1, end, shape))
            end += size
    return places, sizes
