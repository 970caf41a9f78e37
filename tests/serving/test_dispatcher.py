"""A client's answers after the loss of replicas. The connections are made up, and note messages."""

from __future__ import annotations

from typing import Any, cast

import pytest

from nanovllm import SamplingParams
from nanovllm.replicas import messages
from nanovllm.replicas.load_balancer import Place
from nanovllm.replicas.messages import Add
from nanovllm.serving.answer import Answer
from nanovllm.serving.async_engine import Unavailable
from nanovllm.serving.dispatcher import AnswerDispatcher, Parcel
from nanovllm.serving.stream import RequestState


class Connections:
    """sent: the engine, the media, the ids and the seeds of each message. prompt_logprobs: of each
    message."""

    def __init__(self, num: int) -> None:
        self.alive = set(range(num))
        self.sent: list[tuple[int, bytes, list[int], list[int]]] = []
        self.prompt_logprobs: list[int | None] = []
        self.ends: list[tuple[int, list[int]]] = []

    def living(self) -> list[int]:
        return sorted(self.alive)

    def send_add(self, engine: int, media: bytes, add: bytes) -> None:
        found = messages.load_add(add)
        self.sent.append((engine, media, found.ids, found.seeds))
        self.prompt_logprobs.append(found.prompt_logprobs)

    def send_ends(self, engine: int, ids: list[int], reason: str) -> None:
        self.ends.append((engine, ids))


class Replicas:
    """Three answers to one prompt, on two replicas."""

    def __init__(self, num: int = 2) -> None:
        self.connections = Connections(num)
        self.dispatcher = AnswerDispatcher(cast(Any, self.connections))
        if num > 1:
            self.dispatcher.places = [Place(64) for _ in range(num)]
        self.answers = self.dispatcher.answers
        self.send(7)

    def send(self, first: int) -> None:
        params = SamplingParams(n=3)
        answers = [Answer(i, params, [5, 6], None, incremental=True) for i in range(3)]
        ids = [first, first + 1, first + 2]
        fields = messages.packed_params(params, detokenizes=False)
        add = Add(
            ids, [i + 100 for i in ids], [5, 6], fields, True, 0, None, has_media=True,
            prompt_logprobs=4,
        )  # fmt: skip
        feed = RequestState(str(first), first, answers)
        self.dispatcher.send(feed, Parcel(add, b"media", [], 10))

    def lose(self, engine: int) -> list[int]:
        self.connections.alive.remove(engine)
        return self.dispatcher.lost(engine)

    def start_again(self, engine: int) -> None:
        self.connections.alive.add(engine)
        self.dispatcher.restarted(engine)

    def take_sent(self) -> list[tuple[int, bytes, list[int], list[int]]]:
        sent, self.connections.sent = self.connections.sent, []
        return sent


def test_answers_without_tokens_go_to_the_other_replica_with_their_seeds() -> None:
    both = Replicas()
    assert both.take_sent() == [(0, b"media", [7, 9], [107, 109]), (1, b"media", [8], [108])]
    both.answers[7].parcel = None  # tokens have come
    assert both.lose(0) == [7]
    assert both.take_sent() == [(1, b"media", [9], [109])]
    for one in (7, 8, 9):
        both.dispatcher.finish(one)
    assert [place.load for place in both.dispatcher.places] == [0, 0]


def test_no_answer_is_sent_a_third_time() -> None:
    both = Replicas()
    assert both.lose(0) == []
    both.take_sent()
    ending = both.lose(1)
    assert ending == [7, 9] and both.take_sent() == []  # 8 is lost for the first time
    for one in ending:
        both.dispatcher.finish(one)
    both.start_again(1)
    assert both.take_sent() == [(1, b"media", [8], [108])]
    assert both.lose(1) == [8]


def test_answers_wait_while_no_replica_is_there_and_can_be_aborted() -> None:
    both = Replicas()
    both.lose(0)
    both.lose(1)
    both.take_sent()
    with pytest.raises(Unavailable, match="all replicas are being started again"):
        both.send(20)
    both.dispatcher.send_ends([8], messages.ABORT)
    both.dispatcher.finish(8)
    both.start_again(0)
    assert both.take_sent() == [] and both.connections.ends == []


def test_a_single_engine_keeps_nothing_to_send_again() -> None:
    alone = Replicas(1)
    assert alone.take_sent() == [(0, b"media", [7, 8, 9], [107, 108, 109])]
    assert all(one.parcel is None and one.engine == 0 for one in alone.answers.values())


def test_one_replica_computes_the_log_probabilities_of_the_prompt() -> None:
    replicas = Replicas()
    sent, nums = replicas.connections.sent, replicas.connections.prompt_logprobs
    found = {7 in ids: num for (_, _, ids, _), num in zip(sent, nums, strict=True)}
    assert found == {True: 4, False: None}
    for one in (7, 8):  # again, alone
        engine = replicas.answers[one].engine
        assert engine is not None
        parcel = replicas.answers[one].parcel
        assert parcel is not None
        add = messages.load_add(parcel.packed([one]))
        assert add.prompt_logprobs == (4 if one == 7 else None)
