"""The replicas of an engine: their start, until all of them are warm, another start of a lost one,
and their end."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nanovllm import hub, progress
from nanovllm.config import EngineConfig
from nanovllm.engine.request import EngineInfo
from nanovllm.parallel.ranks import deferred_interrupts
from nanovllm.replicas import messages
from nanovllm.replicas.replica import Inbox, Replica, ReplicaFailed, Starter
from nanovllm.startup.ranks import checkpoint_digest

if TYPE_CHECKING:
    from nanovllm.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# A replica is not started again once it has been lost so many times one after another: without an
# answer in between, or so many seconds.
MAX_LOSSES, STEADY_S = 8, 600.0


class Fleet:
    """All replicas of an engine, warm after `start`. inbox: their messages and failures. infos:
    what they say of themselves.

    A lost replica is started again in its place: `replicas` then has another object there, which
    is ready once `begin` has taken its first message.
    """

    tokenizer: Tokenizer | None
    infos: list[EngineInfo]

    def __init__(self, starter: Starter, num: int) -> None:
        """Starts nothing. `close` it also if `start` raises."""
        self.replicas: list[Replica] = []
        self.inbox: Inbox = queue.SimpleQueue()
        self._starter = starter
        self._num_losses, self._lost_at = [0] * num, [0.0] * num

    def start(self, clients: Sequence[Sequence[int]] | None = None) -> None:
        """Start all replicas and wait. clients: per replica, descriptors of its clients' sockets.

        Raises the first failure, and ValueError if replicas would give different answers.
        """
        for index in range(len(self._num_losses)):
            of_clients = () if clients is None else clients[index]
            # a replica that is not in the list yet would not be closed
            with deferred_interrupts():
                self.replicas.append(self._starter.start(index, self.inbox, of_clients))
        self.tokenizer = self._starter.tokenizer()
        self.infos = infos_of(self.replicas, self.inbox)
        for replica in self.replicas:
            replica.is_ready = True

    def close(self) -> None:
        """End all replicas and everything they started."""
        for replica in self.replicas:
            replica.begin_close()
        for replica in self.replicas:
            replica.close()
        self._starter.close()

    @property
    def causes(self) -> str:
        """Why all replicas have failed."""
        return "; ".join(str(replica.failure) for replica in self.replicas)

    @property
    def is_lost(self) -> bool:
        """Whether no replica is left, and none starts again."""
        return all(replica.failure is not None for replica in self.replicas)

    def restart(self, lost: Replica, failure: Exception, clients: Sequence[int] = ()) -> bool:
        """Start a replica again that has failed. False if it stays lost: after a user's mistake,
        after MAX_LOSSES, and if it cannot be started."""
        index = lost.index
        lost.failure, lost.is_ready = failure, False
        lost.close()
        now = time.monotonic()
        is_steady = now - self._lost_at[index] > STEADY_S
        self._num_losses[index] = 1 if is_steady else self._num_losses[index] + 1
        self._lost_at[index] = now
        if isinstance(failure, ValueError):
            return False
        if self._num_losses[index] >= MAX_LOSSES:
            logger.error("%s was lost %d times one after another", lost.name, MAX_LOSSES)
            return False
        try:
            found = self._starter.start(index, self.inbox, clients, again=True)
        except Exception as error:  # Ray has many types of errors
            logger.error("%s cannot be started again: %s", lost.name, error)
            return False
        found.follow(lost)
        self.replicas[index] = found
        logger.warning("%s is started again", lost.name)
        return True

    def begin(self, replica: Replica, payload: bytes) -> EngineInfo:
        """What a replica that was started again says of itself. Raises ValueError if answers
        depended on the replica."""
        info = messages.load_info(payload)
        check_agreement([self.infos[0], info], ["the engine", replica.name])
        replica.is_ready = True
        return info

    def note_answer(self, index: int) -> None:
        """A replica has answered a request."""
        self._num_losses[index] = 0


def infos_of(replicas: Sequence[Replica], inbox: Inbox) -> list[EngineInfo]:
    """The infos of all replicas, once they are warm. Raises the first failure.

    In a cold start some replicas wait for programs that another one compiles.
    """
    infos: dict[int, EngineInfo] = {}
    with progress.bar(
        total=len(replicas), desc="starting replicas", unit=" replicas", leave=False
    ) as bar:
        while len(infos) < len(replicas):
            event = inbox.get()
            if event.failure is not None:
                raise raisable(event.failure)
            infos[event.replica.index] = messages.load_info(event.payload)
            bar.update()
            for other in replicas:
                if other.waits_for == event.replica.index:
                    other.send(messages.GO)
    found = [infos[index] for index in sorted(infos)]
    check_agreement(found, [replica.name for replica in replicas])
    logger.info("%d replicas are ready", len(found))
    return found


def check_agreement(infos: Sequence[EngineInfo], names: Sequence[str]) -> None:
    """Raise ValueError if replicas would give different answers."""
    for one, name in zip(infos, names, strict=True):
        if one.checkpoint != infos[0].checkpoint:
            raise ValueError(f"{name} has a different checkpoint from {names[0]}")
    lengths = [one.max_model_len for one in infos]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"the KV caches of the replicas hold requests of {lengths} tokens, depending on their "
            f"devices' free memory: set max_model_len to {min(lengths)} or less"
        )


def raisable(failure: Exception) -> Exception:
    """The error to raise: a ValueError is a user's mistake and stays one."""
    return failure if isinstance(failure, ValueError) else ReplicaFailed(str(failure))


def digest_of(config: EngineConfig) -> str:
    """The digest of an engine's checkpoint."""
    weights = not config.random_weights
    return checkpoint_digest(hub.resolve(config.model, weights=weights, revision=config.revision))
