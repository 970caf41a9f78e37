"""Admission of prompts with images, videos and audio: bounds how many are prepared at the same
time, and the bytes that they hold. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from nanovllm.media.options import MediaOptions


class MediaGate:
    """Admits prompts in order. One thread or event loop at a time may use it.

    A few prompts are prepared at the same time, and none starts while the patches of unfinished
    requests take `max_held` bytes. Ctrl-C can come between any two lines: methods and `begin` may
    be called again for the same key.
    """

    def __init__(self, options: MediaOptions, num_clients: int = 1) -> None:
        """num_clients: the processes that share the bytes."""
        self.num_slots = 2 * options.num_media_workers
        self.max_held = max(1, options.max_held_bytes // num_clients)
        self._waiting: dict[Hashable, Callable[[], object]] = {}
        self._running: set[Hashable] = set()
        self._held: dict[Hashable, int] = {}

    @property
    def num_held(self) -> int:
        """Bytes of the patches of unfinished requests."""
        return sum(self._held.values())

    def enter(self, key: Hashable, begin: Callable[[], object]) -> None:
        """Call `begin` once there is room: now, or in a later call of the gate."""
        self._waiting[key] = begin
        self._open()

    def hold(self, key: Hashable, num_bytes: int) -> None:
        """Count the patches of a prepared prompt until `leave`."""
        self._held[key] = num_bytes
        self._running.discard(key)
        self._open()

    def leave(self, key: Hashable) -> None:
        """Remove a request that has ended, admitted or not."""
        self._waiting.pop(key, None)
        self._running.discard(key)
        self._held.pop(key, None)
        self._open()

    def _open(self) -> None:
        while self._waiting and len(self._running) < self.num_slots:
            if self.num_held >= self.max_held:
                return
            key, begin = next(iter(self._waiting.items()))
            self._running.add(key)
            begin()
            self._waiting.pop(key, None)
