"""Decode steps whose layers and head are one launch (docs/persistent.md).

R rows | D hidden | V vocabulary
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.compile import keys
from nanovllm.compile.lower.persistent import plan as plans
from nanovllm.compile.lower.persistent import schedule as schedules
from nanovllm.compile.lower.persistent import step as lowered
from nanovllm.compile.lower.persistent import stored_plan
from nanovllm.compile.lower.persistent.plan import Plan, Unfit
from nanovllm.compile.lower.persistent.schedule import Schedule
from nanovllm.compile.lower.persistent.step import Inputs as Inputs
from nanovllm.compile.lower.persistent.step import Step, Tensors, Weights
from nanovllm.compile.program import Compiler
from nanovllm.compile.trace import input_leaves
from nanovllm.models.model import Batch, Kept, LayerCache, LayerCall, Model, Params
from nanovllm.platforms.attention import Attention
from nanovllm.platforms.base import HostCopy

logger = logging.getLogger(__name__)

# Up to so many rows one kernel is faster, and up to MAX_ROWS with long layers of an MLP in bf16 and
# so many queries that share a key (docs/benchmarks.md).
FASTER_ROWS, FASTER_GROUP = 4, 4


class Form(NamedTuple):
    """Of a step: the rows that its layers have, and whether these may be tokens of one request, one
    after the other."""

    num_rows: int
    has_several: bool = False


class Parts(NamedTuple):
    """What decode steps of all sizes share. `is_plain`: nothing runs between layers, and all have
    one rotary table. The plan is in the store of `compiler`."""

    model: Model
    params: Params
    caches: tuple[Kept, ...]
    cos_sin_MH: Tensor
    attention: Attention
    compiler: Compiler
    is_plain: bool


def chosen(
    device: torch.device, asked: bool | None, kept: Mapping[int, Tensor]
) -> PersistentSteps | None:
    """The steps of an engine whose option says `asked`: None takes the models and rows of which
    they are faster, where the device may have them. kept: see `Weights`."""
    if asked is None and lowered.is_nvidia(device):
        return PersistentSteps(device, is_asked=False, kept=kept)
    return PersistentSteps(device, kept=kept) if asked else None


class PersistentSteps:
    """The steps of one model and cache, by form, and why other forms run without.

    is_asked: all models are taken that fit, though some are slower so, and the log says why a step
    is several kernels. has_clocks: the times of tasks are kept, for profiles. kept: where hidden
    states after layers are stored, see `Weights`.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        is_asked: bool = True,
        has_clocks: bool = False,
        kept: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.device, self.is_asked, self.has_clocks = device, is_asked, has_clocks
        self.kept = kept or {}
        self.steps: dict[Form, Step] = {}
        self.reasons: dict[Form, str] = {}
        self._schedules: dict[Form, Schedule] = {}
        self._kernels: dict[Form, Future[object]] = {}

    def may_take(self, form: Form) -> bool:
        """Whether steps of a form may be one kernel, before a model is read."""
        try:
            lowered.num_programs(self.device)
            if form.num_rows > plans.MAX_ROWS:
                raise Unfit(f"{form.num_rows} rows are more than {plans.MAX_ROWS}")
        except Unfit as why:
            self._refuse(form, why)
        return form not in self.reasons

    def why_not(self, schedule: Schedule) -> str | None:
        """Why a step that fits is several kernels unless an option says otherwise."""
        plan = schedule.plan
        if self.is_asked:
            return None
        if plan.has_bias:
            return "with biases it has not been measured"
        is_long = schedule.has_long_layers
        if plan.codes is not None and not (
            schedule.has_whole_chunks and (is_long or plan.experts is not None)
        ):
            return (
                "with weights in codes one kernel is faster only in long layers, or experts, whose "
                f"depths are multiples of {schedule.sizes.max_chunk}"
            )
        if plan.num_rows <= FASTER_ROWS:
            return None
        is_wide = plan.num_heads > FASTER_GROUP * plan.num_kv_heads
        if plan.experts is not None or plan.codes is not None or is_wide or not is_long:
            return f"with more than {FASTER_ROWS} rows several kernels are faster"
        return None

    def begin(self, parts: Parts, h_RD: Tensor, batch: Batch, forms: Sequence[Form]) -> None:
        """Read the model, and compile the kernels of steps of `forms` in other threads."""
        try:
            plan = plan_of(parts, h_RD, batch)
        except Unfit as why:
            for form in forms:
                self._refuse(form, why)
            return
        plan = plan._replace(keeps=bool(self.kept))
        num_programs = lowered.num_programs(self.device)
        compiling = ThreadPoolExecutor(len(forms), "persistent")
        compile_kernel = partial(
            lowered.compile_kernel, device=self.device, has_clocks=self.has_clocks
        )
        for form in forms:
            try:
                schedule = schedules.build(plan._replace(**form._asdict()), num_programs)
                if why_not := self.why_not(schedule):
                    raise Unfit(why_not)
            except Unfit as why:
                self._refuse(form, why)
                continue
            self._schedules[form] = schedule
            self._kernels[form] = compiling.submit(compile_kernel, schedule)
        compiling.shutdown(wait=False)

    def prepare(
        self, parts: Parts, h_RD: Tensor, batch: Batch, *, has_several: bool = False
    ) -> None:
        """Build the step of so many rows, with any inputs, before it is captured."""
        form = Form(len(h_RD), has_several)
        if form in self.steps or not self.may_take(form):
            return
        if form not in self._kernels:
            self.begin(parts, h_RD, batch, [form])
        if form in self.reasons:
            return
        try:
            schedule = self._schedules[form]
            weights = Weights(schedule.plan, *_inputs(parts, h_RD, batch), self.kept)
            step = lowered.build(weights, schedule, self.device, has_clocks=self.has_clocks)
        except Unfit as why:
            self._refuse(form, why)
            return
        self._kernels[form].result()
        step.load()
        self.steps[form] = step
        logger.info("a decode step of %s is one kernel", _named(form))

    def _refuse(self, form: Form, why: Unfit) -> None:
        if form not in self.reasons:
            self.reasons[form] = str(why)
            message = "a decode step of %s is several kernels: %s"
            level = logging.INFO if self.is_asked else logging.DEBUG
            logger.log(level, message, _named(form), why)

    def logits(
        self, cos_sin_MH: Tensor, h_RD: Tensor, batch: Batch, *, has_several: bool = False
    ) -> Tensor | None:
        """The logits [R, V] of a prepared step, or None where other programs run."""
        step = self.steps.get(Form(len(h_RD), has_several))
        if step is None:
            return None
        logits_RV = h_RD.new_empty(len(h_RD), step.schedule.plan.vocab)
        places = batch.rope_pos_T, batch.slot_T, batch.block_table_RP, batch.seq_len_R
        step.run(Inputs(h_RD, logits_RV, cos_sin_MH, *places))
        return logits_RV

    def check_later(
        self, form: Form, read_back: Callable[[Tensor], HostCopy]
    ) -> Callable[[], None] | None:
        """What raises `Stuck` if the step that was launched last has failed, once it is done; None
        for steps of other programs."""
        step = self.steps.get(form)
        if step is None:
            return None
        status = read_back(step.buffers.status)
        return lambda: step.raise_if_failed(status.tolist())


def _named(form: Form) -> str:
    return f"{form.num_rows} {'token' if form.has_several else 'row'}(s)"


def plan_of(parts: Parts, h_RD: Tensor, batch: Batch) -> Plan:
    """The plan of a decode step, from the store if it has one. Raises Unfit."""
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
    reading = partial(plans.read, layer, head)
    of_layer, of_head = _layer_inputs(parts, h_RD, batch)[0], _head_inputs(parts, h_RD)

    def make() -> bytes:
        try:
            found: Plan | Unfit = reading(of_layer, of_head, varying=parts.compiler.varying)
        except Unfit as why:
            found = why
        return stored_plan.dump(found)

    found = parts.compiler.from_store(
        f"plan_{len(h_RD)}",
        stored_plan.KIND,
        reading,
        {**of_layer, **of_head},
        sources=keys.plan_sources(),
        make=make,
        load=stored_plan.load,
    )
    if isinstance(found, Unfit):
        raise found
    return found._replace(num_layers=len(parts.caches))


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
