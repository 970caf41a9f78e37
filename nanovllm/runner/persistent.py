"""Decode steps whose layers and head are one launch (docs/persistent.md).

R rows | D hidden | V vocabulary
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.compile.lower.persistent import plan as plans
from nanovllm.compile.lower.persistent import schedule as schedules
from nanovllm.compile.lower.persistent import step as lowered
from nanovllm.compile.lower.persistent.plan import Unfit
from nanovllm.compile.lower.persistent.step import Inputs as Inputs
from nanovllm.compile.lower.persistent.step import Step, Weights
from nanovllm.compile.trace import input_leaves
from nanovllm.models.model import VARYING, Batch, Kept, LayerCache, LayerCall, Model, Params
from nanovllm.platforms.attention import Attention
from nanovllm.platforms.base import HostCopy

logger = logging.getLogger(__name__)


class Parts(NamedTuple):
    """What decode steps of all sizes share. `is_plain`: nothing runs between layers, and all have
    one rotary table."""

    model: Model
    params: Params
    caches: tuple[Kept, ...]
    cos_sin_MH: Tensor
    attention: Attention
    is_plain: bool


class PersistentSteps:
    """The steps of one model and cache, by rows, and why other sizes run without.

    `has_clocks` keeps the times of tasks, for profiles.
    """

    def __init__(self, device: torch.device, *, has_clocks: bool = False) -> None:
        self.device, self.has_clocks = device, has_clocks
        self.steps: dict[int, Step] = {}
        self.reasons: dict[int, str] = {}

    def prepare(self, parts: Parts, h_RD: Tensor, batch: Batch) -> None:
        """Build the step of so many rows, with any inputs, before it is captured."""
        num_rows = len(h_RD)
        if num_rows in self.steps or num_rows in self.reasons:
            return
        try:
            num_programs = lowered.num_programs(self.device)
            weights = weights_of(parts, h_RD, batch)
            schedule = schedules.build(weights.plan, num_programs)
            step = lowered.build(weights, schedule, self.device, has_clocks=self.has_clocks)
            step.load()
            self.steps[num_rows] = step
            logger.info("a decode step of %d row(s) is one kernel", num_rows)
        except Unfit as why:
            self.reasons[num_rows] = str(why)
            logger.info("a decode step of %d row(s) is several kernels: %s", num_rows, why)

    def logits(self, cos_sin_MH: Tensor, h_RD: Tensor, batch: Batch) -> Tensor | None:
        """The logits [R, V] of a prepared step, or None where other programs run."""
        step = self.steps.get(len(h_RD))
        if step is None:
            return None
        logits_RV = h_RD.new_empty(len(h_RD), step.schedule.plan.vocab)
        places = batch.rope_pos_T, batch.slot_T, batch.block_table_RP, batch.seq_len_R
        step.run(Inputs(h_RD, logits_RV, cos_sin_MH, *places))
        return logits_RV

    def check_later(
        self, num_rows: int, read_back: Callable[[Tensor], HostCopy]
    ) -> Callable[[], None] | None:
        """What raises `Stuck` if the step that was launched last has failed, once it is done; None
        for steps of other programs."""
        step = self.steps.get(num_rows)
        if step is None:
            return None
        status = read_back(step.buffers.status)
        return lambda: step.raise_if_failed(status.tolist())


def weights_of(parts: Parts, h_RD: Tensor, batch: Batch) -> Weights:
    """The plan and the tensors of a decode step. Raises Unfit."""
    model, params = parts.model, parts.params
    kind = model.layer_kinds[0]
    if set(model.layer_kinds) != {kind} or not parts.is_plain:
        raise Unfit("its layers are not all alike, or something runs between them")
    if batch.adapters is not None or batch.rope_pos_T.dim() != 1:
        raise Unfit("it has adapters, or several positions of a token")
    if not all(isinstance(cache, LayerCache) for cache in parts.caches):
        raise Unfit("its layers do not keep keys and values")
    key = parts.attention.key(1, len(h_RD))
    layer = partial(model.layer, model.config, LayerCall(key, kind, 1))
    shared = {"cos_sin_MH": parts.cos_sin_MH, "batch": batch, "h_TD": h_RD}
    inputs: list[dict[str, object]] = [
        {"w": w, "kv": kv, **shared} for w, kv in zip(params.layers, parts.caches, strict=True)
    ]
    of_head: dict[str, object] = {
        "final_norm_D": params.final_norm_D, "head_VD": params.head_VD, "h_RD": h_RD
    }  # fmt: skip
    head = partial(model.head, model.config)
    plan = plans.read(layer, inputs[0], head, of_head, len(inputs), varying=VARYING)
    return Weights(plan, [dict(input_leaves(one)) for one in inputs], dict(input_leaves(of_head)))
