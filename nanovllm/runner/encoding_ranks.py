"""Media on several ranks: every rank encodes the same ones together, since their embeddings must be
equal to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from nanovllm import wire
from nanovllm.parallel.ranks import WorkerGroup, deferred_interrupts
from nanovllm.runner.encoders import MMItem

GROUP_BYTES = 1 << 27  # of patches or mel features in one message

_load_media = wire.decoder(list[tuple[str, wire.Array, tuple[int, ...], str]])
_load_keys = wire.decoder(list[str])


class Encoding(Protocol):
    """A runner that encodes media."""

    def encode(self, media: Mapping[str, MMItem]) -> None: ...
    def drop_embeddings(self, keys: Iterable[str]) -> None: ...
    def forget_encoded(self, keys: Iterable[str]) -> None: ...


def encode(
    ranks: WorkerGroup,
    media: Mapping[str, MMItem],
    own: Callable[[Mapping[str, MMItem]], None],
    forget: Callable[[Iterable[str]], None],
) -> None:
    """Encode media on the other ranks, and by `own` on this one.

    All ranks must keep the same embeddings. So after an error here, all forget those that they
    have, this one by `forget`, and Ctrl-C waits.
    """
    for group in _groups(media):
        items = [(key, wire.array(one.values), one.grid, one.tower) for key, one in group.items()]
        with deferred_interrupts():
            ranks.send("encode", wire.dump(items))
            try:
                own(group)
            except Exception:
                forget(group)
                ranks.send("forget_encoded", wire.dump(list(group)))
                raise


def drop(ranks: WorkerGroup, keys: Iterable[str], own: Callable[[Iterable[str]], None]) -> None:
    """Drop embeddings on the other ranks, and by `own` on this one."""
    dropped = list(keys)
    own(dropped)
    if dropped:
        ranks.send("drop_embeddings", wire.dump(dropped))


def handlers(runner: Encoding) -> dict[str, Callable[[bytes], bytes | None]]:
    """The other ranks' handlers for these messages."""

    def encode(payload: bytes) -> None:
        runner.encode(
            {
                key: MMItem(wire.tensor(values), grid, tower)
                for key, values, grid, tower in _load_media(payload)
            }
        )

    def drop_embeddings(payload: bytes) -> None:
        runner.drop_embeddings(_load_keys(payload))

    def forget_encoded(payload: bytes) -> None:
        runner.forget_encoded(_load_keys(payload))

    return {"encode": encode, "drop_embeddings": drop_embeddings, "forget_encoded": forget_encoded}


def _groups(media: Mapping[str, MMItem]) -> Iterator[dict[str, MMItem]]:
    """The media of each message: up to GROUP_BYTES, unless a single item is larger."""
    group: dict[str, MMItem] = {}
    num_bytes = 0
    for key, one in media.items():
        if group and num_bytes + one.values.nbytes > GROUP_BYTES:
            yield group
            group, num_bytes = {}, 0
        group[key] = one
        num_bytes += one.values.nbytes
    if group:
        yield group
