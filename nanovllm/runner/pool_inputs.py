"""Whole sequences as the inputs of a step of a model that pools, padded to a bucket.

T tokens | R rows (sequences) | S = R + 1
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from nanovllm.schedule.plan import EmbeddingSpan, StepPlan

ALIGNED = 16  # bytes, of each input


class PoolSequence(NamedTuple):
    """One sequence of a step. second_at: where the second of two texts begins, 0 for one text.
    given: the tokens that stand for images, by their places in the sequence. position_3T: those in
    time, height and width; None for the places."""

    token_ids: Sequence[int]
    second_at: int = 0
    given: Sequence[EmbeddingSpan] = ()
    position_3T: np.ndarray | None = None


def step_plan(sequences: Sequence[PoolSequence]) -> StepPlan:
    """A step of the sequences, as far as `mm_embeds.fill` reads it."""
    lens = [len(one.token_ids) for one in sequences]
    spans, start = [], 0
    for one, num in zip(sequences, lens):
        spans += [span._replace(start=start + span.start) for span in one.given]
        start += num
    positions = None
    if any(one.position_3T is not None for one in sequences):
        positions = np.concatenate(list(map(_positions, sequences)), axis=1)
    ids = np.fromiter(chain.from_iterable(one.token_ids for one in sequences), np.int64, sum(lens))
    rows = list(range(len(lens)))
    return StepPlan(
        True, rows, rows, lens, lens, ids, [False] * len(lens), embeddings=spans,
        position_3T=positions,
    )  # fmt: skip


def _positions(one: PoolSequence) -> np.ndarray:
    if one.position_3T is not None:
        return one.position_3T
    return np.tile(np.arange(len(one.token_ids)), (3, 1))


class InputShape:
    """Where each of the inputs of a bucket is in one piece of memory: `fields` are by the names of
    `PoolInputs` (first byte, number of values, dtype)."""

    def __init__(
        self, num_tokens: int, num_rows: int, has_types: bool, block_size: int, is_causal: bool
    ) -> None:
        self._block_size = block_size
        wide, narrow = torch.int64, torch.int32
        sizes: dict[str, tuple[int, torch.dtype]] = {
            "token_T": (num_tokens, wide),
            "pos_T": (num_tokens, wide),
            "start_S": (num_rows + 1, narrow),
            "chosen_R": (num_rows, wide),
        }
        if has_types:
            sizes["type_T"] = num_tokens, wide
        if is_causal:
            sizes |= {"slot_T": (num_tokens, wide), "block_R": (num_rows, narrow)}
        self.fields: dict[str, tuple[int, int, torch.dtype]] = {}
        self.num_bytes = 0
        for name, (size, dtype) in sizes.items():
            self.fields[name] = self.num_bytes, size, dtype
            self.num_bytes += -(-size * dtype.itemsize // ALIGNED) * ALIGNED

    def filled(self, sequences: Sequence[PoolSequence], *, is_last: bool) -> np.ndarray:
        """The bytes of all inputs, padded. `is_last`: rows are chosen by their last tokens, else by
        the first."""
        whole = np.zeros(self.num_bytes, np.uint8)
        at = {
            name: whole[first : first + size * dtype.itemsize].view(f"i{dtype.itemsize}")
            for name, (first, size, dtype) in self.fields.items()
        }
        len_R = np.array([len(one.token_ids) for one in sequences])
        end_R = len_R.cumsum()
        first_R, num_tokens, num_rows = end_R - len_R, int(end_R[-1]), len(sequences)
        ids = chain.from_iterable(one.token_ids for one in sequences)
        at["token_T"][:num_tokens] = np.fromiter(ids, np.int64, num_tokens)
        pos_T = np.arange(num_tokens) - np.repeat(first_R, len_R)
        at["pos_T"][:num_tokens] = pos_T
        at["start_S"][1 : num_rows + 1] = end_R
        at["start_S"][num_rows + 1 :] = num_tokens
        at["chosen_R"][:num_rows] = end_R - 1 if is_last else first_R
        if "type_T" in at:
            second_R = np.array([one.second_at or len(one.token_ids) for one in sequences])
            at["type_T"][:num_tokens] = pos_T >= np.repeat(second_R, len_R)
        if "slot_T" in at:
            num_R = -(-len_R // self._block_size)
            block_R = num_R.cumsum() - num_R
            at["block_R"][:num_rows] = block_R
            at["block_R"][num_rows:] = block_R[-1] + num_R[-1]
            at["slot_T"][:num_tokens] = pos_T + np.repeat(block_R * self._block_size, len_R)
            at["slot_T"][num_tokens:] = (block_R[-1] + num_R[-1]) * self._block_size
        return whole
