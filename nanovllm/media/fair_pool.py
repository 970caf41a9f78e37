"""Threads that serve several groups of work in turn."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any


@dataclass
class _Group:
    waiting: deque[tuple[Future[Any], Callable[[], Any]]] = field(default_factory=deque)
    num_running: int = 0


class FairPool:
    """A free thread takes the next call of the group with the fewest running ones; among equal
    groups, of the least recently served one.

    One group has at most `num_workers` threads at a time. There is one more thread, so a group with
    long work does not block another one.
    """

    def __init__(self, num_workers: int, name: str) -> None:
        self.num_threads = num_workers + 1
        self._most = num_workers
        self._threads = ThreadPoolExecutor(self.num_threads, thread_name_prefix=name)
        self._groups: dict[Hashable, _Group] = {}  # least recently served first
        self._lock = threading.Lock()

    def submit(self, group: Hashable, call: Callable[[], Any]) -> Future[Any]:
        """Raises RuntimeError after `close`."""
        future: Future[Any] = Future()
        with self._lock:
            self._threads.submit(self._next)
            self._groups.setdefault(group, _Group()).waiting.append((future, call))
        return future

    def close(self) -> None:
        """Cancels waiting calls, waits for running ones, and ends the threads."""
        with self._lock:
            waiting = [future for group in self._groups.values() for future, _ in group.waiting]
        for future in waiting:
            future.cancel()
        self._threads.shutdown(cancel_futures=True)

    def _next(self) -> None:
        with self._lock:
            ready = [
                name
                for name, group in self._groups.items()
                if group.waiting and group.num_running < self._most
            ]
            if not ready:
                return
            name = min(ready, key=lambda one: self._groups[one].num_running)
            group = self._groups[name] = self._groups.pop(name)
            future, call = group.waiting.popleft()
            group.num_running += 1
        _run(future, call)
        with self._lock:
            group.num_running -= 1
            if not group.waiting and not group.num_running:
                del self._groups[name]
            with contextlib.suppress(RuntimeError):  # closed
                if group.waiting:  # a thread may have left it alone for its number of running ones
                    self._threads.submit(self._next)


def _run(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
