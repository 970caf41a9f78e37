"""The runner of the first rank of several: it sends its calls to the other ranks.

Every rank launches every step on its own device. A plan has all host data of its step, so the other
ranks do not answer, except to confirm allocations.
"""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from nanovllm import wire
from nanovllm.parallel.ranks import WorkerGroup, deferred_interrupts
from nanovllm.platforms.regions import Place, Region
from nanovllm.runner import adapter_ranks, encoding_ranks
from nanovllm.runner.adapter_ranks import AdapterRanks
from nanovllm.runner.async_output import AsyncOutput
from nanovllm.runner.encoders import MMItem
from nanovllm.runner.runner import Runner
from nanovllm.runner.sleep import Sleeper, check_level, checked_parts
from nanovllm.schedule.plan import LogitEdits, StepPlan

_load_needs = wire.decoder(tuple[LogitEdits | None, bool, bool])
_load_embeddings = wire.decoder(tuple[str, wire.Array])
_load_rows = wire.decoder(tuple[int, list[int]])
_load_level = wire.decoder(int)
_load_parts = wire.decoder(list[str])


class TPWorkers(Protocol):
    """The other ranks."""

    @property
    def ranks(self) -> WorkerGroup: ...
    def close(self) -> None: ...


class TPSleeper(Sleeper):
    """The first rank's sleeper: all ranks free and take back their memory, and read their weights,
    at the same time. If only some can, that ends them all."""

    def __init__(self, *args: Any, ranks: WorkerGroup) -> None:
        super().__init__(*args)
        self._ranks = ranks

    def sleep(self, level: int) -> None:
        check_level(level)
        self._on_all("sleep", int(level), partial(super().sleep, level))

    def wake_up(self, tags: Iterable[str] | None = None) -> None:
        parts = sorted(checked_parts(tags))
        self._on_all("wake_up", parts, partial(super().wake_up, parts))

    def _on_all(self, name: str, argument: object, own: Callable[[], None]) -> None:
        with deferred_interrupts():
            self._ranks.call_all(name, wire.dump(argument), own)


class TPDriver(Runner):
    """The first rank's runner."""

    def __init__(self, *args: Any, followers: TPWorkers, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._followers, self.ranks = followers, followers.ranks
        self._adapter_ranks = AdapterRanks(self.ranks)
        self._pid = os.getpid()
        # at the interpreter's exit captured graphs must end before the group that is in them
        self._at_exit = partial(_close, weakref.ref(self))
        atexit.register(self._at_exit)

    def sleeper(self, weights: Region, reload: Callable[[Place], object]) -> Sleeper:
        return TPSleeper(weights, self.cache_region, reload, ranks=self.ranks)

    def launch(self, plan: StepPlan) -> AsyncOutput:
        """See `Runner.launch`. An error leaves the ranks with different states and ends them."""
        with deferred_interrupts():
            self.ranks.send("launch", plan.to_bytes())
            try:
                launched = super().launch(plan)
            except Exception as error:
                self.ranks.fail(error)
                raise
        return replace(launched, check=self.ranks.check)

    def prepare(
        self,
        edits: LogitEdits | None = None,
        *,
        has_penalties: bool = False,
        has_masks: bool = False,
    ) -> None:
        super().prepare(edits, has_penalties=has_penalties, has_masks=has_masks)
        if edits is not None or has_penalties or has_masks:
            self.ranks.call("prepare", wire.dump((edits, has_penalties, has_masks)))

    def check_adapter(self, adapter_id: int, folder: Path) -> bytes:
        digest = super().check_adapter(adapter_id, folder)
        try:
            self._adapter_ranks.check(adapter_id, folder, digest)
        except Exception:
            self.drop_adapter(adapter_id)
            raise
        return digest

    def read_adapter(self, adapter_id: int) -> None:
        super().read_adapter(adapter_id)
        self.ranks.send("read_adapter", wire.dump(adapter_id))

    def adapter_is_read(self, adapter_id: int) -> bool:
        """Whether all ranks have read it. See `AdapterRanks.have_read`."""
        is_read = super().adapter_is_read(adapter_id)
        return is_read and self._adapter_ranks.have_read(
            adapter_id, self.adapters.digest(adapter_id)
        )

    def wait_for_adapters(self, seconds: float) -> bool:
        return super().wait_for_adapters(seconds) or self._adapter_ranks.wait(seconds)

    def drop_adapter(self, adapter_id: int) -> None:
        super().drop_adapter(adapter_id)
        self._adapter_ranks.forget(adapter_id)
        self.ranks.send("drop_adapter", wire.dump(adapter_id))

    def add_embeddings(self, key: str, embeds: Tensor) -> None:
        super().add_embeddings(key, embeds)
        self.ranks.call("add_embeddings", wire.dump((key, wire.array(embeds))))

    def check_ranks(self) -> None:
        self.ranks.check()

    def call_on_failure(self, callback: Callable[[Exception], None]) -> None:
        self.ranks.call_on_failure(callback)

    def encode(self, media: Mapping[str, MMItem]) -> None:
        encoding_ranks.encode(self.ranks, media, super().encode, super().forget_encoded)

    def drop_embeddings(self, keys: Iterable[str]) -> None:
        encoding_ranks.drop(self.ranks, keys, super().drop_embeddings)

    def decode_uncaptured(
        self, num_rows: int, watch: AbstractContextManager[object], rows: Sequence[int] = ()
    ) -> None:
        self.ranks.send("decode_uncaptured", wire.dump((num_rows, list(rows))))
        super().decode_uncaptured(num_rows, watch, rows)

    def close(self) -> None:
        atexit.unregister(self._at_exit)
        try:
            super().close()  # before the group: NCCL waits for captured graphs
        finally:
            self._followers.close()


def _close(found: weakref.ref[TPDriver]) -> None:
    runner = found()
    if runner is not None and runner._pid == os.getpid():  # a fork shares the group's sockets
        runner.close()


def handlers(runner: Runner, sleeper: Sleeper) -> dict[str, Callable[[bytes], bytes | None]]:
    """The other ranks' handlers for the first rank's messages."""

    def launch(payload: bytes) -> None:
        runner.launch(StepPlan.from_bytes(payload))

    def prepare(payload: bytes) -> None:
        edits, has_penalties, has_masks = _load_needs(payload)
        runner.prepare(edits, has_penalties=has_penalties, has_masks=has_masks)

    def add_embeddings(payload: bytes) -> None:
        key, embeds = _load_embeddings(payload)
        runner.add_embeddings(key, wire.tensor(embeds))

    def decode_uncaptured(payload: bytes) -> None:
        num_rows, rows = _load_rows(payload)
        runner.decode_uncaptured(num_rows, nullcontext(), rows)

    return {
        "launch": launch,
        "prepare": prepare,
        "add_embeddings": add_embeddings,
        "decode_uncaptured": decode_uncaptured,
        **adapter_ranks.handlers(runner),
        **encoding_ranks.handlers(runner),
        **_sleep_handlers(runner, sleeper),
    }


def _sleep_handlers(runner: Runner, sleeper: Sleeper) -> dict[str, Callable[[bytes], None]]:
    def sleep(payload: bytes) -> None:
        runner.platform.synchronize()
        sleeper.sleep(_load_level(payload))

    def wake_up(payload: bytes) -> None:
        sleeper.wake_up(_load_parts(payload))

    return {"sleep": sleep, "wake_up": wake_up}
