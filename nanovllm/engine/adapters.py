"""The adapters of one engine: small changes of a model's weights, one or none for each request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nanovllm.checks import InvalidValue

FIELD = "adapter"


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter.

    number: its place among the adapters' weights on the device, from 1 on; 0 is the model without
        an adapter.
    digest: of its weights. Equal tokens have other keys and values with others, also under the same
        name.
    """

    name: str
    number: int
    digest: bytes


class Adapters:
    """The loaded adapters by name: at most as many as the layers have weights for."""

    def __init__(self, max_adapters: int) -> None:
        self.max_adapters = max_adapters
        self._by_name: dict[str, Adapter] = {}

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._by_name.values())

    def add(self, name: str, digest: bytes) -> Adapter:
        """Note that an adapter's weights are on the device, in the next free place. Raises
        ValueError for a name that is taken, and if there is no place."""
        if name in self._by_name:
            raise InvalidValue(FIELD, f"adapter {name!r} is loaded already")
        if len(self._by_name) == self.max_adapters:
            words = f"there is room for {self.max_adapters} adapter(s): {self._loaded}"
            raise InvalidValue(FIELD, f"adapter {name!r} cannot be loaded: {words}")
        found = Adapter(name, len(self._by_name) + 1, digest)
        self._by_name[name] = found
        return found

    def find(self, name: str | None) -> Adapter | None:
        """The adapter of a request; None for none. Raises ValueError for one that is not loaded."""
        if name is None:
            return None
        found = self._by_name.get(name)
        if found is None:
            raise InvalidValue(FIELD, f"adapter {name!r} is not loaded: {self._loaded}")
        return found

    @property
    def _loaded(self) -> str:
        return f"loaded are {', '.join(map(repr, self._by_name))}" if self._by_name else "none is"
