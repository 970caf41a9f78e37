"""Slots keep adapters until others need them, and no request waits for one forever."""

from __future__ import annotations

import random

import pytest

from nanovllm.schedule import scheduler
from nanovllm.schedule.adapter_slots import AdapterSlots
from nanovllm.schedule.plan import AdapterLoad
from tests.schedule import loads


def test_a_slot_in_use_is_not_replaced() -> None:
    slots = AdapterSlots(2)
    assert [slots.take(7), slots.take(8), slots.take(7)] == [1, 2, 1]
    assert slots.has_room(8) and not slots.has_room(9)
    slots.release(1)
    assert not slots.has_room(9), "another request uses it"
    slots.release(1)
    assert slots.take(9) == 1
    assert slots.loaded == {8, 9}


def test_the_one_unused_for_longest_is_replaced_and_empty_slots_first() -> None:
    slots = AdapterSlots(3)
    for adapter_id in (1, 2, 1):
        slots.release(slots.take(adapter_id))
    assert slots.take(3) == 3
    assert slots.take(4) == 2
    slots.forget(1)
    assert slots.loaded == {3, 4} and slots.take(5) == 1


def test_a_slot_is_loaded_once_with_its_last_adapter() -> None:
    slots = AdapterSlots(1)
    for adapter_id in (1, 1, 2):
        slots.release(slots.take(adapter_id))
    assert slots.take_loads() == [AdapterLoad(2, 1)]
    slots.release(slots.take(2))
    assert not slots.take_loads()
    slots.reset()
    slots.release(slots.take(2))
    assert slots.take_loads() == [AdapterLoad(2, 1)], "a step that did not run loaded it"
    slots.release(slots.take(3))
    slots.forget(3)
    assert not slots.take_loads()


def test_numbers_of_users_never_differ_from_those_of_requests() -> None:
    rng, slots, running = random.Random(3), AdapterSlots(4), list[tuple[int, int]]()
    for _ in range(2000):
        adapter_id = rng.randrange(1, 9)
        if rng.random() < 0.5 and slots.has_room(adapter_id):
            running.append((adapter_id, slots.take(adapter_id)))
        elif running:
            slots.release(running.pop(rng.randrange(len(running)))[1])
        of_slot = {number: one for one, number in running}
        assert all(of_slot[number] == one for one, number in running)
        free = len(of_slot) < 4
        assert slots.has_room(99) == free


def place_of_the_blocked(num_passed: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many requests were admitted before the second one, whose adapter needs the slot of all
    others: these always overlap."""
    monkeypatch.setattr(scheduler, "MAX_PASSED", num_passed)
    s = loads.scheduler(max_num_seqs=2)
    s.adapters = AdapterSlots(1)
    for number in range(20):
        one = loads.request(number, 4, 8 if number else 4)
        one.adapter_id = 2 if number == 1 else 1
        s.add(one)
    admitted: list[int] = []
    while s.has_work:
        plan = loads.planned(s)
        admitted += plan.request_ids if plan.is_prefill else []
        loads.answer(s, plan)
    assert sorted(admitted) == list(range(20))
    return admitted.index(1)


def test_a_request_is_passed_a_limited_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place_of_the_blocked(5, monkeypatch) == 1 + 5
    assert place_of_the_blocked(1000, monkeypatch) == 19
