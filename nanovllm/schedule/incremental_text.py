"""The text of an answer, decoded as its tokens come."""

from __future__ import annotations

from collections.abc import Sequence

from nanovllm.tokenizer import DEFAULT, REPLACEMENT, Decoding, Tokenizer


class IncrementalText:
    """The text of a growing list of tokens, decoded a few at a time.

    A token's text can depend on its neighbours (spaces, characters of several bytes). So each new
    piece is the difference between the texts of a short tail with and without the newest tokens.

    An incomplete character, which is one U+FFFD at the end, is held back. It has at most three
    bytes. So everything before it is final, and the tail stays short for any tokens.
    """

    MAX_TAIL = 16  # tokens; with more, all but the newest ones are dropped
    # A character has at most four bytes, and each token that is kept has at least one. A tail that
    # begins within a character differs from the whole text in that character's bytes alone.
    MIN_TAIL = 4

    def __init__(self, tokenizer: Tokenizer, how: Decoding = DEFAULT) -> None:
        self._tokenizer, self._how = tokenizer, how
        self._tail: list[int] = []  # the newest tokens
        self._num_shown = 0  # characters of the tail's text that were returned
        self._num_before = 0  # tokens of the tail whose text was complete before the last call

    def append(self, token_ids: Sequence[int]) -> str:
        """Add tokens. Returns the new text that further tokens cannot change."""
        self._tail.extend(token_ids)
        text = self._decode(self._tail)
        is_complete = not text.endswith(REPLACEMENT)
        end = len(text) if is_complete else len(text) - 1
        piece = text[self._num_shown : end]
        if piece and is_complete:
            self._keep(self._tail[self._num_before :], is_complete)
            self._num_before = len(self._tail)
        elif len(self._tail) > self.MAX_TAIL:
            self._keep(self._newest(), is_complete)
            self._num_before = 0
        else:
            self._num_shown = max(self._num_shown, end)
        return piece

    def flush(self) -> str:
        """The rest of the text after the last token, with incomplete characters."""
        text = self._decode(self._tail)
        piece, self._num_shown = text[self._num_shown :], len(text)
        return piece

    def _newest(self) -> list[int]:
        """The last tokens with text. Of neighbours without text between them, one is kept: it can
        separate bytes."""
        newest: list[int] = []
        num_left, was_silent = self.MIN_TAIL, False
        for token_id in reversed(self._tail):
            is_silent = not self._tokenizer.has_text(token_id, self._how)
            if not (is_silent and was_silent):
                newest.append(token_id)
                num_left -= not is_silent
            was_silent = is_silent
            if not num_left:
                break
        return newest[::-1]

    def _keep(self, tail: list[int], is_complete: bool) -> None:
        self._tail, num = tail, len(self._decode(tail))
        self._num_shown = num if is_complete else max(0, num - 1)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, self._how)
