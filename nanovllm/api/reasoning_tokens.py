"""The number of tokens of an answer's reasoning, which its usage has."""

from __future__ import annotations

from collections.abc import Sequence

from nanovllm.parsers import Part, ReasoningPart


class ReasoningTokens:
    """Counts the tokens of one answer's reasoning, without its marks.

    The count is approximate, because the parser does not know which tokens a part is of. A delta
    with other text too, such as a whole answer, counts by the share of reasoning in its characters.
    """

    def __init__(self) -> None:
        self._has_begun = False
        self._num_held = 0  # of deltas that the parser has made no parts of

    def add(self, parts: Sequence[Part], text: str, num_tokens: int) -> int:
        """The tokens of reasoning in a delta. parts: what the parser makes of its text."""
        num_chars = sum(len(part.text) for part in parts if isinstance(part, ReasoningPart))
        if not num_chars:
            # without parts: the beginning of a mark, or of what only looks like one
            goes_on = self._has_begun and not parts
            self._num_held = self._num_held + num_tokens if goes_on else 0
            return 0
        self._has_begun = True
        held, self._num_held = self._num_held, 0
        return held + num_tokens * min(num_chars, len(text)) // max(1, len(text))
