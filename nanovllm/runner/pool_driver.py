"""The first rank's runner of a model that pools: it sends the sequences of steps to the others."""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from nanovllm import wire
from nanovllm.parallel.ranks import deferred_interrupts
from nanovllm.platforms.base import HostCopy
from nanovllm.runner import encoding_ranks
from nanovllm.runner.encoders import MMItem
from nanovllm.runner.pool_runner import PoolRunner, PoolSequence
from nanovllm.runner.tp_driver import TPWorkers
from nanovllm.schedule.plan import EmbeddingSpan

# token ids, where the second of two texts begins, places of embeddings, and positions
_Sequence = tuple[wire.Array, int, list[tuple[str, int, int, int]], wire.Array | None]
_load_sequences = wire.decoder(list[_Sequence])


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
        with deferred_interrupts():
            self.ranks.send("launch", wire.dump(list(map(_dumped, sequences))))
            try:
                launched = super().launch(sequences)
            except Exception as error:
                self.ranks.fail(error)
                raise
        return _Checked(launched, self.ranks.check)

    def check_ranks(self) -> None:
        self.ranks.check()

    def call_on_failure(self, callback: Callable[[Exception], None]) -> None:
        self.ranks.call_on_failure(callback)

    def encode(self, media: Mapping[str, MMItem]) -> None:
        encoding_ranks.encode(self.ranks, media, super().encode, super().forget_encoded)

    def drop_embeddings(self, keys: Iterable[str]) -> None:
        encoding_ranks.drop(self.ranks, keys, super().drop_embeddings)

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
        runner.launch(list(map(_loaded, _load_sequences(payload))))

    return {"launch": launch, **encoding_ranks.handlers(runner)}


def _dumped(one: PoolSequence) -> _Sequence:
    ids, positions = wire.array(np.asarray(one.token_ids, np.int32)), one.position_3T
    given = [(span.key, span.source, span.start, span.num) for span in one.given]
    return ids, one.second_at, given, None if positions is None else wire.array(positions)


def _loaded(found: _Sequence) -> PoolSequence:
    ids, second_at, given, positions = found
    return PoolSequence(
        wire.tensor(ids).tolist(),
        second_at,
        tuple(EmbeddingSpan(*span) for span in given),
        None if positions is None else wire.tensor(positions).numpy(),
    )
