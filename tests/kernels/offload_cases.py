"""Layers whose experts are in the host's memory, for tests: NaN fills what must not be read."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class Tables:
    """The arguments of `fetch_experts` after its routing, in their order."""

    first_1: Tensor
    counters_C: Tensor
    host_gate_up_EGD: Tensor
    host_down_EDF: Tensor
    slots_gate_up_SGD: Tensor
    slots_down_SDF: Tensor
    slot_I: Tensor
    owner_S: Tensor
    stamp_S: Tensor
    clock_1: Tensor

    @property
    def arguments(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def clone(self) -> Tables:
        return Tables(*(tensor.clone() for tensor in self.arguments))

    def layer(self, layer_idx: int, host_gate_up: Tensor, host_down: Tensor) -> Tables:
        """Another layer with these slots."""
        first_1 = torch.full_like(self.first_1, layer_idx * host_down.shape[0])
        return Tables(first_1, self.counters_C, host_gate_up, host_down, *self.arguments[4:])


def tables(
    num_experts: int,
    num_slots: int,
    hidden: int = 8,
    size: int = 4,
    *,
    num_layers: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Tables:
    """Slots with the first ids, of which only those of layer 0 hold weights."""
    num_ids = num_layers * num_experts
    host = (
        torch.randn(num_experts, 2 * size, hidden).to(device, dtype),
        torch.randn(num_experts, hidden, size).to(device, dtype),
    )
    slots = [torch.full((num_slots, *one.shape[1:]), torch.nan).to(one) for one in host]
    for target, one in zip(slots, host):
        target[:num_experts] = one[:num_slots]
    id_I = torch.arange(num_ids, dtype=torch.int32)
    slot_I = torch.where(id_I < num_slots, id_I, -1 - id_I % num_experts)
    zeros = torch.zeros(num_slots + 1, dtype=torch.int64)
    made = (
        torch.zeros(1, dtype=torch.int32), torch.zeros(6, dtype=torch.int64), *host, *slots,
        slot_I, id_I[:num_slots].clone(), zeros[:-1].clone(), zeros[-1:].clone(),
    )  # fmt: skip
    return Tables(*(tensor.to(device) for tensor in made))


def routing(num_tokens: int, top_k: int, num_experts: int, device: str = "cpu") -> Tensor:
    """Random experts, different ones for each token."""
    chosen = [torch.randperm(num_experts)[:top_k] for _ in range(num_tokens)]
    return torch.stack(chosen).int().to(device)
