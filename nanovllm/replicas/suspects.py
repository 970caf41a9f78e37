"""Requests of lost replicas that are tried again.

Nothing tells which request has ended a replica, or whether one has. So the unfinished requests of a
lost replica become a group, which gets a replica for itself. If that is lost, too, the group is
halved; a single request that has cost ALONE_LOSSES replicas in this way is given up.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

ALONE_LOSSES = 2


@dataclass
class SuspectGroup:
    """num_alone: the replicas that were lost while they had this group alone."""

    request_ids: list[int]
    num_alone: int = 0


class Suspects:
    """The groups that wait for a replica, in their order."""

    def __init__(self) -> None:
        self._groups: deque[SuspectGroup] = deque()

    def __bool__(self) -> bool:
        return bool(self._groups)

    def add(self, request_ids: list[int]) -> None:
        """Take the requests of a replica that was lost."""
        self._groups.append(SuspectGroup(request_ids))

    def next(self) -> SuspectGroup:
        return self._groups.popleft()

    def lost(self, group: SuspectGroup) -> bool:
        """Take back what is left of a group whose replica was lost. False: it is one request, and
        is given up."""
        group.num_alone += 1
        request_ids = group.request_ids
        if len(request_ids) > 1:
            middle = len(request_ids) // 2
            self._groups += [SuspectGroup(request_ids[:middle]), SuspectGroup(request_ids[middle:])]
        elif group.num_alone < ALONE_LOSSES:
            self._groups.append(group)
        else:
            return False
        return True
