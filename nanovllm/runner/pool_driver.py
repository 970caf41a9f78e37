"""The first rank's runner of a model that pools: it sends the sequences of steps to the others."""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from nanovllm import wire
from nanovllm.parallel.ranks import deferred_interrupts
from nanovllm.platforms.base import HostCopy
from nanovllm.runner.pool_runner import PoolRunner, PoolSequence
from nanovllm.runner.tp_driver import TPWorkers

_load_sequences = wire.decoder(list[tuple[wire.Array, int]])


class _Checked:
    """Results that are read only if no rank has failed."""

    def __init__(self, copy: HostCopy, check: Callable[[], None]) -> None:
        self._copy, self._check = copy, check

    def tolist(self) -> list[Any]:
        self._check()
        return self._copy.tolist()

    def numpy(self) -> np.ndarray:
        self._check()
        return self._copy.numpy()


class PoolDriver(PoolRunner):
    """The first rank's runner."""

    def __init__(self, *args: Any, followers: TPWorkers, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._followers, self.ranks = followers, followers.ranks
        self._pid = os.getpid()
        # at the interpreter's exit captured graphs must end before the group that is in them
        self._at_exit = partial(_close, weakref.ref(self))
        atexit.register(self._at_exit)

    def launch(self, sequences: Sequence[PoolSequence]) -> HostCopy:
        """See `PoolRunner.launch`. An error ends the other ranks."""
        message = [(wire.array(np.asarray(ids, np.int32)), second) for ids, second in sequences]
        with deferred_interrupts():
            self.ranks.send("launch", wire.dump(message))
            try:
                launched = super().launch(sequences)
            except Exception as error:
                self.ranks.fail(error)
                raise
        return _Checked(launched, self.ranks.check)

    def close(self) -> None:
        atexit.unregister(self._at_exit)
        try:
            super().close()  # before the group: NCCL waits for captured graphs
        finally:
            self._followers.close()


def _close(found: weakref.ref[PoolDriver]) -> None:
    runner = found()
    if runner is not None and runner._pid == os.getpid():  # a fork shares the group's sockets
        runner.close()


def handlers(runner: PoolRunner) -> dict[str, Callable[[bytes], bytes | None]]:
    """The other ranks' handlers for the first rank's messages."""

    def launch(payload: bytes) -> None:
        found = _load_sequences(payload)
        runner.launch([PoolSequence(wire.tensor(ids).tolist(), second) for ids, second in found])

    return {"launch": launch}
