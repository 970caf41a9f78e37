"""A thread in rank 0's process that starts, monitors and ends the other ranks."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanovllm.parallel.channel import ChannelClosed
from nanovllm.parallel.errors import RankFailed, RankRefused
from nanovllm.parallel.folder import PrivateFolder
from nanovllm.parallel.rank_handle import RankProcess
from nanovllm.parallel.serve import ANSWER, CONNECTED, ERROR

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.25
CLOSED_TICK_SECONDS = 0.02  # while a rank whose channel has closed is ending
# Time for the other ranks to reply after one has refused.
GRACE_SECONDS = 3.0
CLOSE_SECONDS = 3.0  # for ranks to exit


class RpcError(NamedTuple):
    """The error of a handler: its type, or what has failed (`RankFailed.what`), its text, and
    whether it is a user's mistake."""

    kind: str
    text: str
    is_mistake: bool

    def error(self, name: str) -> Exception:
        """The error that rank 0 raises, with the rank's name: a user's mistake stays a
        ValueError."""
        if self.is_mistake:
            return RankRefused(name, self.text)
        return RankFailed(f"{name}: {self.kind}", f": {self.text}" if self.text else "")


class Rpc:
    """The replies, by rank, to a message sent to all ranks."""

    def __init__(self, number: int, num_ranks: int) -> None:
        self.number, self.num_ranks = number, num_ranks
        self.answers: dict[int, bytes] = {}
        self.refusals: dict[int, RpcError] = {}
        # the first rank that refused, its error, and the time; rank 0 is not counted in `refusals`
        self.first_refusal: tuple[int, RpcError, float] | None = None

    @property
    def is_complete(self) -> bool:
        return len(self.answers) + len(self.refusals) == self.num_ranks

    @property
    def is_refused_by_all(self) -> bool:
        """Whether every rank raised the same error."""
        return len(self.refusals) == self.num_ranks and len(set(self.refusals.values())) == 1

    def refuse(self, rank: int, refusal: RpcError) -> None:
        if self.first_refusal is None:
            self.first_refusal = rank, refusal, time.monotonic()
        if rank > 0:
            self.refusals[rank] = refusal


class Monitor(threading.Thread):
    """Starts ranks 1 … size - 1, and owns their processes and the folder until `end`.

    All cleanup and everything that needs it happen in this thread, which Ctrl-C never interrupts.
    After a failure it kills all ranks. `changed` is notified of replies, of a failure and of the
    end. `names` are those of all ranks. `received` is called with all other messages. The processes
    inherit the file descriptors `inherited`, which must stay open here until `has_started`.
    """

    def __init__(
        self,
        setup: dict[str, Any],
        names: Sequence[str],
        module: str,
        parent: Path | None,
        received: Callable[[str, bytes], None] | None,
        inherited: Sequence[int] = (),
    ) -> None:
        super().__init__(name="ranks", daemon=True)
        self.names, self._received, self._inherited = names, received, inherited
        self._setup, self._size, self._module, self._parent = setup, len(names), module, parent
        self._folder: PrivateFolder | None = None
        self.processes: list[RankProcess] = []
        self.failure: Exception | None = None
        self.changed = threading.Condition()
        self.question: Rpc | None = None
        self.has_started = threading.Event()
        self._callbacks: list[Callable[[Exception], None]] = []
        self._wake, self._woken = socket.socketpair()
        self.is_ending = False
        self._pid = os.getpid()
        self._selector = selectors.DefaultSelector()

    def run(self) -> None:
        try:
            self._start_ranks()
            self.has_started.set()
            last = time.monotonic()
            while not self.is_ending and self.failure is None:
                is_closing = any(process.is_closed for process in self.processes)
                wait_s = CLOSED_TICK_SECONDS if is_closing else TICK_SECONDS
                for key, _ in self._selector.select(wait_s):
                    key.data()
                now = time.monotonic()
                # capped: this process, and the ranks with it, may have been suspended
                self._tick(min(now - last, 2 * TICK_SECONDS))
                last = now
        except BaseException as error:
            self.fail(error if isinstance(error, Exception) else RankFailed(repr(error)))
        finally:
            self._clean_up()
            self.has_started.set()

    @property
    def folder(self) -> Path:
        """The folder of all ranks, once they have started."""
        assert self._folder is not None
        return self._folder.path

    def end(self) -> None:
        """End all ranks and wait until everything is cleaned up."""
        self.begin_end()
        if os.getpid() == self._pid and threading.current_thread() is not self and self.is_alive():
            self.join()

    def begin_end(self) -> None:
        """Start `end` without waiting."""
        if os.getpid() != self._pid:
            return  # a fork of the process that started the ranks
        self.is_ending = True
        if self.is_alive() and threading.current_thread() is not self:
            with contextlib.suppress(OSError):  # the thread is ending
                self._wake.send(b".")

    def fail(self, error: Exception) -> None:
        """Make `error` the failure, unless there is one: kill all ranks, then run the callbacks."""
        with self.changed:
            if self.failure is not None or self.is_ending:
                return
            self.failure = error
            callbacks = tuple(self._callbacks)
            self.changed.notify_all()
        for process in self.processes:
            process.kill()
            # unblocks a thread that is sending, even if the process cannot be killed at once
            process.channel.shut_down()
        for callback in callbacks:
            _call(callback, error)

    def call_on_failure(self, callback: Callable[[Exception], None]) -> None:
        """Call it in this thread when the ranks fail; at once if they have failed."""
        with self.changed:
            self._callbacks.append(callback)
            failure = self.failure
        if failure is not None:
            _call(callback, failure)

    def _start_ranks(self) -> None:
        self._folder = PrivateFolder(self._parent)
        self._selector.register(self._woken, selectors.EVENT_READ, lambda: None)
        for rank in range(1, self._size):
            if self.is_ending:
                return
            process = RankProcess(self._module, rank, self._size, self.names[rank], self._inherited)
            self.processes.append(process)
            for source, action in (
                (process.channel, self._receive),
                (process.beats, self._note_beats),
                (process.output, self._forward),
            ):
                call = _bound(action, process)
                self._selector.register(source, selectors.EVENT_READ, call)
            process.send_setup(self._setup, self.folder)

    def _forward(self, process: RankProcess) -> None:
        if not process.forward_output():
            self._selector.unregister(process.output)

    def _note_beats(self, process: RankProcess) -> None:
        if not process.note_beats():
            self._selector.unregister(process.beats)

    def _receive(self, process: RankProcess) -> None:
        try:
            for name, payload in process.channel.receive_available():
                self._take(process, name, payload)
        except (ChannelClosed, ValueError):
            # `_tick` fails once it has ended: its exit code tells more than the closed channel
            self._selector.unregister(process.channel)
            process.note_closed()

    def _take(self, process: RankProcess, name: str, payload: bytes) -> None:
        """Handle a message from a rank."""
        if name == CONNECTED:
            process.note_connected()
            return
        number = name.removeprefix(ANSWER).removeprefix(ERROR)
        with self.changed:
            question = self.question
            if question is not None and number == str(question.number):
                if name.startswith(ERROR):
                    question.refuse(process.rank, RpcError(*json.loads(payload)))
                else:
                    question.answers[process.rank] = payload
                self.changed.notify_all()
                return
        if name.startswith(ERROR):
            self._fail_by(process.rank, RpcError(*json.loads(payload)))
        elif self._received is not None and not name.startswith(ANSWER):
            self._received(name, payload)

    def _fail_by(self, rank: int, refusal: RpcError) -> None:
        """Fail with a rank's error, unless another rank's end caused it."""
        for _ in range(20):
            for process in self.processes:
                if process.has_ended():
                    self.fail(RankFailed(*process.ending()))
                    return
            if refusal.is_mistake:
                break
            time.sleep(0.01)
        self.fail(refusal.error(self.names[rank]))

    def _tick(self, seconds: float) -> None:
        """Detect ranks that have ended or hang, and requests that will not get all replies."""
        for process in self.processes:
            if process.has_ended() or process.is_late(seconds) or process.is_hung(seconds):
                self.fail(RankFailed(*process.ending()))
        question = self.question
        if question is not None and question.first_refusal is not None:
            rank, refusal, refused_at = question.first_refusal
            if time.monotonic() > refused_at + GRACE_SECONDS:
                self._fail_by(rank, refusal)

    def _clean_up(self) -> None:
        """End all ranks; healthy ones have a few seconds to exit."""
        with self.changed:
            self.changed.notify_all()  # threads that wait for a reply or a failure
        for process in self.processes:
            process.channel.shut_down()
        deadline = time.monotonic() + (CLOSE_SECONDS if self.failure is None else 0.0)
        while time.monotonic() < deadline and not all(one.has_ended() for one in self.processes):
            for process in self.processes:
                process.forward_output()  # a full pipe would block their exit
            time.sleep(0.01)
        for process in self.processes:
            process.kill()
        for process in self.processes:
            if not process.has_ended(seconds=5.0):
                logger.warning("%s (process %d) cannot be killed", process.name, process.pid)
            process.close()
        self._selector.close()
        self._wake.close()
        self._woken.close()
        if self._folder is not None:
            self._folder.remove()


def _bound(action: Callable[[RankProcess], None], process: RankProcess) -> Callable[[], None]:
    return lambda: action(process)


def _call(callback: Callable[[Exception], None], error: Exception) -> None:
    try:
        callback(error)
    except Exception:
        logger.exception("a failure callback raised an error")
