"""Adapters on several ranks: each reads its own part, and requests wait until all have.

The other ranks answer with their errors, which the first rank raises: an error in the handler of
some ranks alone would end them all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from nanovllm import wire
from nanovllm.models.lora.peft_config import AdapterError
from nanovllm.parallel.ranks import WorkerGroup
from nanovllm.runner.runner import Runner


class Reply(NamedTuple):
    """The state of an adapter on a rank. error: why it cannot be read. is_mistake: whether the
    files are the cause."""

    digest: bytes = b""
    is_read: bool = False
    error: str | None = None
    is_mistake: bool = True

    @classmethod
    def of(cls, error: Exception) -> Reply:
        if isinstance(error, ValueError):
            return cls(error=str(error))
        return cls(error=f"{type(error).__name__}: {error}", is_mistake=False)

    def check(self, rank: int, digest: bytes) -> None:
        """Raise the rank's error, or one about files that differ from those with this digest."""
        if self.error is not None:
            kind = AdapterError if self.is_mistake else RuntimeError
            raise kind(f"rank {rank}: {self.error}")
        if self.digest != digest:
            raise AdapterError(f"rank {rank} has found other files: they have changed")


_load_reply = wire.decoder(Reply)
_load_adapter = wire.decoder(tuple[int, str])
_load_id = wire.decoder(int)
_load_seconds = wire.decoder(float)


class AdapterRanks:
    """The state of the adapters on the other ranks, kept on the first one."""

    def __init__(self, ranks: WorkerGroup) -> None:
        self._ranks = ranks
        self._read: set[int] = set()  # adapters that all others have read
        self._awaited: set[int] = set()  # adapters that only the first rank has read

    def check(self, adapter_id: int, folder: Path, digest: bytes) -> None:
        """Check an adapter's files on the others. digest: of the first rank. Raises
        AdapterError."""
        self._ask("check_adapter", wire.dump((adapter_id, str(folder))), digest)

    def have_read(self, adapter_id: int, digest: bytes) -> bool:
        """Whether the others have read an adapter, once the first rank has. Raises AdapterError,
        and RuntimeError for an error of which the files are not the cause."""
        if adapter_id in self._read:
            return True
        self._awaited.discard(adapter_id)
        replies = self._ask("adapter_state", wire.dump(adapter_id), digest)
        have_read = all(one.is_read for one in replies)
        (self._read if have_read else self._awaited).add(adapter_id)
        return have_read

    def wait(self, seconds: float) -> bool:
        """Wait up to so long until the others have read an adapter that the first rank has read.
        False if there is none."""
        if self._awaited:
            self._ranks.call("wait_for_adapters", wire.dump(seconds))
        return bool(self._awaited)

    def forget(self, adapter_id: int) -> None:
        self._read.discard(adapter_id)
        self._awaited.discard(adapter_id)

    def _ask(self, name: str, payload: bytes, digest: bytes) -> list[Reply]:
        replies = [_load_reply(one) for one in self._ranks.call(name, payload)]
        for rank, reply in enumerate(replies, 1):
            reply.check(rank, digest)
        return replies


def handlers(runner: Runner) -> dict[str, Callable[[bytes], bytes | None]]:
    """The other ranks' handlers for the first rank's messages."""

    def check_adapter(payload: bytes) -> bytes:
        adapter_id, folder = _load_adapter(payload)
        try:
            return wire.dump(Reply(runner.check_adapter(adapter_id, Path(folder))))
        except Exception as error:
            return wire.dump(Reply.of(error))

    def read_adapter(payload: bytes) -> None:
        runner.read_adapter(_load_id(payload))

    def adapter_state(payload: bytes) -> bytes:
        adapter_id = _load_id(payload)
        try:
            is_read = runner.adapter_is_read(adapter_id)
        except Exception as error:
            return wire.dump(Reply.of(error))
        return wire.dump(Reply(runner.adapters.digest(adapter_id), is_read))

    def wait_for_adapters(payload: bytes) -> None:
        runner.wait_for_adapters(_load_seconds(payload))

    def drop_adapter(payload: bytes) -> None:
        runner.drop_adapter(_load_id(payload))

    return {
        "check_adapter": check_adapter,
        "read_adapter": read_adapter,
        "adapter_state": adapter_state,
        "wait_for_adapters": wait_for_adapters,
        "drop_adapter": drop_adapter,
    }
