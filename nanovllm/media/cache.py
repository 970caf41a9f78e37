"""A least-recently-used cache with a limit in bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

Value = TypeVar("Value")


class ByteCache(Generic[Value]):
    """Values by the digest of their content. Several threads can use it."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = self.num_hits = self.num_misses = 0
        self._entries: OrderedDict[bytes, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, digest: bytes) -> Value | None:
        with self._lock:
            entry = self._entries.get(digest)
            if entry is None:
                self.num_misses += 1
                return None
            self.num_hits += 1
            self._entries.move_to_end(digest)
            return entry[0]

    def put(self, digest: bytes, value: Value, num_bytes: int) -> None:
        """Keep a value of `num_bytes`. A value larger than the whole cache is not kept."""
        with self._lock:
            _, old_bytes = self._entries.pop(digest, (None, 0))
            self.num_bytes -= old_bytes
            if num_bytes > self.max_bytes:
                return
            self._entries[digest] = (value, num_bytes)
            self.num_bytes += num_bytes
            while self.num_bytes > self.max_bytes:
                _, (_, dropped_bytes) = self._entries.popitem(last=False)
                self.num_bytes -= dropped_bytes

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._entries
