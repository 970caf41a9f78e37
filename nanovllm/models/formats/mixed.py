"""A matrix whose rows are in several formats: weights below each other.

q, k and v of a checkpoint may have a format each, or its config may leave one of them as it is.
T tokens | K experts per token | O outputs | D depth.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.models import formats
from nanovllm.models.formats.format import Weight


class Mixed(NamedTuple):
    """`parts` are weights in any formats, and `num_rows` the rows of each."""

    parts: tuple[Weight, ...]
    num_rows: tuple[int, ...]

    def linear(self, x_TD: Tensor, bias_O: Tensor | None, residual_TO: Tensor | None) -> Tensor:
        none = (None,) * len(self.parts)
        biases = none if bias_O is None else bias_O.split(self.num_rows)
        found = [formats.linear(x_TD, *one) for one in zip(self.parts, biases)]
        y_TO = torch.cat(found, dim=-1)
        return y_TO if residual_TO is None else y_TO + residual_TO

    def rows(self, first: int) -> Tensor:
        found = []
        for part, num in zip(self.parts, self.num_rows):
            if first < num:
                found.append(formats.rows(part, max(0, first)))
            first -= num
        return torch.cat(found)

    def expert_linear(self, x: Tensor, expert_TK: Tensor) -> Tensor:
        found = [formats.expert_linear(x, expert_TK, part) for part in self.parts]
        return torch.cat(found, dim=-1)

    def lookup(self, row_T: Tensor, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError("a table has one source")
