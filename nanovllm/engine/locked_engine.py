"""Lets several threads use one engine. Their requests run in the same batches."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from nanovllm.engine.engine_client import AnyEngine
from nanovllm.engine.owner import OwnerProcess
from nanovllm.schedule.outputs import OutputDelta

WAIT_S = 1.0  # a waiting thread checks again after this time: an interrupt can lose a notification


class LockedEngine:
    """One thread at a time uses the engine. Of the threads that wait for outputs, one steps.

    The stepping thread continues until it has outputs of its own requests. Other threads sleep
    until their outputs are ready, or until no thread steps. Threads that queue requests run between
    two steps.

    Ctrl-C can raise KeyboardInterrupt at the beginning of any Python function and at any wait. So
    `_user` is reset by an assignment, before any call, and `_lock` is entered directly, since
    leaving a `Condition` is a Python function.
    """

    def __init__(self, engine: AnyEngine) -> None:
        self.engine = engine
        self._owner = OwnerProcess()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._user: int | None = None  # the thread that uses the engine
        self._callers: deque[int] = deque()  # threads that wait in `exclusive`, in their order
        self._sleeping: dict[int, Collection[int]] = {}  # by thread: requests it waits for
        self._dropped: deque[Collection[int]] = deque()
        self._known_threads = threading.local()
        self._known_threads.entered = True  # this thread has loaded the engine

    @contextmanager
    def exclusive(self) -> Iterator[AnyEngine]:
        """Use the engine alone, between two steps of other threads."""
        me = threading.get_ident()
        self._check_user(me)
        try:
            with self._lock:
                try:
                    self._callers.append(me)
                    self._take_over(me, lambda: self._is_my_turn(me))
                finally:
                    if me in self._callers:
                        self._callers.remove(me)
            yield self.engine
        finally:
            if self._user == me:
                self._user = None
            self._after_use()

    def outputs(self, request_ids: Collection[int]) -> list[OutputDelta]:
        """Wait for outputs of these requests, and step the engine if no other thread does.

        Outputs of other requests remain for their threads.
        """
        engine, me = self.engine, threading.get_ident()
        self._check_user(me)

        def may_go_on() -> bool:
            return not self._callers or engine.has_outputs(request_ids)

        while True:
            try:
                with self._lock:
                    self._sleeping[me] = request_ids
                    try:
                        self._take_over(me, may_go_on)
                    finally:
                        del self._sleeping[me]
                taken = engine.take(request_ids)
                while not (taken or self._is_awaited()):
                    engine.advance()
                    taken = engine.take(request_ids)
            finally:
                if self._user == me:
                    self._user = None
                self._after_use()
            if taken:
                return taken

    def _is_awaited(self) -> bool:
        """Whether another thread waits to use the engine, or has outputs ready."""
        return bool(self._callers) or self._have_outputs_for_sleeping()

    def _is_my_turn(self, me: int) -> bool:
        """Whether this thread has waited longest in `exclusive`, and no thread has outputs ready.

        So a thread that calls `exclusive` in a loop leaves the engine to others.
        """
        return self._callers[0] == me and not self._have_outputs_for_sleeping()

    def _have_outputs_for_sleeping(self) -> bool:
        has_outputs = self.engine.has_outputs
        return has_outputs() and any(map(has_outputs, tuple(self._sleeping.values())))

    def drop(self, request_ids: Collection[int]) -> None:
        """Abort requests whose outputs are no longer read. Finished requests are ignored.

        If a thread uses the engine, that thread drops them. It may be this thread, if Python closes
        a generator in the middle of a step.
        """
        if not self._owner.is_here:
            return  # a generator that a fork closes
        self._dropped.append(request_ids)
        self._after_use()

    def _check_user(self, me: int) -> None:
        """Raise RuntimeError in a fork, and for a nested call."""
        self._owner.check()
        if self._user == me:
            raise RuntimeError("this thread uses the engine already, in a call further up")

    def _take_over(self, me: int, is_ready: Callable[[], bool]) -> None:
        """Wait until the engine is free and `is_ready`, then take it."""
        while self._user is not None or not is_ready():
            self._changed.wait(WAIT_S)
        self._user = me
        if not hasattr(self._known_threads, "entered"):
            self.engine.enter_thread()
            self._known_threads.entered = True

    def _after_use(self) -> None:
        """Drop requests if the engine is free, and wake threads that wait for it."""
        with self._lock:
            if self._user is not None:
                return
            try:
                if self._dropped:
                    self._user = threading.get_ident()
                while self._dropped:
                    self.engine.abort_all(self._dropped[0])
                    self._dropped.popleft()
            finally:
                self._user = None
                self._changed.notify_all()
