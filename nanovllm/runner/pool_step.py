"""The steps of a model that pools, each with its static inputs and results.

R rows (sequences) | O numbers of a result
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from nanovllm.models.model import Model
from nanovllm.models.pooling import Pooler, PoolInputs
from nanovllm.platforms.base import Platform, Replay
from nanovllm.runner.embeddings import Embeddings
from nanovllm.runner.mm_embeds import MMEmbedInputs, MMEmbeds, fill
from nanovllm.runner.pool_inputs import InputShape, PoolSequence, step_plan
from nanovllm.runner.spec import Layout


class Programs(Protocol):
    """What runs steps: a `PoolRunner`."""

    model: Model
    pooler: Pooler
    platform: Platform
    layout: Layout
    embeddings: Embeddings

    @property
    def given_inputs(self) -> MMEmbedInputs: ...
    def run(
        self, inputs: PoolInputs, given: MMEmbeds | None = None, layers: Sequence[int] | None = None
    ) -> Tensor: ...


class PoolStep:
    """The static inputs and results of a bucket. Initially all padding. With `has_given` some
    tokens stand for images."""

    def __init__(
        self, runner: Programs, num_tokens: int, num_rows: int, *, has_given: bool = False
    ) -> None:
        pooler, device = runner.pooler, runner.platform.device
        self._shape = InputShape(
            num_tokens, num_rows, pooler.has_types, runner.layout.block_size, pooler.is_causal
        )
        self._buffer = torch.zeros(self._shape.num_bytes, dtype=torch.uint8, device=device)
        self.inputs = PoolInputs(**{
            name: self._buffer.narrow(0, first, size * dtype.itemsize).view(dtype)
            for name, (first, size, dtype) in self._shape.fields.items()
        })  # fmt: skip
        size = (num_rows, pooler.size)
        self.result_RO = torch.zeros(size, dtype=torch.float32, device=device)
        self.given = runner.given_inputs.of(num_tokens) if has_given else None
        self._runner = runner
        self._captured: Replay | None = None

    @property
    def replay(self) -> Replay:
        """The whole step: as captured, else op by op."""
        return self._captured or self.launch

    def fill(self, sequences: Sequence[PoolSequence]) -> None:
        """Copy sequences to the static inputs, at once. Does not synchronise."""
        runner = self._runner
        is_last = runner.pooler.pooling == "last"
        runner.platform.write(self._buffer, self._shape.filled(sequences, is_last=is_last))
        if self.given is not None:
            fill(self.given, step_plan(sequences), runner.embeddings, runner.platform)

    def capture(self, capture: Callable[[Callable[[], None]], Replay] | None) -> None:
        """Run the step's programs, and capture it as `replay` if `capture` is given."""
        if capture is None:
            self.launch()
            return
        self._runner.run(self.inputs, self.given, self._runner.model.distinct_layers)
        self._captured = capture(self.launch)

    def launch(self) -> None:
        """The whole step, op by op."""
        self.result_RO.copy_(self._runner.run(self.inputs, self.given))
