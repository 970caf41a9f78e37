"""Lets several threads use one engine. Their requests run in the same batches."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from nanovllm.engine import Engine
from nanovllm.schedule.outputs import Increment

WAIT_S = 1.0  # a sleeping thread looks again after this time: an interrupt can lose a notification


class SharedEngine:
    """One thread at a time uses the engine. Of the threads that wait for outputs, one steps.

    The stepping thread goes on until it has outputs of its own requests. Other threads sleep until
    their outputs are there, or until nobody steps. Threads that queue requests come in between two
    steps.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._changed = threading.Condition()
        self._user: int | None = None  # the thread that uses the engine
        self._num_callers = 0  # threads that wait in `exclusive`
        self._sleeping: dict[int, Collection[int]] = {}  # by thread: requests it waits for
        self._dropped: deque[Collection[int]] = deque()
        self._known_threads = threading.local()
        self._known_threads.entered = True  # this thread has loaded the engine

    @contextmanager
    def exclusive(self) -> Iterator[Engine]:
        """Use the engine alone, between two steps of other threads."""
        try:
            with self._changed:
                self._num_callers += 1
                try:
                    self._take_over(lambda: True)
                finally:
                    self._num_callers -= 1
            yield self.engine
        finally:
            self._release()

    def outputs(self, request_ids: Collection[int]) -> list[Increment]:
        """Wait for outputs of these requests, and step the engine if no other thread does.

        Outputs of other requests stay for their own threads.
        """
        engine, me = self.engine, threading.get_ident()

        def may_go_on() -> bool:
            return not self._num_callers or engine.has_outputs(request_ids)

        while True:
            try:
                with self._changed:
                    self._sleeping[me] = request_ids
                    try:
                        self._take_over(may_go_on)
                    finally:
                        del self._sleeping[me]
                taken = engine.take(request_ids)
                while not (taken or self._is_awaited()):
                    engine.advance()
                    taken = engine.take(request_ids)
            finally:
                self._release()
            if taken:
                return taken

    def _is_awaited(self) -> bool:
        """Whether another thread waits to use the engine, or for outputs that are there."""
        if self._num_callers:
            return True
        has_outputs = self.engine.has_outputs
        return has_outputs() and any(map(has_outputs, tuple(self._sleeping.values())))

    def drop(self, request_ids: Collection[int]) -> None:
        """Abort requests whose outputs nobody reads any more. Finished requests are ignored.

        If the engine is in use, its user drops them. That user may be this thread, where Python
        closes a generator in the middle of a step.
        """
        self._dropped.append(request_ids)
        with self._changed:
            if self._user is None:
                self._user = threading.get_ident()
                self._release()

    def _take_over(self, is_ready: Callable[[], bool]) -> None:
        """Wait until nobody uses the engine and `is_ready`; then this thread uses it."""
        me = threading.get_ident()
        if self._user == me:
            raise RuntimeError("this thread uses the engine already, in a call further up")
        while self._user is not None or not is_ready():
            self._changed.wait(WAIT_S)
        self._user = me
        if not hasattr(self._known_threads, "entered"):
            self.engine.enter_thread()
            self._known_threads.entered = True

    def _release(self) -> None:
        """Let other threads use the engine, if this thread uses it."""
        with self._changed:
            if self._user != threading.get_ident():
                return
            try:
                while self._dropped:
                    self.engine.abort_all(self._dropped.popleft())
            finally:
                self._user = None
                self._changed.notify_all()
