"""Schedules of the persistent decode step: what they compute, and what they must not miss."""

from __future__ import annotations

import pytest
import torch

from nanovllm.compile.lower.persistent import schedule as schedules
from nanovllm.compile.lower.persistent.interpreter import Fault, Interpreter
from nanovllm.compile.lower.persistent.plan import Plan, Unfit
from nanovllm.compile.lower.persistent.schedule import Schedule
from nanovllm.kernels.cuda import persistent
from nanovllm.kernels.cuda.persistent import CodeFormat, Experts
from nanovllm.runner.persistent import PersistentSteps
from tests.compile.persistent_cases import (
    BLOCK_SIZE,
    FP8_BLOCKS,
    FP8_EXPERTS,
    FP8_ROWS,
    INT4,
    QWEN2,
    SMALL,
    SMALL_EXPERTS,
    Case,
    Shape,
    case,
    error,
)

LIMIT = 2e-2  # of bf16


def interpreted(one: Case, schedule: Schedule, seed: int = 0, *, ahead: bool = False) -> None:
    Interpreter(schedule, one.given, one.weights.find, BLOCK_SIZE).run(seed, ahead=ahead)


@pytest.mark.parametrize(
    "lens, shape, num_programs",
    # one row in many parts; one in fewer than there could be; several rows, of one part each;
    # experts of one row and of several; several tokens of a request, with and without earlier ones,
    # beside another request; a bias, and no norms of queries and keys;
    # weights in fp8 and in integers of 4 bits
    [
        ((300,), SMALL, 20), ((33,), SMALL, 7), ((1, 40, 100), SMALL, 3),
        ((40,), SMALL_EXPERTS, 5), ((1, 40, 100), SMALL_EXPERTS, 7),
        (((48, 49, 50, 51), 52, (1, 2, 3)), SMALL, 7), ((40, 7), QWEN2, 5),
        ((40, 7), FP8_BLOCKS, 5), ((40, 7), FP8_ROWS, 5), ((40, 7), INT4, 5),
        ((1, 40), FP8_EXPERTS, 5),
    ],
)  # fmt: skip
def test_a_schedule_computes_what_the_regions_compute(
    lens: tuple[int | tuple[int, ...], ...], shape: Shape, num_programs: int
) -> None:
    """Logits, caches and what is kept, with programs in any order."""
    for seed, ahead in ((0, False), (1, True)):
        one = case(lens, shape)
        before = [cache.clone() for cache in one.caches()]
        interpreted(one, schedules.build(one.plan, num_programs), seed, ahead=ahead)
        found = [one.given.logits_RV.clone(), *(cache.clone() for cache in one.caches())]
        found += [one.weights.kept[layer] for layer in (0, shape.layers - 1)]
        for cache, old in zip(one.caches(), before, strict=True):
            cache.copy_(old)
        states = one.states()
        expected = [one.expected(), *one.caches(), states[0], states[-1]]
        assert all(error(*pair) < LIMIT for pair in zip(found, expected, strict=True))
        assert not all(map(torch.equal, before, one.caches()))


def test_a_missing_task_is_found() -> None:
    one = case((70,))
    whole = schedules.build(one.plan, 3)
    dropped = [list(tasks) for tasks in whole.programs]
    idx = next(i for i, task in enumerate(dropped[1]) if task.inputs[:1] == ("gate_up",))
    del dropped[1][idx]
    with pytest.raises(Fault, match="of inner of layer 0, which no task writes"):
        interpreted(one, whole._replace(programs=dropped))


def test_a_task_that_waits_for_an_earlier_phase_is_found() -> None:
    one = case((70,))
    whole = schedules.build(one.plan, 3)
    changed = [
        [task._replace(in_phase=0) if task.inputs[:1] == ("gate_up",) else task for task in tasks]
        for tasks in whole.programs
    ]
    with pytest.raises(Fault, match="of the embedded tokens, which no task writes"):
        interpreted(one, whole._replace(programs=changed))


def test_a_result_that_overwrites_what_is_still_read_is_found() -> None:
    """The MLP's result in the place of its input, whose other readers may be late."""
    one = case((70,))
    whole = schedules.build(one.plan, 3)
    areas = whole.areas
    changed = [
        [
            task._replace(out_at=areas["out"].first) if task.inputs[:1] == ("down",) else task
            for task in tasks
        ]
        for tasks in whole.programs
    ]
    own = [
        [
            task._replace(out_at=areas["out"].first) if task.inputs[:1] == ("gate_up",) else task
            for task in tasks
        ]
        for tasks in changed
    ]
    with pytest.raises(Fault, match="overwrites out of layer 0, which is still to be read"):
        interpreted(one, whole._replace(programs=own), ahead=True)


def published(num_rows: int, hidden: int, heads: int, ffn: int, layers: int) -> Plan:
    return Plan(num_rows, hidden, heads, 8, ffn, 151936, layers, 1e-6, 0.1, {}, {})


@pytest.mark.parametrize(
    "plan", [published(1, 1024, 16, 3072, 28), published(8, 4096, 32, 12288, 36)]
)
def test_multiprocessors_read_nearly_the_same_bytes(plan: Plan) -> None:
    schedule = schedules.build(plan, 132)
    rows = [
        sum(
            task.num * (8 if task.flags & persistent.HALF else 16) * task.depth
            for task in tasks
            if task.kind == persistent.PRODUCT
        )
        for tasks in schedule.programs
    ]
    assert sum(rows) * 2 == plan.weight_bytes
    assert max(rows) * 132 < 1.01 * sum(rows)
    assert max(rows) - min(rows) <= 16 * plan.ffn


def test_rings_leave_room_for_what_is_not_weights() -> None:
    for plan, least in (
        (published(1, 1024, 16, 3072, 28), 10),
        (published(4, 4096, 32, 12288, 36), 4),
    ):
        sizes = schedules.build(plan, 132).sizes
        assert sizes.num_stages >= least
        assert sizes.shared_bytes <= persistent.MAX_SHARED_BYTES


@pytest.mark.parametrize(
    "changed, why",
    [
        ({"out_bias": True}, "attention's product has a bias"),
        ({"dtype": torch.float16}, "other than contiguous ones in bf16"),
        ({"head_dim": 64}, "heads of 64"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(changed: dict[str, object], why: str) -> None:
    if changed.get("head_dim"):
        changed = {**changed, "inv_freq": tuple(1e4 ** (-i / 32) for i in range(32))}
    with pytest.raises(Unfit, match=why):
        case((9,), Shape(layers=1), **changed)


def test_too_many_rows_are_refused() -> None:
    with pytest.raises(Unfit, match="9 rows are more than 8"):
        case((5,) * 9, Shape(layers=1))


SMALL_PLAN, LONG_PLAN = published(8, 1024, 16, 3072, 28), published(8, 4096, 32, 12288, 36)
OF_EXPERTS = published(8, 2048, 32, 6144, 48)._replace(experts=Experts(128, 8, 768, True))


@pytest.mark.parametrize(
    "plan, is_faster",
    [
        (SMALL_PLAN, False), (LONG_PLAN, True), (published(8, 5120, 64, 25600, 64), False),
        (OF_EXPERTS, False), (SMALL_PLAN._replace(num_rows=4), True),
        (published(4, 5120, 64, 25600, 64), True), (OF_EXPERTS._replace(num_rows=4), True),
    ],
)  # fmt: skip
def test_by_default_a_step_is_one_kernel_where_that_is_faster(plan: Plan, is_faster: bool) -> None:
    """Small layers, many queries that share a key and experts: of up to four rows only."""
    device, schedule = torch.device("cpu"), schedules.build(plan, 132)
    assert PersistentSteps(device, is_asked=True).why_not(schedule) is None
    why = None if is_faster else "with more than 4 rows several kernels are faster"
    assert PersistentSteps(device, is_asked=False).why_not(schedule) == why


def test_with_biases_a_step_is_several_kernels_by_default() -> None:
    schedule = schedules.build(SMALL_PLAN._replace(num_rows=1, layer_inputs={"qkv_bias": "b"}), 132)
    steps = PersistentSteps(torch.device("cpu"), is_asked=False)
    assert steps.why_not(schedule) == "with biases it has not been measured"


IN_INTEGERS = LONG_PLAN._replace(codes=CodeFormat(4, torch.float16, has_offset=True), num_rows=4)
IN_FP8 = OF_EXPERTS._replace(codes=CodeFormat(8, torch.bfloat16, 128), num_rows=1)


@pytest.mark.parametrize(
    "plan, why",
    [
        (IN_INTEGERS, None), (IN_FP8, None),
        (IN_INTEGERS._replace(num_rows=8), "more than 4 rows"),
        (IN_INTEGERS._replace(hidden=5120, num_heads=40), "depths are multiples of 2048"),
        (IN_INTEGERS._replace(hidden=2048, num_heads=16, ffn=6144), "only in long layers"),
    ],
)  # fmt: skip
def test_by_default_weights_in_codes_are_one_kernel_where_that_is_faster(
    plan: Plan, why: str | None
) -> None:
    """With long layers, or experts, whose depths are whole chunks."""
    schedule = schedules.build(plan, 132)
    found = PersistentSteps(torch.device("cpu"), is_asked=False).why_not(schedule)
    assert found is None if why is None else found is not None and why in found


def test_a_row_of_several_tokens_needs_a_warp_without_a_query() -> None:
    plan = published(4, 5120, 64, 25600, 64)._replace(has_several=True)
    with pytest.raises(Unfit, match="8 queries share a key"):
        schedules.build(plan, 132)


def test_experts_that_some_program_would_not_choose_are_refused() -> None:
    """Each program chooses while it copies the first of a token's two products."""
    one = case((9,), SMALL_EXPERTS)
    with pytest.raises(Unfit, match="too small to be divided among 33 programs"):
        schedules.build(one.plan, 33)
