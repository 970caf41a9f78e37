"""Lost replicas: they are started again, and their requests end or are tried again. The replicas
are made up: they answer with their requests' own prompts, and end at a poisoned one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from nanovllm import EngineConfig, SamplingParams
from nanovllm.engine.metrics import Counter
from nanovllm.engine.request import EngineInfo
from nanovllm.replicas import messages
from nanovllm.replicas.dispatcher import GIVEN_UP
from nanovllm.replicas.handshake import MAX_LOSSES
from nanovllm.replicas.messages import Done, Outputs, RowTokens
from nanovllm.replicas.replica import Event, Inbox, Replica, ReplicaFailed
from nanovllm.replicas.router import Router
from nanovllm.schedule.outputs import FinishedOutput

POISON = 13
INFO = EngineInfo("a", 64, 4, 512, 64, 16, 9, [], {})


class MadeUp(Replica):
    """It works on its requests in `work`, and is lost with a poisoned one among them."""

    def __init__(self, index: int, inbox: Inbox) -> None:
        super().__init__(index, {"name": f"replica {index}", "waits_for": None})
        self.inbox, self.has_ended, self.num_answers = inbox, False, 0
        self.requests: list[messages.Add] = []

    def send(self, name: str, payload: bytes = b"") -> bool:
        if name == messages.ADD and not self.has_ended:
            self.requests.append(messages.load_add(payload))
        return not self.has_ended

    def ask_metrics(self) -> bytes:
        return messages.dump_metrics([Counter("nanovllm:answers", self.num_answers)])

    def begin_close(self) -> None: ...

    def close(self) -> None:
        self.has_ended = True

    def get_ready(self, info: EngineInfo = INFO) -> None:
        self.inbox.put(Event(self, messages.READY, messages.dump(info)))

    def fail(self) -> None:
        self.has_ended = True
        self.inbox.put(Event(self, "", b"", RuntimeError(f"{self.name} was lost")))

    def put(self, row: RowTokens) -> None:
        self.inbox.put(Event(self, messages.OUTPUTS, messages.dump(Outputs([], [], [row]))))

    def work(self, num: int) -> None:
        """Answer the first requests, unless there is a poisoned one."""
        if self.has_ended:
            return
        if any(POISON in one.prompt_ids for one in self.requests):
            self.fail()
            return
        now, self.requests = self.requests[:num], self.requests[num:]
        for one in now:
            self.put(
                RowTokens(one.ids[0], one.prompt_ids, None, Done("length", None, 0, None, None))
            )
        self.num_answers += len(now)


class Starter:
    """`last` has the newest replica of each index. may_start: whether another start works."""

    def __init__(self) -> None:
        self.last: dict[int, MadeUp] = {}
        self.num_starts = 0
        self.may_start, self.is_ready_at_once = True, True

    def start(
        self, index: int, inbox: Inbox, clients: Sequence[int] = (), *, again: bool = False
    ) -> MadeUp:
        if again and not self.may_start:
            raise OSError("no more processes")
        self.num_starts += 1
        self.last[index] = MadeUp(index, inbox)
        if self.is_ready_at_once:
            self.last[index].get_ready()
        return self.last[index]

    def tokenizer(self) -> None: ...

    def close(self) -> None: ...


def make(num: int) -> tuple[Router, Starter]:
    starter = Starter()
    config = EngineConfig(
        "none", device="cpu", data_parallel_size=num, distributed_executor_backend="ray"
    )
    return Router(config, starter), starter


def add(router: Router, prompts: list[list[int]], **options: Any) -> list[int]:
    return [router.add_request(one, SamplingParams(max_tokens=4), **options) for one in prompts]


def answers(router: Router, starter: Starter, wanted: list[int]) -> dict[int, FinishedOutput]:
    """The answers to these requests. Each replica gives one at a time."""
    found: dict[int, FinishedOutput] = {}
    for _ in range(100 * len(wanted)):
        for one in starter.last.values():
            one.work(1)
        router.advance()
        found |= {one.request_id: one.completion for one in router.take(wanted) if one.completion}
        if len(found) == len(wanted):
            return found
    raise AssertionError(f"{len(wanted) - len(found)} requests do not end")


@pytest.mark.parametrize("num", [1, 19, 99])
@pytest.mark.parametrize("poison", [set[int](), {0}, {17}, {18, 19, 64, 98}])
@pytest.mark.parametrize("num_replicas", [1, 3])
def test_requests_that_end_replicas_are_errors_and_all_others_are_answered(
    num: int, poison: set[int], num_replicas: int
) -> None:
    router, starter = make(num_replicas)
    prompts = [[POISON] if i in poison else [20 + i % 40, 5] for i in range(num)]
    ids = add(router, prompts, incremental=False)
    found = answers(router, starter, ids)
    for request_id, prompt in zip(ids, prompts):
        if prompt == [POISON]:
            assert found[request_id].error == GIVEN_UP
        else:
            assert found[request_id].token_ids == prompt and found[request_id].error is None
    assert not router._pending and not router._dispatcher._alone
    assert [place.load for place in router._dispatcher._places] == [0] * num_replicas


def test_requests_of_a_lost_replica_with_tokens_end_and_later_ones_are_answered() -> None:
    router, starter = make(2)
    ids = add(router, [[5], [6], [7], [8]])
    for one in starter.last.values():
        for request in one.requests:
            one.put(RowTokens(request.ids[0], [9]))
    router.advance()
    starter.last[0].fail()
    found = answers(router, starter, ids)
    assert sorted(one.error or "" for one in found.values()) == [
        "",
        "",
        *["replica 0 was lost"] * 2,
    ]
    later = add(router, [[5], [6], [7], [8]], incremental=False)
    assert starter.last[0].requests and starter.num_starts == 3
    assert all(one.error is None for one in answers(router, starter, later).values())


def test_an_answer_whose_tokens_are_known_is_not_tried_again() -> None:
    router, starter = make(1)
    begun, silent = add(router, [[5, 6], [7, 8]])
    starter.last[0].put(RowTokens(begun, [5]))
    router.advance()
    starter.last[0].fail()
    found = answers(router, starter, [begun, silent])
    assert found[begun].error == "replica 0 was lost" and found[begun].token_ids == [5]
    assert found[silent].error is None and found[silent].token_ids == [7, 8]


def test_suspects_have_a_replica_for_themselves() -> None:
    router, starter = make(2)
    suspects = add(router, [[5], [6], [7]], incremental=False)
    starter.last[0].fail()
    starter.is_ready_at_once = False
    router.advance()
    starter.last[0].get_ready()
    router.advance()
    assert [one.ids[0] for one in starter.last[0].requests] == [suspects[0], suspects[2]]
    later = add(router, [[5]] * 4, incremental=False)
    assert len(starter.last[0].requests) == 2
    starter.last[1].fail()
    router.advance()
    (waits,) = add(router, [[9]], incremental=False)
    assert router._pending[waits].replica is None
    router.abort_all(suspects)
    found = answers(router, starter, [*later, waits])
    assert found[waits].token_ids == [9]


def test_requests_wait_for_the_only_replica_and_can_be_aborted_meanwhile() -> None:
    router, starter = make(1)
    starter.is_ready_at_once = False
    starter.last[0].fail()
    router.advance()
    first, second = add(router, [[5], [6]], incremental=False)
    router.abort(first)
    starter.last[0].get_ready()
    found = answers(router, starter, [first, second])
    assert (found[first].finish_reason, found[second].finish_reason) == ("abort", "length")
    assert starter.last[0].num_answers == 1


def test_a_replica_that_is_lost_again_and_again_is_given_up() -> None:
    router, starter = make(1)
    for _ in range(2):  # an answer in between begins anew
        for _ in range(MAX_LOSSES - 1):
            starter.last[0].fail()
            router.advance()
        answers(router, starter, add(router, [[5]], incremental=False))
    assert starter.num_starts == 2 * MAX_LOSSES - 1
    add(router, [[5]], incremental=False)
    for _ in range(MAX_LOSSES - 1):
        starter.last[0].fail()
        router.advance()
    starter.last[0].fail()
    with pytest.raises(ReplicaFailed, match="no replica is left: replica 0 was lost"):
        router.advance()
    with pytest.raises(ReplicaFailed, match="no replica is left"):
        add(router, [[5]])


def test_a_replica_that_cannot_be_started_again_stays_lost() -> None:
    router, starter = make(1)
    starter.may_start = False
    add(router, [[5]])
    starter.last[0].fail()
    with pytest.raises(ReplicaFailed, match="no replica is left: replica 0 was lost"):
        router.advance()
    with pytest.raises(ReplicaFailed, match="no replica is left: replica 0 was lost"):
        add(router, [[5]])


def test_a_replica_with_another_checkpoint_does_not_come_back() -> None:
    router, starter = make(2)
    starter.is_ready_at_once = False
    lost = starter.last[0]
    lost.fail()
    router.advance()
    starter.last[0].get_ready(EngineInfo("b", 64, 4, 512, 64, 16, 9, [], {}))
    router.advance()
    assert "different checkpoint" in str(router.replicas[0].failure)
    assert starter.last[0].has_ended and starter.num_starts == 3
    found = answers(router, starter, add(router, [[5]] * 3, incremental=False))
    assert all(one.error is None for one in found.values())


def test_counts_of_a_lost_replica_are_kept() -> None:
    router, starter = make(1)

    def count() -> float:
        (metric,) = router.metrics.read()
        return metric.value

    answers(router, starter, add(router, [[5]] * 3, incremental=False))
    assert count() == 3
    starter.last[0].fail()
    router.advance()
    assert count() == 3
    answers(router, starter, add(router, [[5]] * 2, incremental=False))
    assert count() == 5
