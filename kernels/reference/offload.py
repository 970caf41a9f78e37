"""The meaning of the ops for experts larger than the device, in plain torch.

All experts of a layer are in the host's memory, some also in slots on the device. In the table
slot_I, entry i is the slot of the expert with id i, or −1 − e if expert e of its layer has no slot.
Layers may share one set of slots, so ids count the experts of all layers that do: expert e of a
layer has the id first + e. A set of one layer has first = 0.

Shapes: T tokens | K experts per token | E experts | I ids | S slots | B entries of a buffer
D hidden | F expert width | G = 2F | C counters
"""

from __future__ import annotations

import torch
from torch import Tensor

# The counters that the ops add to, in experts. needed: distinct experts that a step's tokens chose,
# in steps that search them in slots. resident: those of them that had a slot. fetched: copied to
# a slot. in_place: read over the bus, because all slots were in use. streamed: copied to a buffer.
# ahead: copied to a slot because of a prediction.
COUNTERS = ("needed", "resident", "fetched", "in_place", "streamed", "ahead")
NEEDED, RESIDENT, FETCHED, IN_PLACE, STREAMED, AHEAD = range(len(COUNTERS))


def fetch_experts(
    expert_TK: Tensor,
    kv_slot_T: Tensor,
    num_pad_slots: int,
    first_1: Tensor,
    counters_C: Tensor,
    host_gate_up_EGD: Tensor,
    host_down_EDF: Tensor,
    slots_gate_up_SGD: Tensor,
    slots_down_SDF: Tensor,
    slot_I: Tensor,
    owner_S: Tensor,
    stamp_S: Tensor,
    clock_1: Tensor,
    ahead: bool = False,
) -> Tensor:
    """Give the experts that tokens chose a slot while there are slots; returns expert_TK.

    The clock goes on by one. Chosen experts with a slot get the clock's time as their stamp.
    The others are copied from the host, in ascending order, to slots that this step does not need:
    each to the slot with the oldest stamp, the first of equal ones. Its owner loses the slot.
    Once all slots are needed, the remaining experts get none. owner_S[s] is the id in slot s.

    A token whose cache slot is below `num_pad_slots` is padding. Its choices are arbitrary, so they
    count for nothing, and in the result they are those of token 0: with padding after the real
    tokens, no weights are read for padding alone. `ahead` marks a prediction, which is counted as
    such (see COUNTERS).
    """
    is_pad_T1 = (kv_slot_T < num_pad_slots).unsqueeze(1)
    chosen = sorted(set(expert_TK[~is_pad_T1.squeeze(1)].flatten().tolist()))
    first, num_experts = int(first_1), host_gate_up_EGD.shape[0]
    clock_1 += 1
    clock = int(clock_1)
    missing = []
    for expert in chosen:
        slot = int(slot_I[first + expert])
        if slot < 0:
            missing.append(expert)
        else:
            stamp_S[slot] = clock
    stamps = stamp_S.tolist()
    free = sorted((stamp, slot) for slot, stamp in enumerate(stamps) if stamp < clock)
    for expert, (_, slot) in zip(missing, free):
        old = int(owner_S[slot])
        slot_I[old] = -1 - old % num_experts
        slot_I[first + expert], owner_S[slot], stamp_S[slot] = slot, first + expert, clock
        slots_gate_up_SGD[slot] = host_gate_up_EGD[expert]
        slots_down_SDF[slot] = host_down_EDF[expert]
    num_fetched = min(len(missing), len(free))
    if ahead:
        counters_C[AHEAD] += num_fetched
    else:
        counters_C[NEEDED] += len(chosen)
        counters_C[RESIDENT] += len(chosen) - len(missing)
        counters_C[FETCHED] += num_fetched
        counters_C[IN_PLACE] += len(missing) - num_fetched
    return torch.where(is_pad_T1, expert_TK[:1], expert_TK)


def stream_experts(
    first_1: Tensor,
    slot_I: Tensor,
    counters_C: Tensor,
    host_gate_up_EGD: Tensor,
    host_down_EDF: Tensor,
    buffer_slot_I: Tensor,
    buffer_gate_up_BGD: Tensor,
    buffer_down_BDF: Tensor,
) -> None:
    """Copy a layer's experts without a slot to a buffer, in ascending order.

    buffer_slot_I[first + e] becomes the slot of expert e, or −1 − b if it is entry b of the buffer.
    The buffer must have an entry for each expert without a slot.
    """
    first, num_experts = int(first_1), host_gate_up_EGD.shape[0]
    num_copied = 0
    for expert, slot in enumerate(slot_I[first : first + num_experts].tolist()):
        buffer_slot_I[first + expert] = slot
        if slot < 0:
            buffer_slot_I[first + expert] = -1 - num_copied
            buffer_gate_up_BGD[num_copied] = host_gate_up_EGD[expert]
            buffer_down_BDF[num_copied] = host_down_EDF[expert]
            num_copied += 1
    counters_C[STREAMED] += num_copied


def offloaded_experts(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    num_experts: int,
    first_1: Tensor,
    slot_I: Tensor,
    slots_gate_up_SGD: Tensor,
    slots_down_SDF: Tensor,
    others_gate_up: Tensor,
    others_down: Tensor,
    residual_TD: Tensor | None = None,
) -> Tensor:
    """`reference.experts` for E = `num_experts`, with expert e in slot s = slot_I[first + e].

    If s is negative, its matrices are entry −1 − s of the other tensors: the host's, or a buffer's.
    """
    chosen_N, index_P = expert_TK.unique(return_inverse=True)
    slots = slot_I[int(first_1) + chosen_N.long()].tolist()
    gate_up_NGD = torch.stack(
        [slots_gate_up_SGD[slot] if slot >= 0 else others_gate_up[-1 - slot] for slot in slots]
    )
    down_NDF = torch.stack(
        [slots_down_SDF[slot] if slot >= 0 else others_down[-1 - slot] for slot in slots]
    )
    # a device's own kernel, if it has one: the same bits as experts that are all on the device
    experts = torch.ops.nanovllm.experts.default
    expert_TK = index_P.view_as(expert_TK).int()
    return experts(x_TD, weight_TK, expert_TK, gate_up_NGD, down_NDF, residual_TD)
