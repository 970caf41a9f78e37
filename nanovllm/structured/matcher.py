"""Follows answers and says which tokens may come next.

M masked rows | W words of 32 tokens.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nanovllm.structured import library

if TYPE_CHECKING:
    import llguidance

WORD_TOKENS = 32
MAX_THREADS = 8
# With fewer masks the threads cost more than they save.
_MIN_PARALLEL = 4


class Matcher:
    """The answer of one request so far.

    is_ended: no token but the end of the sequence may follow.
    error: what is wrong, once nothing can follow; None otherwise.
    """

    def __init__(self, of_library: llguidance.LLMatcher, *, ignores_eos: bool) -> None:
        self.of_library, self.ignores_eos = of_library, ignores_eos
        self.is_ended = of_library.is_stopped()
        self.error: str | None = None

    def push(self, token_id: int) -> None:
        """Add a token to the answer."""
        self.of_library.consume_token(token_id)
        self._note_error()
        self.is_ended = self.error is None and self.of_library.is_stopped()

    def _note_error(self) -> None:
        if self.error is None and self.of_library.is_error():
            self.error = f"structured_outputs: {library.short(self.of_library.get_error())}"


class Masks:
    """Computes masks for a model of V tokens, those of several requests in threads."""

    def __init__(self, vocab_size: int, num_tokens: int, eos_ids: Iterable[int]) -> None:
        """`num_tokens`: of the library's tokenizer, V or more."""
        self._num_words = -(-vocab_size // WORD_TOKENS)
        self._own_words = -(-num_tokens // WORD_TOKENS)
        self._eos_W = np.zeros(self._own_words, np.uint32)
        for token_id in eos_ids:
            self._eos_W[token_id // WORD_TOKENS] |= np.uint32(1 << token_id % WORD_TOKENS)
        self._executor: Any = None
        self._filling: Any = importlib.import_module("llguidance.numpy")

    def of(self, matchers: Sequence[Matcher]) -> np.ndarray:
        """int32 [M, W]: token v may come next in row m if bit v % 32 of word v // 32 is 1. All bits
        are 0 for an answer with an error."""
        filling = self._filling
        allowed_MW = np.zeros((len(matchers), self._own_words), np.int32)
        executor = self._threads() if len(matchers) >= _MIN_PARALLEL else None
        numbered = [(one.of_library, index) for index, one in enumerate(matchers)]
        if executor is not None:
            filling.fill_next_token_bitmask_par(executor, numbered, allowed_MW)
        else:
            for of_library, index in numbered:
                filling.fill_next_token_bitmask(of_library, allowed_MW, index)
        for one, allowed_W in zip(matchers, allowed_MW):
            one._note_error()
            if one.error is not None:
                allowed_W[:] = 0  # the library's mask has the end of the sequence
            elif one.ignores_eos:
                allowed_W &= ~self._eos_W.view(np.int32)
        return np.ascontiguousarray(allowed_MW[:, : self._num_words])

    def _threads(self) -> Any:
        if self._executor is None:
            import llguidance

            num_threads = min(MAX_THREADS, (os.cpu_count() or 1) // 2)
            self._executor = llguidance.LLExecutor(num_threads) if num_threads > 1 else False
        return self._executor or None
