"""Experts larger than the device in Triton: tables of slots, and copies over the bus.

One program updates the table and lists the experts to copy. Then a few programs copy them with wide
loads, so that other kernels can run beside them. Nothing is read by the host.

Copies to a buffer, and those for a prediction, run on a side stream. They begin when the launches
before them have ended. The op that reads what they write waits for them. Tables are updated on the
main stream, in the order of the calls.

Shapes: T tokens | K experts per token | P = T·K pairs | E experts | I ids | S slots | "p" after a
letter: padded to a power of two. Other letters and all tables are those of `reference.offload`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.reference import offload as reference
from nanovllm.kernels.triton import common
from nanovllm.kernels.triton.common import launch_options, wait_for_earlier_kernels

COMPARED = 4096  # (expert, pair) combinations that are compared at a time
NEVER = tl.constexpr(2**62)  # later than any stamp
NEEDED, RESIDENT, FETCHED, IN_PLACE, STREAMED, AHEAD = map(
    tl.constexpr, range(len(reference.COUNTERS))
)


class CopyTile(NamedTuple):
    """The sizes of a copy: programs, bytes that one has in flight, and warps."""

    programs: int = 32
    num_bytes: int = 32768
    num_warps: int = 8


@triton.jit
def _count(counters_ptr, which: tl.constexpr, num):
    tl.store(counters_ptr + which, tl.load(counters_ptr + which) + num)


@triton.jit(do_not_specialize=["num_pairs", "num_pad_slots"])
def fetch_plan_kernel(
    expert_ptr,  # [P]
    kv_slot_ptr,  # [T]
    first_ptr,  # [1]
    counters_ptr,  # [C], updated, as all up to `clock_ptr`
    slot_ptr,  # [I]
    owner_ptr,  # [S]
    stamp_ptr,  # [S]
    clock_ptr,  # [1]
    out_ptr,  # [P], written
    copies_ptr,  # [1 + 2 · min(E, S)], written: how many, then (expert, slot) of each
    num_pairs,
    num_pad_slots,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_P: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    SLOTS_P: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    e_Ep = tl.arange(0, EXPERTS_P)
    chosen_Ep = tl.zeros((EXPERTS_P,), tl.int32)
    for start in tl.range(0, num_pairs, BLOCK):
        p_B = start + tl.arange(0, BLOCK)
        is_pair_B = p_B < num_pairs
        expert_B = tl.load(expert_ptr + p_B, mask=is_pair_B, other=0)
        kv_slot_B = tl.load(kv_slot_ptr + p_B // TOP_K, mask=is_pair_B, other=-1)
        is_real_B = is_pair_B & (kv_slot_B >= num_pad_slots)
        spare_B = tl.load(expert_ptr + p_B % TOP_K)
        tl.store(out_ptr + p_B, tl.where(is_real_B, expert_B, spare_B), mask=is_pair_B)
        chooses_EB = (e_Ep[:, None] == expert_B[None, :]) & is_real_B[None, :]
        chosen_Ep = tl.maximum(chosen_Ep, tl.max(chooses_EB.to(tl.int32), 1))

    first, clock = tl.load(first_ptr), tl.load(clock_ptr) + 1
    is_chosen_Ep = chosen_Ep > 0
    slot_Ep = tl.load(slot_ptr + first + e_Ep, mask=is_chosen_Ep, other=0)
    missing_Ep = (is_chosen_Ep & (slot_Ep < 0)).to(tl.int32)
    tl.store(stamp_ptr + slot_Ep, clock, mask=is_chosen_Ep & (slot_Ep >= 0))
    tl.debug_barrier()  # the stamps are read by other threads

    s_Sp = tl.arange(0, SLOTS_P)
    stamp_Sp = tl.load(stamp_ptr + s_Sp, mask=s_Sp < NUM_SLOTS, other=NEVER)
    owner_Sp = tl.load(owner_ptr + s_Sp, mask=s_Sp < NUM_SLOTS, other=0)
    is_free_Sp = stamp_Sp < clock
    key_Sp = tl.where(is_free_Sp, stamp_Sp * SLOTS_P + s_Sp, NEVER)
    num_chosen, num_missing = tl.sum(chosen_Ep), tl.sum(missing_Ep)
    num_fetched = tl.minimum(num_missing, tl.sum(is_free_Sp.to(tl.int32)))
    for i in tl.range(0, num_fetched):
        slot = (tl.min(key_Sp) % SLOTS_P).to(tl.int32)
        expert = tl.min(tl.where(missing_Ep > 0, e_Ep, EXPERTS_P))
        old = tl.sum(tl.where(s_Sp == slot, owner_Sp, 0))
        tl.store(slot_ptr + old, -1 - old % NUM_EXPERTS)
        tl.store(slot_ptr + first + expert, slot)
        tl.store(owner_ptr + slot, first + expert)
        tl.store(stamp_ptr + slot, clock)
        tl.store(copies_ptr + 1 + 2 * i, expert)
        tl.store(copies_ptr + 2 + 2 * i, slot)
        key_Sp = tl.where(s_Sp == slot, NEVER, key_Sp)
        missing_Ep = tl.where(e_Ep == expert, 0, missing_Ep)
    tl.store(copies_ptr, num_fetched)
    tl.store(clock_ptr, clock)
    if IS_AHEAD:
        _count(counters_ptr, AHEAD, num_fetched)
    else:
        _count(counters_ptr, NEEDED, num_chosen)
        _count(counters_ptr, RESIDENT, num_chosen - num_missing)
        _count(counters_ptr, FETCHED, num_fetched)
        _count(counters_ptr, IN_PLACE, num_missing - num_fetched)


@triton.jit
def stream_plan_kernel(
    first_ptr,  # [1]
    slot_ptr,  # [I]
    counters_ptr,  # [C], updated
    buffer_slot_ptr,  # [I], written
    copies_ptr,  # [1 + 2 · B], written: how many, then (expert, entry) of each
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_P: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    e_Ep = tl.arange(0, EXPERTS_P)
    first = tl.load(first_ptr)
    slot_Ep = tl.load(slot_ptr + first + e_Ep, mask=e_Ep < NUM_EXPERTS, other=0)
    is_missing_Ep = slot_Ep < 0
    entry_Ep = tl.cumsum(is_missing_Ep.to(tl.int32), 0) - 1
    found_Ep = tl.where(is_missing_Ep, -1 - entry_Ep, slot_Ep)
    tl.store(buffer_slot_ptr + first + e_Ep, found_Ep, mask=e_Ep < NUM_EXPERTS)
    tl.store(copies_ptr + 1 + 2 * entry_Ep, e_Ep, mask=is_missing_Ep)
    tl.store(copies_ptr + 2 + 2 * entry_Ep, entry_Ep, mask=is_missing_Ep)
    num = tl.sum(is_missing_Ep.to(tl.int32))
    tl.store(copies_ptr, num)
    _count(counters_ptr, STREAMED, num)


@triton.jit
def _copy(from_ptr, to_ptr, copies_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Copy this program's blocks of all listed matrices, which have SIZE elements each."""
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    num_blocks = tl.load(copies_ptr) * BLOCKS
    for i in tl.range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        expert = tl.load(copies_ptr + 1 + 2 * (i // BLOCKS)).to(tl.int64)
        entry = tl.load(copies_ptr + 2 + 2 * (i // BLOCKS)).to(tl.int64)
        at_B = i % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        if SIZE % BLOCK == 0:
            tl.store(to_ptr + entry * SIZE + at_B, tl.load(from_ptr + expert * SIZE + at_B))
        else:
            mask_B = at_B < SIZE
            value_B = tl.load(from_ptr + expert * SIZE + at_B, mask=mask_B)
            tl.store(to_ptr + entry * SIZE + at_B, value_B, mask=mask_B)


@triton.jit
def copy_kernel(
    gate_up_ptr,  # [E, GATE_UP], in the host's memory
    down_ptr,  # [E, DOWN], in the host's memory
    to_gate_up_ptr,  # written, as the next
    to_down_ptr,
    copies_ptr,  # how many, then (expert, entry) of each
    GATE_UP: tl.constexpr,
    DOWN: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_earlier_kernels(PDL)
    _copy(gate_up_ptr, to_gate_up_ptr, copies_ptr, GATE_UP, BLOCK)
    _copy(down_ptr, to_down_ptr, copies_ptr, DOWN, BLOCK)


def copy_listed(
    both: tuple[Tensor, Tensor],
    to: tuple[Tensor, Tensor],
    copies: Tensor,
    tile: CopyTile,
    on_side: bool,
) -> None:
    """Copy the matrices of listed experts, gate and up and those of down, to listed entries.

    `on_side` is for copies on the side stream.
    """
    gate_up_EGD, down_EDF = both
    # a launch that depends on another stream is no dependent launch
    options = {"PDL": False} if on_side else launch_options(copies.device)
    copy_kernel[(tile.programs,)](
        gate_up_EGD,
        down_EDF,
        *to,
        copies,
        GATE_UP=gate_up_EGD.stride(0),
        DOWN=down_EDF.stride(0),
        BLOCK=tile.num_bytes // gate_up_EGD.element_size(),
        num_warps=tile.num_warps,
        **options,
    )


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
    tile: CopyTile | None = None,
) -> Tensor:
    """See `reference.offload.fetch_experts`. `tile` overrides that of the copy, for measurements.

    With `ahead` the copies run on the side stream, and the next call with these slots waits.
    """
    num_experts, num_slots, device = host_down_EDF.shape[0], owner_S.shape[0], expert_TK.device
    experts_p = triton.next_power_of_2(num_experts)
    expert_TK = expert_TK.contiguous()
    wait_for_copies(slots_gate_up_SGD)
    out_TK = torch.empty_like(expert_TK)
    copies = out_TK.new_empty(1 + 2 * min(num_experts, num_slots))
    fetch_plan_kernel[(1,)](
        expert_TK,
        kv_slot_T,
        first_1,
        counters_C,
        slot_I,
        owner_S,
        stamp_S,
        clock_1,
        out_TK,
        copies,
        expert_TK.numel(),
        num_pad_slots,
        TOP_K=expert_TK.shape[1],
        NUM_EXPERTS=num_experts,
        EXPERTS_P=experts_p,
        NUM_SLOTS=num_slots,
        SLOTS_P=triton.next_power_of_2(num_slots),
        BLOCK=max(1, COMPARED // experts_p),
        IS_AHEAD=ahead,
        num_warps=4,
        **launch_options(device),
    )
    both, slots = (host_gate_up_EGD, host_down_EDF), (slots_gate_up_SGD, slots_down_SDF)
    with beside(slots_gate_up_SGD, copies) if ahead else contextlib.nullcontext():
        copy_listed(both, slots, copies, tile or CopyTile(), ahead)
    return out_TK


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
    """See `reference.offload.stream_experts`. The copies run on the side stream."""
    num_experts, num_entries = host_down_EDF.shape[0], buffer_down_BDF.shape[0]
    copies = slot_I.new_empty(1 + 2 * num_entries)
    stream_plan_kernel[(1,)](
        first_1,
        slot_I,
        counters_C,
        buffer_slot_I,
        copies,
        NUM_EXPERTS=num_experts,
        EXPERTS_P=triton.next_power_of_2(num_experts),
        num_warps=4,
        **launch_options(slot_I.device),
    )
    both, buffers = (host_gate_up_EGD, host_down_EDF), (buffer_gate_up_BGD, buffer_down_BDF)
    with beside(buffer_gate_up_BGD, copies):
        copy_listed(both, buffers, copies, CopyTile(), True)


# The side stream of each device. By the address of what they write, the ends of copies that no
# launch has waited for yet, and the list that such a copy reads: its memory must not be used again
# before.
_side: dict[torch.device, torch.cuda.Stream] = {}
_ends: dict[int, tuple[torch.cuda.Event, Tensor]] = {}


@contextlib.contextmanager
def beside(target: Tensor, copies: Tensor) -> Iterator[None]:
    """A copy in this block, to `target`, runs beside the launches that follow the block."""
    if target.device.type != "cuda" or common.counters_are_fake:
        yield
        return
    if target.device not in _side:
        _side[target.device] = torch.cuda.Stream(target.device)
    side = _side[target.device]
    side.wait_stream(torch.cuda.current_stream(target.device))
    with torch.cuda.stream(side):
        yield
        end = torch.cuda.Event()
        end.record(side)
    _ends[target.data_ptr()] = end, copies


def wait_for_copies(target: Tensor) -> None:
    """Let later launches wait for copies to `target` that run beside them."""
    if target.device.type == "cuda" and not common.counters_are_fake:
        end, _ = _ends.pop(target.data_ptr(), (None, None))
        if end is not None:
            torch.cuda.current_stream(target.device).wait_event(end)
