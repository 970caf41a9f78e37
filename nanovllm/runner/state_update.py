"""Writes the host's updates of the state: rows of new requests, new blocks, and the sampler's
tables.

L tokens | R rows | N new blocks | P blocks per row | F sampling fields | S rows of the state
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch

from nanovllm.platforms.base import Platform
from nanovllm.runner.masks import ALL, WORD_TOKENS
from nanovllm.runner.sampling import Sampler
from nanovllm.runner.state import DeviceState
from nanovllm.schedule.plan import PAD_BLOCK, StepPlan


def write(plan: StepPlan, state: DeviceState, sampler: Sampler, platform: Platform) -> None:
    """Write a plan's data to the device. Raises ValueError for an adapter if the model has none."""
    if plan.settings:
        _write_rows(plan, state, platform)
        sampler.edits.clear(row.row for row in plan.settings)
    for group, table_SP in enumerate(state.block_tables if plan.new_blocks else ()):
        if new := [one for one in plan.new_blocks if one[1] == group]:
            row_N, _, index_N, block_N = platform.upload(new, torch.int64).unbind(1)
            table_SP.index_put_((row_N, index_N), block_N.int())
    for past in plan.past:
        assert state.past_C is not None
        tokens = platform.upload(past.token_ids, torch.int32)
        state.past_C.narrow(0, past.start, len(tokens)).copy_(tokens)
    if plan.known:
        _write_history(plan, state, platform)
    sampler.remember(plan.histories)
    sampler.edits.write(plan.edits)
    if plan.sampling.has_masks:
        masked, nums, allowed_MW = _masks(plan, sampler.masks.num_words)
        sampler.masks.write(plan.rows, [plan.rows[row] for row in masked], allowed_MW, nums)


def _masks(plan: StepPlan, num_words: int) -> tuple[list[int], list[int], np.ndarray]:
    """The masked rows of the step, with those that must not choose some tokens, how many masks each
    has, and the masks."""
    masked, forbidden = plan.sampling.masked, plan.sampling.forbidden
    others = [row for row in dict(forbidden) if row not in masked]
    nums = plan.masks_of + [1] * len(others)
    allowed_MW = np.full((sum(nums), num_words), ALL, np.int32)
    if plan.allowed_MW is not None:
        allowed_MW[: len(plan.allowed_MW), : plan.allowed_MW.shape[1]] = plan.allowed_MW
    starts = accumulate(nums, initial=0)
    place = dict(zip((*masked, *others), starts))
    for row, token_id in forbidden:  # of rows that feed one token
        word, bit = divmod(token_id, WORD_TOKENS)
        allowed_MW.view(np.uint32)[place[row], word] &= ~np.uint32(1 << bit)
    return [*masked, *others], nums, allowed_MW


def _write_rows(plan: StepPlan, state: DeviceState, platform: Platform) -> None:
    rows, upload = plan.settings, platform.upload
    adapters = [row.adapter for row in rows]
    if state.adapter_S is None and any(adapters):
        raise ValueError(f"adapter {max(adapters)} is not loaded: only 0, none, is")
    numbers = [(row.row, row.pos, row.rope_offset, row.seed) for row in rows]
    row_R, *columns = upload(numbers, torch.int64).unbind(1)
    for target, values in zip((state.pos_S, state.rope_offset_S, state.seed_S), columns):
        target.index_copy_(0, row_R, values)
    if state.adapter_S is not None:
        state.adapter_S.index_copy_(0, row_R, upload(adapters, torch.int64))
    sampling_RF = upload([row.sampling for row in rows], torch.float32)
    state.sampling_SF.index_copy_(0, row_R, sampling_RF)
    for group, table_SP in enumerate(state.block_tables):
        tables = np.full((len(rows), table_SP.shape[1]), PAD_BLOCK, np.int32)
        for table_P, row in zip(tables, rows):
            table_P[: len(row.blocks[group])] = row.blocks[group]
        table_SP.index_copy_(0, row_R, upload(tables, torch.int32))


def _write_history(plan: StepPlan, state: DeviceState, platform: Platform) -> None:
    """The tokens that the rows of a proposer's history begin with. What follows them is not read
    before a step has written it."""
    assert state.history_SM is not None
    longest = max(len(one.token_ids) for one in plan.known)
    token_RL = np.zeros((len(plan.known), longest), np.int32)
    for token_L, one in zip(token_RL, plan.known):
        token_L[: len(one.token_ids)] = one.token_ids
    row_R = platform.upload([one.row for one in plan.known], torch.int64)
    target_SL = state.history_SM.narrow(1, 0, longest)
    target_SL.index_copy_(0, row_R, platform.upload(token_RL, torch.int32))
