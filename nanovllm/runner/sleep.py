"""Sleep: an idle engine frees the device memory of its weights and cache.

Programs and captured steps stay. They contain the addresses of weights and cache, so on waking a
region gets memory at the same addresses, on devices where addresses matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from nanovllm.platforms.regions import Place, Region

WEIGHTS, CACHE = PARTS = ("weights", "kv_cache")  # under vLLM's names
LEVELS = (1, 2)


class Sleeper:
    """Puts the parts of an engine to sleep and wakes them up. The device must be idle.

    `reload` reads the weights again and passes them, in the original order, to the function in its
    argument.
    """

    def __init__(self, weights: Region, cache: Region, reload: Callable[[Place], object]) -> None:
        self._weights, self._cache, self._reload = weights, cache, reload
        self.asleep: set[str] = set()  # names of parts

    def sleep(self, level: int) -> None:
        """Give up the cache, and the weights: level 1 keeps them on the host, level 2 drops them.

        Raises ValueError for another level, and on a device that cannot give memory back.
        """
        check_level(level)
        # first, since the host may run out of memory
        self._weights.drop(keep=level == 1)
        self.asleep.add(WEIGHTS)
        self._cache.drop(keep=False)
        self.asleep.add(CACHE)

    def wake_up(self, tags: Iterable[str] | None = None) -> None:
        """Wake the parts with these names, or all parts. Parts that are awake stay so.

        Raises ValueError for an unknown name, torch.OutOfMemoryError, and what reading the weights
        raises. The part then stays asleep.
        """
        wanted = checked_parts(tags) & self.asleep
        if WEIGHTS in wanted:  # before the cache: reading weights takes extra memory
            self._wake_weights()
            self.asleep.discard(WEIGHTS)
        if CACHE in wanted:
            self._cache.take_back()
            self._cache.clear()  # as after loading
            self.asleep.discard(CACHE)

    def check_awake(self) -> None:
        """Raise RuntimeError unless everything is awake."""
        if self.asleep:
            raise RuntimeError(
                f"the engine sleeps: call wake_up() (asleep: {', '.join(sorted(self.asleep))})"
            )

    def close(self) -> None:
        """Free the weights, asleep or awake. The runner frees the cache."""
        self._weights.close()

    def _wake_weights(self) -> None:
        if self._weights.take_back():
            return
        try:
            self._reload(self._weights.refill())
        except BaseException:
            self._weights.drop(keep=False)
            raise


def check_level(level: int) -> None:
    """Raise ValueError unless it is a level of sleep."""
    if level not in LEVELS:
        raise ValueError(
            f"level is {level!r}: it must be 1 (weights move to the host) or 2 (weights are "
            "dropped)"
        )


def checked_parts(tags: Iterable[str] | None) -> set[str]:
    """The names of parts, of all for None. Raises ValueError for an unknown name."""
    if tags is None:
        return set(PARTS)
    if isinstance(tags, str) or not isinstance(tags, Iterable):
        raise ValueError(f"tags is {tags!r}: it must be a list of {' or '.join(PARTS)}")
    wanted = list(tags)
    for tag in wanted:
        if tag not in PARTS:
            raise ValueError(f"tags holds {tag!r}: it may hold {' and '.join(PARTS)}")
    return set(wanted)
