"""Experts in host memory, a set of which is resident in slots on the device.

In steps with few tokens, each layer gives the experts that its tokens chose a slot (see
`reference.offload.fetch_experts`) and reads those that got none in the host's memory. In steps with
many tokens nearly every expert is chosen. Then all experts of a layer without a slot are streamed
to a buffer, and slots stay as they are. With two buffers, a layer's experts are copied while the
previous layer computes.

T tokens | K experts per token | E experts | I ids | S slots | B entries of a buffer | D hidden
F expert width | G = 2F | C counters
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.kernels.reference.offload import COUNTERS as COUNTERS

# Layers are streamed in steps with at least this many (token, expert) pairs per expert. If pairs
# are spread evenly, 98 % of the experts are chosen then.
STREAMED_PAIRS_PER_EXPERT = 4


class Buffer(NamedTuple):
    """See `reference.offload.stream_experts`."""

    slot_I: Tensor
    gate_up_BGD: Tensor
    down_BDF: Tensor


class Residents(NamedTuple):
    """A set of slots and its table: see `reference.offload.fetch_experts`."""

    slots_gate_up_SGD: Tensor
    slots_down_SDF: Tensor
    slot_I: Tensor
    owner_S: Tensor
    stamp_S: Tensor
    clock_1: Tensor


class Offloaded(NamedTuple):
    """Host tensors hold all experts and are read by the device in place.

    Without a buffer no step is streamed. Layers may share residents and buffers.
    """

    host_gate_up_EGD: Tensor
    host_down_EDF: Tensor
    residents: Residents
    first_1: Tensor
    counters_C: Tensor
    buffer: Buffer | None

    @property
    def num_experts(self) -> int:
        return self.host_gate_up_EGD.shape[0]

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return (self.host_gate_up_EGD.nbytes + self.host_down_EDF.nbytes) // self.num_experts


Stored = Offloaded


@dataclass(frozen=True)
class OffloadPlan:
    """The placement of a model's experts.

    num_slots: slots of one set. num_layers: sparse layers. is_shared: all layers share one set,
    because there is not a slot for each active expert of each layer. num_buffers: 0, 1 or 2.
    predicts: see `LayerCall`.
    """

    num_slots: int
    num_layers: int
    is_shared: bool = False
    num_buffers: int = 0
    predicts: bool = False

    def __str__(self) -> str:
        where = "of all layers together" if self.is_shared else "of each layer"
        return (
            f"{self.num_slots} {where} are resident, all are on the host; "
            f"{self.num_buffers} buffer(s) for layers that are streamed"
            f"{'; experts are predicted' if self.predicts else ''}"
        )

    @property
    def num_resident(self) -> int:
        """Slots of all sets."""
        return self.num_slots * (1 if self.is_shared else self.num_layers)

    def num_entries(self, num_experts: int) -> int:
        """Entries of a buffer: the experts of a layer that can be without a slot."""
        return num_experts if self.is_shared else num_experts - self.num_slots


# in a layer's region ------------------------------------------------------------------------------


def prepare(
    expert_TK: Tensor,
    stored: Offloaded,
    kv_slot_T: Tensor,
    num_pad_slots: int,
    *,
    ahead: bool = False,
) -> Tensor:
    """Give chosen experts their slots, unless the layer is streamed.

    Returns the experts for `apply`, in which padding has those of the first token. A token whose
    cache slot is below `num_pad_slots` is padding. `ahead` marks a prediction: its experts are
    fetched beside the launches that follow.
    """
    if is_streamed(stored, expert_TK.numel()):
        return expert_TK
    return ops.fetch_experts(
        expert_TK,
        kv_slot_T,
        num_pad_slots,
        stored.first_1,
        stored.counters_C,
        stored.host_gate_up_EGD,
        stored.host_down_EDF,
        *stored.residents,
        ahead,
    )


def apply(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    stored: Offloaded,
    residual_TD: Tensor | None,
) -> Tensor:
    """See `experts.apply`."""
    slots, slot_I = stored.residents[:2], stored.residents.slot_I
    others = (stored.host_gate_up_EGD, stored.host_down_EDF)
    if stored.buffer is not None and is_streamed(stored, expert_TK.numel()):
        slot_I, others = stored.buffer.slot_I, stored.buffer[1:]
    return ops.offloaded_experts(
        x_TD,
        weight_TK,
        expert_TK,
        stored.num_experts,
        stored.first_1,
        slot_I,
        *slots,
        *others,
        residual_TD,
    )


def is_streamed(stored: Any, num_pairs: int) -> bool:
    """Whether a step with `num_pairs` (token, expert) pairs streams a layer with these experts."""
    return (
        isinstance(stored, Offloaded)
        and stored.buffer is not None
        and num_pairs >= STREAMED_PAIRS_PER_EXPERT * stored.num_experts
    )


# between layers -----------------------------------------------------------------------------------


def stream(stored: Offloaded) -> tuple[()]:
    """Copy the layer's experts without a slot to its buffer."""
    assert stored.buffer is not None
    host = (stored.host_gate_up_EGD, stored.host_down_EDF)
    ops.stream_experts(
        stored.first_1, stored.residents.slot_I, stored.counters_C, *host, *stored.buffer
    )
    return ()


def streamed_before(stored: Sequence[Any], num_pairs: Sequence[int]) -> list[list[Offloaded]]:
    """For each layer of a step, the layers to `stream` before it runs: each as soon as its buffer
    is free.

    `stored` are the layers' experts, `num_pairs` the (token, expert) pairs of each.
    """
    before: list[list[Offloaded]] = [[] for _ in stored]
    free_from: dict[int, int] = {}
    for layer_idx, (one, num) in enumerate(zip(stored, num_pairs)):
        if is_streamed(one, num):
            before[free_from.get(id(one.buffer), 0)].append(one)
            free_from[id(one.buffer)] = layer_idx + 1
    return before


# loading ------------------------------------------------------------------------------------------


class Host(Protocol):
    """Host memory that the device can read."""

    def host_empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A new tensor for the processor."""

    def seen(self, tensor: Tensor) -> Tensor:
        """The same memory as a tensor of the device."""


class Offloader:
    """Makes the experts of a model's layers, one layer after another. Other weights stay as they
    are: it is the loader's `place`."""

    def __init__(self, plan: OffloadPlan, host: Host, device: torch.device) -> None:
        self.plan, self._host, self._device = plan, host, device
        self._shared: Residents | None = None
        self._buffers: list[Buffer] = []
        self._num_made = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory for the matrices of all experts of a layer, to be written by the processor."""
        return self._host.host_empty(shape, dtype)

    def stored(self, gate_up_EGD: Tensor, down_EDF: Tensor) -> Offloaded:
        """The next layer's experts, whose tensors are those of `empty`."""
        layer_idx, self._num_made = self._num_made, self._num_made + 1
        num_experts, both = gate_up_EGD.shape[0], (gate_up_EGD, down_EDF)
        first = layer_idx * num_experts if self.plan.is_shared else 0
        residents = self._shared or self._new_residents(both)
        if self.plan.is_shared:
            self._shared = residents
            _fill(residents, first, both)
        return Offloaded(
            self._host.seen(gate_up_EGD),
            self._host.seen(down_EDF),
            residents,
            torch.full((1,), first, dtype=torch.int32, device=self._device),
            torch.zeros(len(COUNTERS), dtype=torch.int64, device=self._device),
            self._buffer(layer_idx, both),
        )

    def _new_residents(self, both: tuple[Tensor, Tensor]) -> Residents:
        """Slots of the first ids. For shared slots the experts must still be copied there."""
        plan, num_experts, device = self.plan, both[0].shape[0], self._device
        if plan.is_shared:
            slots = _entries(plan.num_slots, both, device)
        else:
            gate_up, down = (one.narrow(0, 0, plan.num_slots) for one in both)
            slots = gate_up.to(device, copy=True), down.to(device, copy=True)
        num_ids = num_experts * (plan.num_layers if plan.is_shared else 1)
        slot_I, owner_S = _first_tables(num_ids, num_experts, plan.num_slots)
        return Residents(
            *slots,
            slot_I.to(device),
            owner_S.to(device),
            torch.zeros(plan.num_slots, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )

    def _buffer(self, layer_idx: int, both: tuple[Tensor, Tensor]) -> Buffer | None:
        """The buffers take turns."""
        plan, num_experts = self.plan, both[0].shape[0]
        num_entries = plan.num_entries(num_experts)
        if not plan.num_buffers or not num_entries:
            return None
        if len(self._buffers) < plan.num_buffers:
            num_ids = num_experts * (plan.num_layers if plan.is_shared else 1)
            slot_I = torch.zeros(num_ids, dtype=torch.int32, device=self._device)
            self._buffers.append(Buffer(slot_I, *_entries(num_entries, both, self._device)))
        return self._buffers[layer_idx % plan.num_buffers]


def reset(stored: Offloaded) -> None:
    """Make the first experts resident again, whatever tables and slots hold. The device must be
    idle. Layers that share slots must all be reset."""
    residents = stored.residents
    slot_I, owner_S = residents.slot_I, residents.owner_S
    for table, first in zip(
        (slot_I, owner_S), _first_tables(len(slot_I), stored.num_experts, len(owner_S))
    ):
        table.copy_(first)
    _fill(residents, int(stored.first_1), stored[:2])


def _first_tables(num_ids: int, num_experts: int, num_slots: int) -> tuple[Tensor, Tensor]:
    """slot_I and owner_S for slots of the first ids."""
    id_I = torch.arange(num_ids, dtype=torch.int32)
    return torch.where(id_I < num_slots, id_I, -1 - id_I % num_experts), id_I[:num_slots].clone()


def _fill(residents: Residents, first: int, both: tuple[Tensor, Tensor]) -> None:
    """Copy the experts of a layer, whose first id is `first`, to the slots of the first ids."""
    for slots, weights in zip(residents[:2], both):
        filled = slots[first : first + len(weights)]
        filled.copy_(weights[: len(filled)])


def _entries(num: int, both: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for `num` experts."""
    gate_up, down = (one.new_empty((num, *one.shape[1:]), device=device) for one in both)
    return gate_up, down
