"""The embeddings that ranks keep stay the same where the first one is interrupted or fails. The
other rank is called in this process."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch

from nanovllm.runner import encoding_ranks
from nanovllm.runner.embeddings import Embeddings
from nanovllm.runner.encoders import MMItem

MEDIA = {key: MMItem(torch.ones(4, 3), (1, 2, 2), "image") for key in ("a", "b")}


class Rank:
    """A runner. before: called before it keeps each embedding."""

    def __init__(self, before: Callable[[str], None] = lambda key: None) -> None:
        self.embeddings, self.before = Embeddings(1 << 20), before

    def encode(self, media: Mapping[str, MMItem]) -> None:
        for key in media:
            self.before(key)
            self.embeddings.keep(key, torch.ones(1, 3))

    def drop_embeddings(self, keys: Iterable[str]) -> None:
        self.embeddings.drop(keys)

    def forget_encoded(self, keys: Iterable[str]) -> None:
        self.embeddings.forget(keys)


class Group:
    """The other rank, which handles a message at once."""

    def __init__(self, other: Rank) -> None:
        self._handlers = encoding_ranks.handlers(other)

    def send(self, name: str, payload: bytes = b"") -> None:
        self._handlers[name](payload)


def encode(first: Rank, other: Rank) -> None:
    group: Any = Group(other)
    encoding_ranks.encode(group, MEDIA, first.encode, first.forget_encoded)


def kept(rank: Rank) -> list[str]:
    return list(rank.embeddings._computed)


def test_an_interrupt_comes_after_all_ranks_have_encoded() -> None:
    first, other = Rank(lambda key: signal.raise_signal(signal.SIGINT)), Rank()
    with pytest.raises(KeyboardInterrupt):
        encode(first, other)
    assert kept(first) == kept(other) == ["a", "b"]


def test_an_error_of_the_first_rank_leaves_no_rank_with_its_embeddings() -> None:
    def fail_at_b(key: str) -> None:
        if key == "b":
            raise MemoryError("no memory")

    first, other = Rank(fail_at_b), Rank()
    for rank in (first, other):
        rank.embeddings.keep("c", torch.ones(1, 3))
    with pytest.raises(MemoryError, match="no memory"):
        encode(first, other)
    assert kept(first) == kept(other) == ["c"]
    first.before = lambda key: None
    encode(first, other)
    assert kept(first) == kept(other) == ["c", "a", "b"]
