"""Finds stop strings in a growing text, character by character.

Source: Aho and Corasick, "Efficient string matching", CACM 18 (1975). The cost of a character does
not depend on the number of stop strings or on their lengths.
"""

from __future__ import annotations

import functools
from collections import deque


class StopStrings:
    """An automaton for a set of strings. Its states are numbers, 0 at the start of a text.

    A state stands for the longest suffix of the text that is a prefix of a string.
    """

    def __init__(self, texts: tuple[str, ...]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._found = [""]  # the longest string that is a suffix of the state's text
        depth = [0]
        for text in texts:
            state = 0
            for character in text:
                if character not in self._next[state]:
                    self._next[state][character] = len(self._next)
                    self._next.append({})
                    self._found.append("")
                    depth.append(depth[state] + 1)
                state = self._next[state][character]
            self._found[state] = text
        self._shorter = [0] * len(depth)  # the state of the next shorter suffix
        # length of the longest suffix that is a prefix of a string and can still grow
        self.num_held = [0] * len(depth)
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            shorter = self._shorter[state]
            self._found[state] = self._found[state] or self._found[shorter]
            self.num_held[state] = depth[state] if self._next[state] else self.num_held[shorter]
            for character, following in self._next[state].items():
                self._shorter[following] = self.step(shorter, character) if state else 0
                waiting.append(following)

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        while character not in self._next[state]:
            if not state:
                return 0
            state = self._shorter[state]
        return self._next[state][character]

    def search(self, state: int, text: str) -> tuple[int, tuple[int, str] | None]:
        """Read `text` from `state` on. Returns the new state, and the match that begins first, if
        any: the index of its first character in `text`, which is negative if it began before, and
        the string."""
        first: tuple[int, str] | None = None
        for num, character in enumerate(text, start=1):
            state = self.step(state, character)
            found = self._found[state]
            if found and (first is None or num - len(found) < first[0]):
                first = num - len(found), found
        return state, first


@functools.lru_cache(maxsize=16)
def stop_strings(texts: tuple[str, ...]) -> StopStrings:
    """The automaton of these strings. Requests with equal strings share it."""
    return StopStrings(texts)
