"""Triton's tables of resident experts, and its copies, equal those of the reference."""

from __future__ import annotations

import pytest
import torch

from nanovllm.kernels.reference import offload as reference
from nanovllm.kernels.triton import experts, offload
from tests.kernels.offload_cases import Tables, routing, tables

device = "cuda" if torch.cuda.is_available() else "cpu"
PAD = 16


def assert_equal(found: Tables, expected: Tables) -> None:
    for ours, theirs in zip(found.arguments, expected.arguments):
        assert torch.equal(ours.nan_to_num(99.0), theirs.nan_to_num(99.0))


@pytest.mark.parametrize(
    ("num_experts", "num_slots", "top_k", "num_tokens"),
    [(8, 2, 2, 1), (8, 8, 2, 1), (19, 7, 3, 2), (60, 33, 4, 5), (128, 32, 8, 1), (128, 32, 8, 40)],
)
def test_tables_and_slots_equal_the_reference(
    num_experts: int, num_slots: int, top_k: int, num_tokens: int
) -> None:
    expected = tables(num_experts, num_slots, device=device)
    found = expected.clone()
    for step in range(8):
        expert_TK = routing(num_tokens, top_k, num_experts, device)
        kv_slot_T = torch.arange(num_tokens, device=device) + PAD
        kv_slot_T[num_tokens - step % num_tokens :] = 3  # padding at the end
        ours = offload.fetch_experts(expert_TK, kv_slot_T, PAD, *found.arguments)
        theirs = reference.fetch_experts(expert_TK, kv_slot_T, PAD, *expected.arguments)
        assert torch.equal(ours, theirs)
        assert_equal(found, expected)


def test_a_step_of_padding_changes_only_the_clock() -> None:
    expected = tables(8, 3, device=device)
    found = expected.clone()
    expert_TK, kv_slot_T = routing(5, 2, 8, device), torch.arange(5, device=device)
    ours = offload.fetch_experts(expert_TK, kv_slot_T, PAD, *found.arguments)
    assert torch.equal(ours, expert_TK[:1].expand(5, 2))
    expected.clock_1 += 1
    assert_equal(found, expected)


def test_layers_that_share_slots_equal_the_reference() -> None:
    one = tables(8, 6, num_layers=4, device=device)
    other = one.clone()
    host = [torch.randn_like(tensor) for tensor in one.arguments[2:4]]
    found, expected = ([state, state.layer(3, *host)] for state in (one, other))
    for step in range(8):
        expert_TK = routing(2, 2, 8, device)
        kv_slot_T = torch.full((2,), PAD, device=device)
        args = (expert_TK, kv_slot_T, PAD)
        offload.fetch_experts(*args, *found[step % 2].arguments, ahead=step == 5)
        reference.fetch_experts(*args, *expected[step % 2].arguments, ahead=step == 5)
        assert_equal(one, other)


@pytest.mark.parametrize("num_slots", [1, 5, 8, 19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_experts_equal_the_reference(num_slots: int, dtype: torch.dtype) -> None:
    """Matrices are of odd sizes, smaller and larger than what a program copies at a time."""
    for hidden, size in ((5, 3), (48, 20)):
        state = tables(19, num_slots, hidden, size, dtype=dtype, device=device)
        slot_I = -1 - torch.arange(19, dtype=torch.int32)
        slot_I[torch.randperm(19)[:num_slots]] = torch.arange(num_slots, dtype=torch.int32)
        state.slot_I.copy_(slot_I)
        results = []
        for stream in (offload.stream_experts, reference.stream_experts):
            counters_C, slot_I = (
                torch.zeros_like(state.counters_C),
                torch.full_like(state.slot_I, 99),
            )
            both = (state.host_gate_up_EGD, state.host_down_EDF)
            # one entry more than is needed stays as it is
            made = [torch.full_like(one[: 20 - num_slots], torch.nan) for one in both]
            stream(state.first_1, state.slot_I, counters_C, *both, slot_I, *made)
            offload.wait_for_copies(made[0])
            results.append((counters_C, slot_I, *(one.nan_to_num(99.0) for one in made)))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results))


def test_a_copy_of_many_blocks_equals_its_source() -> None:
    state = tables(5, 2, 64, 99, dtype=torch.bfloat16, device=device)
    tile = offload.CopyTile(programs=3, num_bytes=2048)
    expert_TK = torch.tensor([[4, 3]], dtype=torch.int32, device=device)
    kv_slot_T = torch.full((1,), PAD, device=device)
    offload.fetch_experts(expert_TK, kv_slot_T, PAD, *state.arguments, tile=tile)
    assert state.owner_S.tolist() == [3, 4]
    assert torch.equal(state.slots_gate_up_SGD, state.host_gate_up_EGD[3:])
    assert torch.equal(state.slots_down_SDF, state.host_down_EDF[3:])


@pytest.mark.parametrize("num_tokens", [1, 2, 19])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_experts_that_are_all_together(
    num_tokens: int, streamed: bool, dtype: torch.dtype
) -> None:
    """The second of three layers that share slots. What must not be read is NaN."""
    one = tables(8, 5, 40, 24, num_layers=3, dtype=dtype, device=device)
    both = [torch.randn_like(tensor) for tensor in one.arguments[2:4]]
    state = one.layer(1, *both)
    fetched = torch.full((1,), PAD, device=device)
    for expert in (6, 1):  # the other three slots hold weights of layer 0
        expert_TK = torch.tensor([[expert]], dtype=torch.int32, device=device)
        reference.fetch_experts(expert_TK, fetched, PAD, *state.arguments)
    resident = torch.tensor([1, 6], device=device)
    slots_gate_up, slots_down, slot_I, owner_S = state.arguments[4:8]
    for slots in (slots_gate_up, slots_down):
        slots[owner_S < 8] = torch.nan
    others = [tensor.clone() for tensor in both]
    if streamed:
        others = [torch.full_like(tensor[:6], torch.nan) for tensor in both]
        into = torch.zeros_like(slot_I)
        reference.stream_experts(state.first_1, slot_I, state.counters_C, *both, into, *others)
        slot_I = into
    else:
        for host in others:
            host[resident] = torch.nan
    expert_TK, weight_TK = routing(num_tokens, 2, 8, device), torch.rand(num_tokens, 2)
    x_TD, residual_TD = torch.randn(2, num_tokens, 40).to(device, dtype)
    rest = (state.first_1, slot_I, slots_gate_up, slots_down, *others, residual_TD)
    args = (x_TD, weight_TK.to(device), expert_TK)
    found = experts.offloaded_experts(*args, 8, *rest)
    assert torch.equal(found, experts.experts(*args, *both, residual_TD))
