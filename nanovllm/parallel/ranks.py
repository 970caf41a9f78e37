"""Rank 0's side of an engine's processes: starts the other ranks, sends them messages and detects
failures."""

from __future__ import annotations

import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from nanovllm.parallel.channel import ChannelClosed
from nanovllm.parallel.errors import RankFailed
from nanovllm.parallel.monitor import Monitor, Rpc, RpcError
from nanovllm.parallel.serve import ASKS

Result = TypeVar("Result")
# Longer than the monitor takes to find out why a channel has closed.
FAILURE_SECONDS = 10.0


class WorkerGroup:
    """Ranks 1 … size - 1, each a process. Create with `start`; use from one thread at a time.

    Detected failures: a rank that has ended, within a second; an error of a handler, at once; a
    rank that has closed its channel but does not end, within 6 seconds; a rank that is stopped
    (SIGSTOP) or stuck outside Python, so that for 5 seconds it neither sends a heartbeat nor uses a
    processor, within 8 seconds (62 before it has connected). None of them delays the detection of
    another, or the output of other ranks. Not detected: a rank whose Python code waits forever,
    since its heartbeats continue, and one that computes forever. Compiling, loading and long
    computations do not count as a hang.

    After a failure all ranks are killed, and every call here raises the failure. A call that waits
    in another thread raises RankFailed once `close` is called.
    """

    def __init__(self, watch: Monitor) -> None:
        self._watch = watch
        self._num_asked = 0
        # also runs at the interpreter's exit
        self._finalizer = weakref.finalize(self, watch.end)

    @classmethod
    def start(
        cls,
        setup: dict[str, Any],
        size: int,
        module: str,
        folder: Path | None = None,
        *,
        names: Sequence[str] | None = None,
        received: Callable[[str, bytes], None] | None = None,
        inherited: Sequence[int] = (),
    ) -> WorkerGroup:
        """Start `python -m module` for ranks 1 … size - 1, without waiting for their imports.

        The module calls `serve.connect` with its arguments, then `serve.serve`. `setup` is JSON and
        the first message to a rank. Ranks have the environment of this process. Their output
        appears on stderr, each line with its rank. `folder` is the parent of the ranks' private
        folder (None: the temporary folder). `names` are the names of all ranks in errors and output
        (None: "rank 0", …). Messages from a rank other than replies go to `received(name,
        payload)`, in another thread. Ranks inherit the file descriptors `inherited` under the same
        numbers. Raises OSError.
        """
        names = names or [f"rank {i}" for i in range(size)]
        watch = Monitor(setup, names, module, folder, received, inherited)
        ranks = cls(watch)
        try:
            watch.start()
            watch.has_started.wait()
            if watch.failure is not None:
                raise watch.failure
        except BaseException:
            ranks.close()
            raise
        return ranks

    @property
    def folder(self) -> Path:
        """The private folder of all ranks (mode 0700), removed when they end."""
        return self._watch.folder

    @property
    def pids(self) -> list[int]:
        """The process ids of ranks 1 … size - 1."""
        return [process.pid for process in self._watch.processes]

    def send(self, name: str, payload: bytes = b"") -> None:
        """Call the handler `name` on every rank without waiting. Raises the failure.

        An error of the handler is a failure: a later call raises it.
        """
        with deferred_interrupts():
            self.check()
            try:
                for process in self._watch.processes:
                    process.channel.send(name, payload)
            except ChannelClosed as error:
                self._raise_failure(error)

    def call(self, name: str, payload: bytes = b"") -> list[bytes]:
        """Call the handler `name` on every rank; returns their results, rank 1's first.

        If every rank raises the same error, it is raised here and the ranks stay usable: a
        ValueError unchanged, any other as RankFailed. Otherwise an error is a failure.
        """
        question = self._put(name, payload)
        self._wait(question)
        if question.is_refused_by_all:
            refusal = question.refusals[1]
            if refusal.is_mistake:
                raise ValueError(refusal.text)
            ranks = f"ranks 1 … {question.num_ranks}" if question.num_ranks > 1 else "rank 1"
            raise RankFailed(f"{ranks}: {refusal.kind}: {refusal.text}")
        return self._answers(question)

    def call_all(
        self, name: str, payload: bytes, own: Callable[[], Result]
    ) -> tuple[Result, list[bytes]]:
        """`call`, while this process runs `own()`; returns both results.

        Use it for work in which the ranks need one another. If `own` and every rank raise the same
        error, it is raised and the ranks stay usable. If only some do, that is a failure.
        """
        question = self._put(name, payload)
        try:
            result = own()
        except Exception as error:
            mine = RpcError(type(error).__name__, str(error), isinstance(error, ValueError))
            question.refuse(0, mine)
            self._wait(question)
            if question.is_refused_by_all and mine == question.refusals[1]:
                raise
            self._watch.fail(mine.error(self._watch.names[0]))
            self._raise_failure(error)
        self._wait(question)
        return result, self._answers(question)

    def check(self) -> None:
        """Raise the failure if the ranks have failed. Costs nothing."""
        if self._watch.failure is not None:
            self._raise_failure()

    def fail(self, error: Exception) -> None:
        """Kill all ranks because this process failed during a collective operation."""
        self._watch.fail(RankFailed(f"rank 0: {type(error).__name__}", f": {error}"))

    def call_on_failure(self, callback: Callable[[Exception], None]) -> None:
        """Call it with the failure, in another thread, when the ranks fail; at once if they have.

        The ranks have been killed by then. Use it for `Group.abort`.
        """
        self._watch.call_on_failure(callback)

    def begin_close(self) -> None:
        """Start `close` without waiting, for a caller that closes several."""
        self._watch.begin_end()

    def close(self) -> None:
        """End all ranks; they have 3 seconds to exit. Removes everything they left."""
        self._finalizer()
        self._watch.end()  # another thread may be in the finalizer, which runs only once

    def _put(self, name: str, payload: bytes) -> Rpc:
        self._num_asked += 1
        question = Rpc(self._num_asked, len(self._watch.processes))
        self._watch.question = question
        self.send(f"{name}{ASKS}{question.number}", payload)
        return question

    def _wait(self, question: Rpc) -> None:
        """Wait until every rank has replied. Raises the failure."""
        watch = self._watch
        with watch.changed:
            watch.changed.wait_for(
                lambda: question.is_complete or watch.failure is not None or watch.is_ending
            )
            watch.question = None
        self.check()
        if not question.is_complete:
            self._raise_failure()

    def _answers(self, question: Rpc) -> list[bytes]:
        for rank, refusal in question.refusals.items():
            self._watch.fail(refusal.error(self._watch.names[rank]))
        self.check()
        return [answer for _, answer in sorted(question.answers.items())]

    def _raise_failure(self, cause: Exception | None = None) -> NoReturn:
        """Raise the failure, which is usually detected at once after a channel has closed."""
        watch = self._watch
        with watch.changed:
            watch.changed.wait_for(
                lambda: watch.failure or watch.is_ending, timeout=FAILURE_SECONDS
            )
        failure = watch.failure or RankFailed("the ranks are closed")
        # a copy: re-raising an exception extends its traceback
        raise type(failure)(*failure.args) from cause


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Defer Ctrl-C until the end of the block: otherwise only some ranks would run a step."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    frames: list[Any] = []
    signal.signal(signal.SIGINT, lambda _, frame: frames.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if frames:
            handler(signal.SIGINT, frames[-1])
