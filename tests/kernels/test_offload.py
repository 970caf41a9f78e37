"""Tables of resident experts, as the reference keeps them, agree with plain Python; and products
from slots, from the host's memory and from buffers are those of experts that are all together."""

from __future__ import annotations

import pytest
import torch

from nanovllm.kernels import ops, reference
from nanovllm.kernels.reference.offload import COUNTERS
from tests.kernels.offload_cases import Tables, routing, tables

PAD = 16  # cache slots of the padding block


class PlainLru:
    """Resident experts by least recent use, without tensors."""

    def __init__(self, num_slots: int) -> None:
        self.slots: list[tuple[int, int]] = [(0, owner) for owner in range(num_slots)]  # use, owner
        self.clock = 0
        self.counts = dict.fromkeys(COUNTERS, 0)

    def step(self, chosen: set[int]) -> None:
        self.clock += 1
        missing = sorted(chosen - {owner for _, owner in self.slots})
        self.counts["needed"] += len(chosen)
        self.counts["resident"] += len(chosen) - len(missing)
        self.slots = [
            (self.clock if owner in chosen else used, owner) for used, owner in self.slots
        ]
        for expert in missing:
            slot = min(range(len(self.slots)), key=lambda s: (self.slots[s][0], s))
            if self.slots[slot][0] == self.clock:
                self.counts["in_place"] += 1
            else:
                self.slots[slot] = self.clock, expert
                self.counts["fetched"] += 1


def kv_slots(num_real: int, num_pad: int) -> torch.Tensor:
    """Real tokens write to any block but block 0, padding to block 0."""
    return torch.cat((torch.arange(num_real) + PAD, torch.arange(num_pad) % PAD))


def check_contents(state: Tables) -> None:
    """Every slot holds the weights of its owner, and the two tables agree."""
    num_experts, first = state.host_down_EDF.shape[0], int(state.first_1)
    for slot, owner in enumerate(state.owner_S.tolist()):
        assert state.slot_I[owner] == slot
        expert = owner - first
        if 0 <= expert < num_experts:
            assert torch.equal(state.slots_gate_up_SGD[slot], state.host_gate_up_EGD[expert])
            assert torch.equal(state.slots_down_SDF[slot], state.host_down_EDF[expert])
    resident = set(state.owner_S.tolist())
    for owner, slot in enumerate(state.slot_I.tolist()):
        assert (owner in resident) if slot >= 0 else slot == -1 - owner % num_experts


@pytest.mark.parametrize(
    ("num_experts", "num_slots", "top_k", "num_tokens"),
    [(8, 2, 2, 1), (8, 4, 2, 1), (8, 4, 2, 3), (19, 7, 3, 2), (128, 32, 8, 1), (128, 32, 8, 9)],
)
def test_experts_are_replaced_by_least_recent_use(
    num_experts: int, num_slots: int, top_k: int, num_tokens: int
) -> None:
    state, plain = tables(num_experts, num_slots), PlainLru(num_slots)
    for _ in range(30):
        expert_TK = routing(num_tokens, top_k, num_experts)
        out_TK = reference.offload.fetch_experts(
            expert_TK, kv_slots(num_tokens, 0), PAD, *state.arguments
        )
        plain.step(set(expert_TK.flatten().tolist()))
        assert torch.equal(out_TK, expert_TK)
        assert state.owner_S.tolist() == [owner for _, owner in plain.slots]
        assert state.counters_C.tolist() == list(plain.counts.values())
        check_contents(state)


def test_padding_fetches_and_counts_nothing_and_reads_what_the_first_token_reads() -> None:
    state = tables(8, 2)
    expert_TK = torch.tensor([[5, 0], [6, 7], [2, 3]], dtype=torch.int32)
    out_TK = reference.offload.fetch_experts(expert_TK, kv_slots(1, 2), PAD, *state.arguments)
    assert out_TK.tolist() == [[5, 0]] * 3
    assert sorted(state.owner_S.tolist()) == [0, 5] and state.counters_C.tolist()[:4] == [
        2,
        1,
        1,
        0,
    ]
    before = state.clone()
    reference.offload.fetch_experts(expert_TK, kv_slots(0, 3), PAD, *state.arguments)
    assert state.counters_C.tolist() == before.counters_C.tolist()
    assert state.owner_S.tolist() == before.owner_S.tolist()


def test_a_prediction_is_counted_as_one() -> None:
    state = tables(8, 2)
    expert_TK = torch.tensor([[1, 4]], dtype=torch.int32)
    reference.offload.fetch_experts(expert_TK, kv_slots(1, 0), PAD, *state.arguments, ahead=True)
    assert dict(zip(COUNTERS, state.counters_C.tolist())) == dict.fromkeys(COUNTERS, 0) | {
        "ahead": 1
    }
    reference.offload.fetch_experts(expert_TK, kv_slots(1, 0), PAD, *state.arguments)
    assert state.counters_C.tolist()[:4] == [2, 2, 0, 0]


def test_layers_that_share_slots_take_them_from_each_other() -> None:
    one = tables(8, 5, num_layers=3)
    layers = [one, *(one.layer(i, one.host_gate_up_EGD + i, one.host_down_EDF) for i in (1, 2))]
    plain = PlainLru(5)
    for step in range(24):
        layer, first = layers[step % 3], 8 * (step % 3)
        expert_TK = routing(2, 2, 8)
        reference.offload.fetch_experts(expert_TK, kv_slots(2, 0), PAD, *layer.arguments)
        plain.step({first + expert for expert in expert_TK.flatten().tolist()})
        assert one.owner_S.tolist() == [owner for _, owner in plain.slots]
        check_contents(layer)


@pytest.mark.parametrize("num_slots", [1, 5, 8])
@pytest.mark.parametrize("streamed", [False, True])
def test_products_are_those_of_experts_that_are_all_together(
    num_slots: int, streamed: bool
) -> None:
    state = tables(8, num_slots)
    for num_tokens in (1, 3, 19):
        x_TD, residual_TD = torch.randn(2, num_tokens, 8)
        expert_TK, weight_TK = routing(num_tokens, 3, 8), torch.rand(num_tokens, 3)
        slot_I, others = state.slot_I, [state.host_gate_up_EGD, state.host_down_EDF]
        if streamed:
            slot_I = torch.full_like(slot_I, 99)
            others = [torch.full_like(one[num_slots:], torch.nan) for one in others]
            args = state.arguments
            reference.offload.stream_experts(args[0], state.slot_I, *args[1:4], slot_I, *others)
            assert not any(one.isnan().any() for one in others)
        else:
            fetched = kv_slots(num_tokens, 0)
            reference.offload.fetch_experts(expert_TK, fetched, PAD, *state.arguments)
        # what is read in its slot is not read elsewhere
        hosts = [one.clone() for one in others]
        if not streamed:
            for host in hosts:
                host[state.owner_S.long()] = torch.nan
        found = reference.offload.offloaded_experts(
            x_TD, weight_TK, expert_TK, 8, state.first_1, slot_I,
            state.slots_gate_up_SGD, state.slots_down_SDF, *hosts, residual_TD,
        )  # fmt: skip
        both = (state.host_gate_up_EGD, state.host_down_EDF)
        expected = ops.experts(x_TD, weight_TK, expert_TK, *both, residual_TD)
        assert torch.equal(found, expected)


def test_streaming_leaves_the_table_and_counts_what_it_copies() -> None:
    state = tables(8, 3)
    before = state.clone()
    buffer_slot_I = torch.zeros_like(state.slot_I)
    buffers = [torch.empty(5, *one.shape[1:]) for one in state.arguments[2:4]]
    args = state.arguments
    reference.offload.stream_experts(args[0], state.slot_I, *args[1:4], buffer_slot_I, *buffers)
    assert buffer_slot_I.tolist() == [0, 1, 2, -1, -2, -3, -4, -5]
    assert torch.equal(buffers[0], state.host_gate_up_EGD[3:])
    assert torch.equal(buffers[1], state.host_down_EDF[3:])
    assert dict(zip(COUNTERS, state.counters_C.tolist()))["streamed"] == 5
    assert torch.equal(state.slot_I, before.slot_I) and torch.equal(state.stamp_S, before.stamp_S)
