"""Decode steps whose layers and head are one launch (docs/persistent.md).

R rows | D hidden | V vocabulary
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.compile.lower.persistent import plan as plans
from nanovllm.compile.lower.persistent import schedule as schedules
from nanovllm.compile.lower.persistent import step as lowered
from nanovllm.compile.lower.persistent.plan import Plan, Unfit
from nanovllm.compile.lower.persistent.schedule import Schedule
from nanovllm.compile.lower.persistent.step import Inputs as Inputs
from nanovllm.compile.lower.persistent.step import Step, Tensors, Weights
from nanovllm.compile.trace import input_leaves
from nanovllm.models.model import VARYING, Batch, Kept, LayerCache, LayerCall, Model, Params
from nanovllm.platforms.attention import Attention
from nanovllm.platforms.base import HostCopy

logger = logging.getLogger(__name__)

# up to these it is the default, without experts
FASTER_ROWS = 4
FASTER_GROUP = 4  # queries that share a key: steps with more have not been measured


class Parts(NamedTuple):
    """What decode steps of all sizes share. `is_plain`: nothing runs between layers, and all have
    one rotary table."""

    model: Model
    params: Params
    caches: tuple[Kept, ...]
    cos_sin_MH: Tensor
    attention: Attention
    is_plain: bool


def chosen(device: torch.device, asked: bool | None) -> PersistentSteps | None:
    """The steps of an engine whose option says `asked`: None takes the models and rows of which
    they are faster, where the device may have them."""
    if asked is None and lowered.is_nvidia(device):
        return PersistentSteps(device, max_rows=FASTER_ROWS, is_asked=False)
    return PersistentSteps(device) if asked else None


class PersistentSteps:
    """The steps of one model and cache, by rows, and why other sizes run without.

    max_rows: of larger steps none is one kernel. is_asked: all models are taken that fit, though
    some are slower so, and the log says why a step is several kernels. has_clocks: the times of
    tasks are kept, for profiles.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        max_rows: int = plans.MAX_ROWS,
        is_asked: bool = True,
        has_clocks: bool = False,
    ) -> None:
        self.device, self.max_rows, self.has_clocks = device, max_rows, has_clocks
        self.is_asked = is_asked
        self.steps: dict[int, Step] = {}
        self.reasons: dict[int, str] = {}
        self._schedules: dict[int, Schedule] = {}
        self._kernels: dict[int, Future[object]] = {}

    def may_take(self, num_rows: int) -> bool:
        """Whether steps of so many rows may be one kernel, before a model is read."""
        try:
            lowered.num_programs(self.device)
            if num_rows > self.max_rows:
                raise Unfit(f"{num_rows} rows are more than {self.max_rows}")
        except Unfit as why:
            self._refuse(num_rows, why)
        return num_rows not in self.reasons

    def why_not(self, plan: Plan) -> str | None:
        """Why a step that fits is several kernels unless an option says otherwise."""
        if self.is_asked:
            return None
        if plan.experts is not None:
            return "with experts several kernels are faster"
        is_many = plan.num_heads > FASTER_GROUP * plan.num_kv_heads
        return f"more than {FASTER_GROUP} queries share a key" if is_many else None

    def begin(self, parts: Parts, h_RD: Tensor, batch: Batch, sizes: Sequence[int]) -> None:
        """Read the model, and compile the kernels of steps of `sizes` rows in other threads."""
        try:
            plan = weights_of(parts, h_RD, batch).plan
            if why_not := self.why_not(plan):
                raise Unfit(why_not)
        except Unfit as why:
            for num_rows in sizes:
                self._refuse(num_rows, why)
            return
        num_programs = lowered.num_programs(self.device)
        compiling = ThreadPoolExecutor(len(sizes), "persistent")
        compile_kernel = partial(
            lowered.compile_kernel, device=self.device, has_clocks=self.has_clocks
        )
        for num_rows in sizes:
            try:
                schedule = schedules.build(plan._replace(num_rows=num_rows), num_programs)
            except Unfit as why:
                self._refuse(num_rows, why)
                continue
            self._schedules[num_rows] = schedule
            self._kernels[num_rows] = compiling.submit(compile_kernel, schedule)
        compiling.shutdown(wait=False)

    def prepare(self, parts: Parts, h_RD: Tensor, batch: Batch) -> None:
        """Build the step of so many rows, with any inputs, before it is captured."""
        num_rows = len(h_RD)
        if num_rows in self.steps or not self.may_take(num_rows):
            return
        if num_rows not in self._kernels:
            self.begin(parts, h_RD, batch, [num_rows])
        if num_rows in self.reasons:
            return
        try:
            schedule = self._schedules[num_rows]
            weights = Weights(schedule.plan, *_inputs(parts, h_RD, batch))
            step = lowered.build(weights, schedule, self.device, has_clocks=self.has_clocks)
        except Unfit as why:
            self._refuse(num_rows, why)
            return
        self._kernels[num_rows].result()
        step.load()
        self.steps[num_rows] = step
        logger.info("a decode step of %d row(s) is one kernel", num_rows)

    def _refuse(self, num_rows: int, why: Unfit) -> None:
        if num_rows not in self.reasons:
            self.reasons[num_rows] = str(why)
            message = "a decode step of %d row(s) is several kernels: %s"
            level = logging.INFO if self.is_asked else logging.DEBUG
            logger.log(level, message, num_rows, why)

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
    model = parts.model
    kind = model.layer_kinds[0]
    if set(model.layer_kinds) != {kind} or not parts.is_plain:
        raise Unfit("its layers are not all alike, or something runs between them")
    if batch.adapters is not None or batch.rope_pos_T.dim() != 1:
        raise Unfit("it has adapters, or several positions of a token")
    if not all(isinstance(cache, LayerCache) for cache in parts.caches):
        raise Unfit("its layers do not keep keys and values")
    key = parts.attention.key(1, len(h_RD))
    layer = partial(model.layer, model.config, LayerCall(key, kind, 1))
    head = partial(model.head, model.config)
    given = _layer_inputs(parts, h_RD, batch)
    plan = plans.read(layer, given[0], head, _head_inputs(parts, h_RD), len(given), varying=VARYING)
    return Weights(plan, *_inputs(parts, h_RD, batch))


def _inputs(parts: Parts, h_RD: Tensor, batch: Batch) -> tuple[list[Tensors], Tensors]:
    """The tensors of the layers and of the head, by the names of their inputs."""
    layers: list[Tensors] = [dict(input_leaves(one)) for one in _layer_inputs(parts, h_RD, batch)]
    return layers, dict(input_leaves(_head_inputs(parts, h_RD)))


def _layer_inputs(parts: Parts, h_RD: Tensor, batch: Batch) -> list[dict[str, object]]:
    shared = {"cos_sin_MH": parts.cos_sin_MH, "batch": batch, "h_TD": h_RD}
    own = zip(parts.params.layers, parts.caches, strict=True)
    return [{"w": w, "kv": kv, **shared} for w, kv in own]


def _head_inputs(parts: Parts, h_RD: Tensor) -> dict[str, object]:
    params = parts.params
    return {"final_norm_D": params.final_norm_D, "head_VD": params.head_VD, "h_RD": h_RD}
