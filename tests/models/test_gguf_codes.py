"""Blocks of GGUF files become packed weights a few rows at a time."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm.models.formats import gguf_codes
from nanovllm.models.gguf.types import TYPES

ROWS, COLUMNS = 50, 512
BESIDE = 6  # times the blocks that are converted at a time


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, as long as they are in use. Views of
    `given` need none."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.most, self._now = 0, 0
        self._given = given.untyped_storage().data_ptr()
        self._uses: dict[int, int] = {}  # of a memory, by its address

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = op(*args, **(kwargs or {}))
        for one in found if isinstance(found, (list, tuple)) else (found,):
            if isinstance(one, Tensor):
                self._count(one)
        return found

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address == self._given:
            return
        if address not in self._uses:
            self._now += size
            self.most = max(self.most, self._now)
        self._uses[address] = self._uses.get(address, 0) + 1
        weakref.finalize(tensor, self._drop, address, size)

    def _drop(self, address: int, size: int) -> None:
        self._uses[address] -= 1
        if self._uses[address] == 0:
            del self._uses[address]
            self._now -= size


def blocks(ggml_type: int) -> Tensor:
    """[ROWS, n, bytes] whose numbers are finite: no byte has all bits of an exponent."""
    kind = TYPES[ggml_type]
    return torch.randint(60, (ROWS, COLUMNS // kind.columns, kind.num_bytes), dtype=torch.uint8)


def num_bytes(weight: gguf_codes.PackedWeight) -> int:
    return sum(one.nbytes for one in weight if isinstance(one, Tensor))


@pytest.mark.parametrize("ggml_type", gguf_codes.CODES)
def test_conversion_takes_little_more_memory_than_the_weight(
    ggml_type: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = blocks(ggml_type)
    at_once = gguf_codes.of_blocks(block, ggml_type)
    monkeypatch.setattr(gguf_codes, "CONVERTED_BYTES", 3 * block[0].nbytes)
    with LiveBytes(block) as live:
        found = gguf_codes.of_blocks(block, ggml_type)
    for one, other in zip(found, at_once, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    assert num_bytes(found) <= live.most <= num_bytes(found) + BESIDE * gguf_codes.CONVERTED_BYTES
