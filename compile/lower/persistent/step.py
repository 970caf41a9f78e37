"""A decode step as one launch: its schedule, its memory, and what it says of a vain wait."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.compile.lower.persistent import schedule as schedules
from nanovllm.compile.lower.persistent.plan import Plan, Unfit
from nanovllm.compile.lower.persistent.schedule import Schedule
from nanovllm.kernels.cuda import persistent
from nanovllm.kernels.cuda.persistent import Buffers, Numbers, Sizes
from nanovllm.kernels.cuda.persistent import Inputs as Inputs

Tensors = Mapping[str, Tensor]  # by the names of a region's inputs


class Stuck(RuntimeError):
    """A task has waited for words that no task wrote."""


class Weights(NamedTuple):
    """The tensors of a step's regions: of each layer and of the head.

    kept: by layers, [R, D] where the hidden states after them are stored too, of the same strides.
    """

    plan: Plan
    layers: Sequence[Tensors]
    head: Tensors
    kept: Mapping[int, Tensor] = {}

    def find(self, layer: int, name: str) -> Tensor | None:
        """What tasks call `name`, of a layer or, with −1, of the head; None without one."""
        if layer < 0:
            source = self.plan.head_inputs.get(name)
            return None if source is None else self.head[source]
        if name == "kept":
            return self.kept.get(layer)
        source = self.plan.layer_inputs.get(name)
        return None if source is None else self.layers[layer][source]


class Step(NamedTuple):
    """Tasks have the addresses of its weights."""

    schedule: Schedule
    sizes: Sizes
    buffers: Buffers
    numbers: Numbers
    weights: Weights

    def run(self, inputs: Inputs) -> None:
        """Launch the step. It can be captured."""
        persistent.launch(self.sizes, self.buffers, inputs, self.numbers)

    def load(self) -> None:
        """Compile and load the kernel, which cannot be done while a step is captured."""
        persistent.load(self.sizes, self.buffers.words.device)

    def check(self) -> None:
        """Raises Stuck if a step has failed since the last call of `reset`. It synchronises."""
        self.raise_if_failed(self.buffers.status.tolist())

    def raise_if_failed(self, status: Sequence[int]) -> None:
        """Raises Stuck if `buffers.status`, read by the caller, says so."""
        failed, program, task_idx, phase, thread, *_ = status
        if failed:
            raise Stuck(
                f"program {program}, thread {thread} waited in vain in "
                f"{self.schedule.task_name(program, task_idx)!r} for "
                f"{self.schedule.phase_name(phase)}"
            )

    def reset(self) -> None:
        """Make steps run again after a failed one."""
        for one in (self.buffers.words, self.buffers.steps, self.buffers.status):
            one.zero_()


def is_nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def num_programs(device: torch.device) -> int:
    """The multiprocessors of a GPU, each of which has a program. Raises Unfit for other devices
    than GPUs of compute capability 9.0."""
    if not is_nvidia(device):
        raise Unfit(f"device {device.type!r} is not an NVIDIA GPU")
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) != (9, 0):
        found = f"{properties.major}.{properties.minor}"
        raise Unfit(f"the GPU has compute capability {found}, not 9.0")
    return int(properties.multi_processor_count)


def compile_kernel(schedule: Schedule, device: torch.device, *, has_clocks: bool = False) -> None:
    """Compile a step's kernel, so that `Step.load` finds it on disk. It may run in any thread."""
    persistent.compile_kernel(schedule.sizes._replace(has_clocks=has_clocks), device)


def build(
    weights: Weights,
    schedule: Schedule,
    device: torch.device,
    *,
    max_polls: int = persistent.MAX_POLLS,
    has_clocks: bool = False,
) -> Step:
    """The step of a schedule. Raises Unfit."""
    plan, sizes = weights.plan, schedule.sizes._replace(has_clocks=has_clocks)
    if sizes.num_stages < persistent.MIN_STAGES:
        raise Unfit(
            f"{plan.num_rows} rows leave room for {sizes.num_stages} stages of weights, not "
            f"{persistent.MIN_STAGES}"
        )
    cache, strides = _cache(weights)

    def address(layer: int, name: str) -> int:
        found = weights.find(layer, name)
        if found is None:
            return 0
        if found.data_ptr() % 16:
            raise Unfit(f"{name} of layer {layer} is not at a multiple of 16 bytes")
        return found.data_ptr()

    tasks = schedules.packed(schedule, address)
    buffers = Buffers.new(sizes, tasks, len(schedule.programs), schedule.num_words, device)
    kept_stride = next((one.stride(0) for one in weights.kept.values()), 0)
    numbers = Numbers(
        strides, kept_stride, cache.shape[1], schedule.num_phases, plan.eps, plan.scale, max_polls
    )
    return Step(schedule, sizes, buffers, numbers, weights)


def _cache(weights: Weights) -> tuple[Tensor, tuple[int, ...]]:
    """The keys of a layer, and the strides of all keys and values."""
    names = (weights.plan.layer_inputs["keys"], weights.plan.layer_inputs["values"])
    every = [layer[name] for layer in weights.layers for name in names]
    strides = {one.stride() for one in every}
    if len(strides) > 1 or every[0].stride(3) != 1 or any(n % 8 for n in every[0].stride()[:3]):
        raise Unfit(f"the caches of keys and values have strides {sorted(strides)}")
    return every[0], every[0].stride()[:3]
