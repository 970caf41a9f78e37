"""The replicas of an engine: starting them, waiting until all are warm, and ending them."""

from __future__ import annotations

import logging
import queue
from collections.abc import Sequence

from nanovllm import hub, progress
from nanovllm.config import EngineConfig
from nanovllm.engine.request import EngineInfo
from nanovllm.replicas import messages
from nanovllm.replicas.replica import Inbox, Replica, ReplicaFailed, Starter
from nanovllm.startup.ranks import checkpoint_digest

logger = logging.getLogger(__name__)


class Fleet:
    """All replicas of an engine, warm. inbox: their messages and failures. infos: their
    descriptions."""

    def __init__(
        self, starter: Starter, num: int, clients: Sequence[Sequence[int]] | None = None
    ) -> None:
        """Start all replicas and wait. clients: per replica, descriptors of its clients' sockets.

        Raises the first failure, and ValueError if replicas would give different answers.
        """
        self.replicas: list[Replica] = []
        self.inbox: Inbox = queue.SimpleQueue()
        self._starter = starter
        try:
            for index in range(num):
                of_clients = () if clients is None else clients[index]
                self.replicas.append(starter.start(index, self.inbox, of_clients))
            self.tokenizer = starter.tokenizer()
            self.infos = infos_of(self.replicas, self.inbox)
        except BaseException:
            self.close()
            raise

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
                    other.tell(messages.GO)
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
