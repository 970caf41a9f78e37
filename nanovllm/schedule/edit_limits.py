"""Limits on edits of logits. The tables are in `runner/logit_edits.py`."""

from __future__ import annotations

from collections.abc import Collection

from nanovllm.checks import InvalidValue
from nanovllm.schedule.plan import LogitEdits

MINUS_INF = float("-inf")
LARGEST_BIAS = 1e30  # far below fp32's largest number: sums with logits stay finite
# Limits on bad words of several tokens, which bound the tables' size.
MAX_BAD_WORDS, MAX_BAD_TOKENS = 4096, 64


def check(edits: LogitEdits, vocab_size: int) -> None:
    """Raise ValueError for edits that do not fit the vocabulary or the tables."""
    _check_ids("logit_bias", edits.bias, vocab_size)
    _check_ids("allowed_token_ids", edits.allowed or (), vocab_size)
    for token_id, value in edits.bias.items():
        if not (value == MINUS_INF or abs(value) <= LARGEST_BIAS):
            raise InvalidValue(
                "logit_bias",
                f"logit_bias of token {token_id} is {value}: it must be −inf, or a number between "
                f"−{LARGEST_BIAS:g} and {LARGEST_BIAS:g}",
            )
    for word in edits.bad:
        _check_ids("bad_words", word, vocab_size)
        if not 1 <= len(word) <= MAX_BAD_TOKENS:
            raise InvalidValue(
                "bad_words",
                f"bad_words has a word of {len(word)} tokens: it must have at least 1 and at most "
                f"{MAX_BAD_TOKENS}",
            )
    num_words = len(long_words(edits))
    if num_words > MAX_BAD_WORDS:
        raise InvalidValue(
            "bad_words",
            f"bad_words has {num_words} words of several tokens: at most {MAX_BAD_WORDS} are "
            "supported",
        )


def _check_ids(name: str, token_ids: Collection[int], vocab_size: int) -> None:
    for token_id in (min(token_ids), max(token_ids)) if token_ids else ():
        if not 0 <= token_id < vocab_size:
            raise InvalidValue(
                name,
                f"{name} holds token id {token_id}: ids of this model are 0 … {vocab_size - 1}",
            )


def long_words(edits: LogitEdits) -> list[list[int]]:
    """The bad words of several tokens."""
    return [word for word in edits.bad if len(word) > 1]
