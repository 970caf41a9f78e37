"""Log-probabilities of tokens in outputs."""

from __future__ import annotations

from typing import Any

from nanovllm.schedule.plan import Logprobs
from nanovllm.tokenizer import REPLACEMENT, Decoding, Tokenizer

SHOW_SPECIAL = Decoding(skip_special_tokens=False)


class Logprob(float):
    """A log-probability: a number with the rank and the text of its token.

    rank: 1 for the likeliest token of the vocabulary.
    decoded_token: the token's text; None if the model has no tokenizer.
    """

    __slots__ = ("_text", "_token_id", "_tokenizer", "rank")

    rank: int
    _token_id: int
    _tokenizer: Tokenizer | None
    _text: str | None

    def __new__(
        cls, value: float, rank: int, token_id: int, tokenizer: Tokenizer | None
    ) -> Logprob:
        self = super().__new__(cls, value)
        self.rank, self._token_id, self._tokenizer = rank, token_id, tokenizer
        self._text = None
        return self

    @property
    def logprob(self) -> float:
        return float(self)

    @property
    def decoded_token(self) -> str | None:
        # decoded on demand: most users of log-probabilities read only the numbers
        if self._text is None and self._tokenizer is not None:
            self._text = self._tokenizer.text_of(self._token_id)
        return self._text

    @property
    def token_bytes(self) -> bytes:
        """The bytes of the token's text, which may be part of a character."""
        text = self.decoded_token or ""
        if self._tokenizer is None or REPLACEMENT not in text:
            return text.encode()
        return self._tokenizer.bytes_of(self._token_id)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (float(self), self.rank, self._token_id, self.decoded_token)

    def __repr__(self) -> str:
        return (
            f"Logprob(logprob={float(self)!r}, rank={self.rank}, "
            f"decoded_token={self.decoded_token!r})"
        )


def _restored(value: float, rank: int, token_id: int, text: str | None) -> Logprob:
    restored = Logprob(value, rank, token_id, None)
    restored._text = text
    return restored


def of_row(
    token_id: int, values: Logprobs, row: int, num_top: int, tokenizer: Tokenizer | None
) -> dict[int, Logprob]:
    """Log-probabilities of a row's `num_top` likeliest tokens (-1: of all) and of `token_id`,
    descending."""
    top_ids, top = values.top_token_NL[row].tolist(), values.top_NL[row].tolist()
    wanted = len(top_ids) if num_top < 0 else num_top
    found = {
        top_id: Logprob(value, rank, top_id, tokenizer)
        for rank, (top_id, value) in enumerate(zip(top_ids[:wanted], top), start=1)
    }
    if token_id not in found:
        chosen = float(values.chosen_N[row]), int(values.rank_N[row])
        found[token_id] = Logprob(*chosen, token_id, tokenizer)
    return dict(sorted(found.items(), key=lambda item: -item[1]))
