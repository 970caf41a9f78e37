"""The start of replicas, until all of them are warm."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

from nanovllm import progress
from nanovllm.replicas import messages
from nanovllm.replicas.messages import Facts
from nanovllm.replicas.replica import Inbox, Replica, ReplicaFailed

logger = logging.getLogger(__name__)


def facts_of(replicas: Sequence[Replica], inbox: Inbox) -> list[Facts]:
    """The facts of all replicas, once they are warm. Raises the first failure.

    In a cold start some replicas wait for what another one compiles.
    """
    facts: dict[int, Facts] = {}
    with progress.bar(
        total=len(replicas), desc="starting replicas", unit=" replicas", leave=False
    ) as bar:
        while len(facts) < len(replicas):
            event = inbox.get()
            if event.failure is not None:
                raise raisable(event.failure)
            facts[event.replica.index] = Facts(**json.loads(event.payload))
            bar.update()
            for other in replicas:
                if other.waits_for == event.replica.index:
                    other.tell(messages.GO)
    found = [facts[index] for index in sorted(facts)]
    check_agreement(found, [replica.name for replica in replicas])
    logger.info("%d replicas are ready", len(found))
    return found


def check_agreement(facts: Sequence[Facts], names: Sequence[str]) -> None:
    """Raise ValueError if answers depend on the replica that gives them."""
    for one, name in zip(facts, names, strict=True):
        if one.checkpoint != facts[0].checkpoint:
            raise ValueError(f"{name} sees another checkpoint than {names[0]}")
    lengths = [one.max_model_len for one in facts]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"the caches of the replicas hold requests of {lengths} tokens, by the memory that is "
            f"free on their devices: set max_model_len to {min(lengths)} or less"
        )


def raisable(failure: Exception) -> Exception:
    """The error for a caller: a user's mistake stays a ValueError."""
    return failure if isinstance(failure, ValueError) else ReplicaFailed(str(failure))
