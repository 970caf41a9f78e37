"""In which steps of an engine with a proposer the layers may be one kernel: those of whose layers
nothing reads a result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from nanovllm.models.model import Batch
from nanovllm.runner import persistent
from nanovllm.runner.persistent import Parts
from tests.engine.test_ended_drafts import GRAPHS
from tests.engine.test_speculation_pairs import PROMPTS, heads, opened, speculative, target
from tests.engines import greedy, tokens

__all__ = ["heads", "target"]  # fixtures


class Refusing:
    """`PersistentSteps` of a device that has none, and what it is asked for."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.prepared: set[int] = set()
        self.num_asked = 0

    def may_take(self, num_rows: int) -> bool:
        return True

    def begin(self, parts: Parts, h_RD: Tensor, batch: Batch, sizes: Sequence[int]) -> None:
        assert parts.is_plain
        self.begun += sizes

    def prepare(self, parts: Parts, h_RD: Tensor, batch: Batch) -> None:
        self.prepared.add(len(h_RD))

    def logits(self, cos_sin_MH: Tensor, h_RD: Tensor, batch: Batch) -> None:
        self.num_asked += 1

    def check_later(self, *_: object) -> None:
        return None


@pytest.mark.parametrize(
    ("method", "adapts", "is_asked"),
    [
        (None, True, True), ("ngram", False, True), ("draft_model", True, True),
        ("eagle3", True, True), ("eagle3", False, False),
    ],
)  # fmt: skip
def test_plain_steps_are_one_kernel_where_nothing_reads_their_layers(
    method: str | None, adapts: bool, is_asked: bool, target: Path, heads: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    fake = Refusing()
    monkeypatch.setattr(persistent, "chosen", lambda *_: fake)
    options: dict[str, Any] = {}
    if method is not None:
        tuning = {"adapt_draft_length": adapts, "run_ahead": 1}
        options = {**speculative(method, heads), "tuning": tuning}
    with opened(target, **{**GRAPHS, **options}) as llm:
        assert (fake.begun, fake.prepared) == (([1, 2], {1, 2}) if is_asked else ([], set()))
        assert (fake.num_asked > 0) == is_asked
        planner = llm.engine.scheduler.planner
        if planner is not None:
            planner.lengths.choose = lambda *_: 0  # type: ignore[method-assign]
            planner.lengths.ends = lambda _: True  # type: ignore[method-assign]
        assert len(tokens(llm, PROMPTS[:1], greedy(5))[0]) == 5
