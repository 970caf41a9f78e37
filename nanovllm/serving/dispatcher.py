"""Which engine has which answer of a client, and what becomes of the answers of a lost one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from nanovllm.replicas import messages
from nanovllm.replicas.load_balancer import Place, choose
from nanovllm.replicas.messages import Add
from nanovllm.serving.answer import Answer
from nanovllm.serving.async_engine import Unavailable
from nanovllm.serving.engine_connections import EngineConnections
from nanovllm.serving.stream import RequestState

logger = logging.getLogger(__name__)


class Parcel(NamedTuple):
    """What engines are sent of a prompt and all its answers. media: packed, b"" without any.
    digests: of the prompt's blocks. cost: of each answer, see `load_balancer`."""

    add: Add
    media: bytes
    digests: list[bytes]
    cost: int

    def packed(self, ids: Sequence[int]) -> bytes:
        """The ADD for some of the answers. Raises ValueError if it is too large."""
        first = self.add.ids[0]
        seeds = [self.add.seeds[one - first] for one in ids]
        prompt_logprobs = self.add.prompt_logprobs if ids[0] == first else None
        part = msgspec.structs.replace(
            self.add, ids=list(ids), seeds=seeds, prompt_logprobs=prompt_logprobs
        )
        return messages.dump(part)


@dataclass
class Open:
    """An unfinished answer. engine: its index, None while the answer waits for one. parcel: None if
    the answer is not sent again."""

    feed: RequestState
    answer: Answer
    cost: int
    engine: int | None
    parcel: Parcel | None


class AnswerDispatcher:
    """Sends a client's answers to its engines.

    If an engine is lost, those of its answers without tokens are sent once more, to another engine
    or to the one that is started in its place. Clients do not know each other's answers. So unlike
    `replicas.dispatcher` they cannot find out which one ends engines, but it ends two at most.

    answers: those that are unfinished, by id. places: of the engines; none for a single one.
    """

    def __init__(self, engines: EngineConnections) -> None:
        self.answers: dict[int, Open] = {}
        self.places: list[Place] = []
        self._engines = engines
        self._waiting: list[int] = []

    def send(self, feed: RequestState, parcel: Parcel) -> None:
        """Send a request's answers, in one message per engine.

        Raises ValueError if a message is too large, and Unavailable; then nothing is sent.
        """
        ids = parcel.add.ids
        message = parcel.packed(ids)  # may raise: before any state changes
        by_engine = self._chosen(parcel, ids)
        kept = parcel if self.places else None
        for engine, own in by_engine.items():
            for one in own:
                answer = feed.answers[one - feed.first_id]
                self.answers[one] = Open(feed, answer, parcel.cost, engine, kept)
            if len(by_engine) > 1:
                message = parcel.packed(own)
            self._engines.send_add(engine, parcel.media, message)

    def finish(self, one: int) -> Open:
        """Forget an answer that has ended."""
        found = self.answers.pop(one)
        if self.places and found.engine is not None:
            self.places[found.engine].release(found.cost)
        return found

    def send_ends(self, ids: Sequence[int], reason: str) -> None:
        """Ask the engines to end these answers."""
        by_engine: dict[int, list[int]] = {}
        for one in ids:
            if (engine := self.answers[one].engine) is not None:
                by_engine.setdefault(engine, []).append(one)
        for engine, own in by_engine.items():
            self._engines.send_ends(engine, own, reason)

    def lost(self, engine: int) -> list[int]:
        """Send answers of a lost engine again. Returns those that end instead."""
        own = [one for one, found in self.answers.items() if found.engine == engine]
        ending = [one for one in own if self.answers[one].parcel is None]
        for one in own:
            found = self.answers[one]
            if found.parcel is not None:
                found.engine = None
                self.places[engine].release(found.cost)
                self._waiting.append(one)
        if own:
            words = "replica %d: %d answer(s) end with an error, %d are tried again"
            logger.warning(words, engine, len(ending), len(own) - len(ending))
        self._send_waiting()
        return ending

    def restarted(self, engine: int) -> None:
        """An engine that has been started again takes answers."""
        self.places[engine].forget()
        self._send_waiting()

    def _send_waiting(self) -> None:
        """Send the waiting answers, if there is an engine for them."""
        if not self._engines.living():
            return
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            found = self.answers.get(one)
            if found is None or found.parcel is None:
                continue  # aborted meanwhile
            parcel, found.parcel = found.parcel, None
            (found.engine,) = self._chosen(parcel, [one])
            self._engines.send_add(found.engine, parcel.media, parcel.packed([one]))

    def _chosen(self, parcel: Parcel, ids: Sequence[int]) -> dict[int, list[int]]:
        """The answers assigned to each engine, which are counted there. Raises Unavailable."""
        if not self.places:
            return {0: list(ids)}
        living = self._engines.living()
        if not living:
            raise Unavailable("all replicas are being started again")
        found: dict[int, list[int]] = {}
        for one in ids:
            engine = choose(self.places, living, parcel.digests, parcel.cost)
            self.places[engine].add(parcel.digests, parcel.cost)
            found.setdefault(engine, []).append(one)
        return found
