"""Which replica gets which request, and what becomes of the requests of a lost one."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from nanovllm.replicas import messages
from nanovllm.replicas.handshake import Fleet
from nanovllm.replicas.load_balancer import Place, choose
from nanovllm.replicas.messages import End, RowTokens
from nanovllm.replicas.replica import Replica
from nanovllm.replicas.suspects import ALONE_LOSSES, SuspectGroup, Suspects

logger = logging.getLogger(__name__)

GIVEN_UP = f"{ALONE_LOSSES} replicas were lost while they worked on this request alone"


class Parcel(NamedTuple):
    """What is sent of a request. digests: of its prompt's blocks. cost: see `load_balancer`."""

    add: bytes
    media: bytes
    digests: list[bytes]
    cost: int


@dataclass
class Pending:
    """An unfinished request. row: all that a replica has sent of the answer. replica: None while it
    waits for one. parcel: None if it is not sent any more."""

    prompt_ids: list[int]
    row: RowTokens
    parcel: Parcel | None = None
    cost: int = 0
    replica: Replica | None = None


class Dispatcher:
    """Sends requests to the replicas of a fleet.

    A lost replica is started again. Requests wait meanwhile if no other replica is left. Those that
    it has worked on are tried again unless some of their tokens are known already: see `Suspects`.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.pending: dict[int, Pending] = {}
        self._places = [Place(one.num_blocks) for one in fleet.infos]
        self._waiting: list[int] = []
        self._suspects = Suspects()
        self._alone: dict[int, SuspectGroup] = {}  # replicas that work on a group of suspects alone

    def send(self, request_id: int, parcel: Parcel) -> None:
        """Send a pending request to the replica that suits it best, or let it wait for one."""
        pending = self.pending[request_id]
        pending.parcel, pending.cost = parcel, parcel.cost
        replicas = self._fleet.replicas
        usable = {one.index for one in replicas if one.is_ready} - self._alone.keys()
        while usable:
            index = choose(self._places, usable, parcel.digests, parcel.cost)
            if self._give(pending, parcel, index):
                return
            usable.remove(index)
        self._waiting.append(request_id)

    def finish(self, request_id: int) -> Pending:
        """Forget a request that has ended."""
        pending = self.pending.pop(request_id)
        if pending.replica is not None:
            index = pending.replica.index
            self._places[index].release(pending.cost)
            if (group := self._alone.get(index)) is not None:
                group.request_ids.remove(request_id)
                if not group.request_ids:
                    del self._alone[index]
        return pending

    def drop(self, request_ids: Iterable[int]) -> dict[int, Pending]:
        """Forget unfinished requests here and at their replicas; returns them."""
        dropped = {one: self.finish(one) for one in request_ids if one in self.pending}
        for replica in self._fleet.replicas:
            ids = [one for one, pending in dropped.items() if pending.replica is replica]
            if ids:
                replica.send(messages.END, messages.dump(End(ids, messages.ABORT)))
        return dropped

    def forget_prefixes(self) -> None:
        for replica, place in zip(self._fleet.replicas, self._places):
            replica.send(messages.FORGET)
            place.forget()

    def ready(self, replica: Replica, payload: bytes) -> None:
        """A replica that was started again is warm. Raises ValueError as `Fleet.begin` does."""
        info = self._fleet.begin(replica, payload)
        self._places[replica.index] = Place(info.num_blocks)

    def lost(self, replica: Replica, failure: Exception) -> dict[int, str]:
        """Start a failed replica again. Returns which of its requests end, and why."""
        own = {one: found for one, found in self.pending.items() if found.replica is replica}
        retried = [one for one, found in own.items() if not found.row.token_ids]
        ending = {one: str(failure) for one in own}
        for request_id in retried:
            del ending[request_id]
            self._places[replica.index].release(own[request_id].cost)
            own[request_id].replica = None
        if (group := self._alone.pop(replica.index, None)) is not None:
            left = self.pending.keys() - ending.keys()
            group.request_ids = [one for one in group.request_ids if one in left]
            if group.request_ids and not self._suspects.lost(group):
                ending |= dict.fromkeys(group.request_ids, GIVEN_UP)
        elif retried:
            self._suspects.add(retried)
        words = "%d request(s) end with an error, %d are tried again: %s"
        logger.error(words, len(ending), len(own) - len(ending), failure)
        self._fleet.restart(replica, failure)
        return ending

    def give_out(self) -> None:
        """Send what waits, as far as replicas are free for it."""
        if self._suspects:
            busy = {one.replica.index for one in self.pending.values() if one.replica is not None}
            self._try_again(busy)
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for request_id in waiting:
                pending = self.pending.get(request_id)
                if pending is not None and pending.parcel is not None:
                    self.send(request_id, pending.parcel)

    def _try_again(self, busy: Container[int]) -> None:
        """Give groups of suspects to replicas that have nothing else."""
        for replica in self._fleet.replicas:
            if not replica.is_ready or replica.index in busy:
                continue
            group = self._next_group()
            if group is None:
                return
            self._alone[replica.index] = group
            for request_id in group.request_ids:
                pending = self.pending[request_id]
                assert pending.parcel is not None
                self._give(pending, pending.parcel, replica.index)

    def _next_group(self) -> SuspectGroup | None:
        """The next group of suspects, without requests that have been dropped meanwhile."""
        while self._suspects:
            group = self._suspects.next()
            group.request_ids = [one for one in group.request_ids if one in self.pending]
            if group.request_ids:
                return group
        return None

    def _give(self, pending: Pending, parcel: Parcel, index: int) -> bool:
        """Send a request to a replica. False if that has failed; then its event follows."""
        replica = self._fleet.replicas[index]
        if parcel.media and not replica.send(messages.MEDIA, parcel.media):
            return False
        if not replica.send(messages.ADD, parcel.add):
            return False
        self._places[index].add(parcel.digests, parcel.cost)
        pending.replica = replica
        return True
