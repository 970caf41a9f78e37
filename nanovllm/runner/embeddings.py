"""Embeddings of prompt tokens on the device, by the digest of their content."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from torch import Tensor


class Embeddings:
    """Embeddings of requests stay until they are dropped. Computed embeddings can be computed
    again, so beyond `max_bytes` the least recently used ones are dropped.

    Each is [n, K · D]: n tokens, D numbers of the embedding and of K − 1 levels to add.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._given: dict[str, Tensor] = {}
        self._computed: OrderedDict[str, Tensor] = OrderedDict()

    def give(self, key: str, embeds: Tensor) -> None:
        self._given[key] = embeds

    def keep(self, key: str, embeds: Tensor) -> None:
        """Add computed embeddings. Nothing is dropped before `trim`."""
        self._computed[key] = embeds

    def drop(self, keys: Iterable[str]) -> None:
        """Drop embeddings of requests. Other keys are ignored."""
        for key in keys:
            self._given.pop(key, None)

    def forget(self, keys: Iterable[str]) -> None:
        """Drop computed embeddings. Other keys are ignored."""
        for key in keys:
            self._computed.pop(key, None)

    def trim(self) -> None:
        """Drop computed embeddings until they take at most `max_bytes`."""
        num_bytes = sum(one.nbytes for one in self._computed.values())
        while num_bytes > self.max_bytes:
            _, dropped = self._computed.popitem(last=False)
            num_bytes -= dropped.nbytes

    def clear(self) -> None:
        self._given.clear()
        self._computed.clear()

    def __contains__(self, key: str) -> bool:
        return key in self._given or key in self._computed

    def __getitem__(self, key: str) -> Tensor:
        """Raises KeyError for missing embeddings."""
        if key in self._given:
            return self._given[key]
        self._computed.move_to_end(key)
        return self._computed[key]
