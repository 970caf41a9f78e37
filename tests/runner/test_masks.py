"""The table of masks: rows of a step have their own masks or allow every token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nanovllm.platforms.cpu import CpuPlatform
from nanovllm.runner.masks import MaskTable


def allowed(table: MaskTable, rows: list[int], vocab_size: int) -> list[list[int]]:
    logits_RV = torch.zeros(len(rows), vocab_size)
    kept_RV = table.apply_token_bitmask(torch.tensor(rows), logits_RV)
    return [row_V.isfinite().nonzero().flatten().tolist() for row_V in kept_RV]


def words(*token_ids: int, vocab_size: int = 70) -> np.ndarray:
    bits = np.zeros(-(-vocab_size // 32) * 32, bool)
    bits[list(token_ids)] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


def test_a_mask_holds_for_its_row_and_its_step_alone() -> None:
    table, everything = MaskTable(CpuPlatform(), 5, 70), list(range(70))
    table.write([3, 0, 1], [3, 1], np.stack([words(0, 31, 32), words(69)]))
    assert allowed(table, [0, 1, 3, 4], 70) == [everything, [69], [0, 31, 32], everything]
    # row 3 belongs to a free request now; row 1 is in no step
    table.write([0, 3], [0], words(5)[None])
    assert allowed(table, [0, 1, 3], 70) == [[5], [69], everything]
    table.write([1, 3], [3], words(7)[None])
    assert allowed(table, [1, 3], 70) == [everything, [7]]


def test_a_write_that_is_interrupted_leaves_no_mask_for_other_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table, everything = MaskTable(CpuPlatform(), 5, 70), list(range(70))
    table.write([3], [3], words(1)[None])
    copy = torch.Tensor.index_copy_

    def interrupted(*args: Any) -> None:
        copy(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch.Tensor, "index_copy_", interrupted)
        table.write([1, 3], [1], words(2)[None])
    table.write([1, 3, 0], [0], words(5)[None])  # rows 1 and 3 belong to free requests now
    assert allowed(table, [0, 1, 3], 70) == [[5], everything, everything]
