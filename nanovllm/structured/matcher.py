"""Advances grammars with the generated tokens and computes masks of allowed next tokens.

A mask takes microseconds, and the engine computes it between steps. A few grammars need
milliseconds: threads compute their masks, and their requests skip steps meanwhile.

M masked rows | W words of 32 tokens.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nanovllm.structured import library

if TYPE_CHECKING:
    import llguidance

WORD_TOKENS = 32
SLOW_S = 1e-3  # if a mask takes longer, a thread computes its grammar's next one
NUM_THREADS = 4
MAX_PARALLEL = 8
# With fewer masks, threads cost more than they save.
MIN_PARALLEL = 4


@dataclass(frozen=True)
class Compiled:
    """A grammar at the start of an answer: the library's matcher, and the first mask."""

    of_library: llguidance.LLMatcher
    allowed_W: np.ndarray
    is_slow: bool


class Matcher:
    """The grammar state of one request.

    is_ended: only the end of the sequence may follow.
    error: the reason why no token can follow; None otherwise.
    """

    def __init__(self, compiled: Compiled, masks: Masks, *, ignores_eos: bool) -> None:
        self.of_library = compiled.of_library.deep_copy()
        self.ignores_eos, self.is_slow = ignores_eos, compiled.is_slow
        self.is_ended = self.of_library.is_stopped()
        self.error: str | None = None
        self.allowed_W: np.ndarray | None = compiled.allowed_W.copy()  # None: not computed yet
        self._masks = masks
        self._work: Future[np.ndarray] | None = None
        self._forced: list[int] | None = None  # None: not computed yet

    @property
    def is_ready(self) -> bool:
        """Whether the next mask is ready or fast to compute."""
        return self._work is None or self._work.done()

    def push(self, token_id: int) -> None:
        """Append a token to the answer."""
        self.take_work()  # of a token before it in the same step, whose mask is not needed
        self.of_library.consume_token(token_id)
        self.allowed_W = self._work = self._forced = None
        self.note_error()
        self.is_ended = self.error is None and self.of_library.is_stopped()
        if self.is_slow and self.error is None and not self.is_ended:
            self._work = self._masks.begin(self)

    def forced(self) -> Sequence[int]:
        """The next tokens, as far as the text that must follow decides them; none of a slow
        grammar, whose masks are computed one at a time."""
        if self.is_slow or self.is_ended or self.error is not None:
            return ()
        if self._forced is None:
            self._forced = self.of_library.compute_ff_tokens()
        return self._forced

    def take_work(self) -> None:
        """Wait for a mask that a thread is computing."""
        if self._work is not None:
            self.allowed_W, self._work = self._work.result(), None

    def note_error(self) -> None:
        if self.error is None and self.of_library.is_error():
            self.error = f"structured_outputs: {library.short(self.of_library.get_error())}"


class Masks:
    """Computes masks for a vocabulary of V tokens."""

    def __init__(self, vocab_size: int, num_tokens: int, eos_ids: Iterable[int]) -> None:
        """num_tokens: of the library's tokenizer, at least V."""
        self._num_words = -(-vocab_size // WORD_TOKENS)
        self._own_words = -(-num_tokens // WORD_TOKENS)
        self._eos_W = np.zeros(self._own_words, np.uint32)
        for token_id in eos_ids:
            self._eos_W[token_id // WORD_TOKENS] |= np.uint32(1 << token_id % WORD_TOKENS)
        self._not_eos_W = ~self._eos_W.view(np.int32)
        self._library: Any = importlib.import_module("llguidance")
        self._filling: Any = importlib.import_module("llguidance.numpy")
        num_parallel = min(MAX_PARALLEL, (os.cpu_count() or 1) // 2)
        self._executor = self._library.LLExecutor(num_parallel) if num_parallel > 1 else None
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="masks")
        self._begun: set[Future[np.ndarray]] = set()  # not finished
        self._has_finished = threading.Event()  # since the last wait

    def compiled(self, of_library: llguidance.LLMatcher) -> Compiled:
        """Compute the first mask of a grammar, and record whether it is slow."""
        allowed_1W = np.zeros((1, self._own_words), np.int32)
        start = time.perf_counter()
        self._filling.fill_next_token_bitmask(of_library, allowed_1W, 0)
        return Compiled(of_library, allowed_1W[0], time.perf_counter() - start > SLOW_S)

    def begin(self, one: Matcher) -> Future[np.ndarray]:
        """Start computing the next mask of an answer in a thread."""
        work = self._pool.submit(self._timed, one)
        self._begun.add(work)
        work.add_done_callback(self._note_finished)
        return work

    def wait(self, wait_s: float) -> bool:
        """Wait for a mask that a thread is computing.

        False if there is none and none has finished since the last call.
        """
        if not self._begun and not self._has_finished.is_set():
            return False
        self._has_finished.wait(wait_s)
        self._has_finished.clear()
        return True

    def of(self, matchers: Sequence[Matcher]) -> np.ndarray:
        """int32 [M, W]: token v may follow in row m if bit v % 32 of word v // 32 is 1. All bits
        are 0 for an answer with an error."""
        for one in matchers:
            one.take_work()
        self._compute([one for one in matchers if one.allowed_W is None])
        allowed_MW = np.empty((len(matchers), self._num_words), np.int32)
        for one, allowed_W in zip(matchers, allowed_MW):
            one.note_error()
            if one.error is not None:
                allowed_W[:] = 0  # the library's mask allows the end of the sequence
                continue
            assert one.allowed_W is not None
            allowed_W[:] = one.allowed_W[: self._num_words]
            if one.ignores_eos:
                allowed_W &= self._not_eos_W[: self._num_words]
        return allowed_MW

    def along(self, matchers: Sequence[Matcher], proposed: Sequence[list[int]]) -> np.ndarray:
        """The masks of `of`, each followed by those after each of the answer's `proposed` tokens,
        which need not be the ones that follow."""
        found_MW = self.of(matchers)
        if not any(proposed):
            return found_MW
        parts: list[np.ndarray] = []
        for first_W, one, token_ids in zip(found_MW, matchers, proposed, strict=True):
            parts += [first_W[None], self._after(one, token_ids)]
        return np.concatenate(parts)

    def _after(self, one: Matcher, token_ids: list[int]) -> np.ndarray:
        """The masks after each of the tokens, all bits 0 where none may follow. The matcher keeps
        its state. If they are slow, its answer has no drafts until a mask of it has been fast."""
        allowed_NW = np.zeros((len(token_ids), self._own_words), np.int32)
        if not token_ids:
            return allowed_NW[:, : self._num_words]
        start, copy = time.perf_counter(), one.of_library.deep_copy()
        for place, token_id in enumerate(token_ids):
            copy.consume_token(token_id)
            if copy.is_error():
                break
            self._filling.fill_next_token_bitmask(copy, allowed_NW, place)
            if copy.is_error():
                allowed_NW[place] = 0  # the library's mask allows the end of the sequence
                break
        if time.perf_counter() - start > len(token_ids) * SLOW_S:
            one.is_slow = True
        if one.ignores_eos:
            allowed_NW &= self._not_eos_W
        return allowed_NW[:, : self._num_words]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _note_finished(self, work: Future[np.ndarray]) -> None:
        self._has_finished.set()  # first: `wait` must always find one of the two
        self._begun.discard(work)

    def _timed(self, one: Matcher) -> np.ndarray:
        allowed_1W = np.zeros((1, self._own_words), np.int32)
        start = time.perf_counter()
        self._filling.fill_next_token_bitmask(one.of_library, allowed_1W, 0)
        one.is_slow = time.perf_counter() - start > SLOW_S
        return allowed_1W[0]

    def _compute(self, matchers: Sequence[Matcher]) -> None:
        """Compute masks now. If several together are slow, each is timed the next time."""
        if self._executor is None or len(matchers) < MIN_PARALLEL:
            for one in matchers:
                one.allowed_W = self._timed(one)
            return
        allowed_MW = np.zeros((len(matchers), self._own_words), np.int32)
        numbered = [(one.of_library, index) for index, one in enumerate(matchers)]
        start = time.perf_counter()
        self._filling.fill_next_token_bitmask_par(self._executor, numbered, allowed_MW)
        rounds = -(-len(matchers) // MIN_PARALLEL)
        is_slow = time.perf_counter() - start > rounds * SLOW_S
        for one, allowed_W in zip(matchers, allowed_MW):
            one.allowed_W, one.is_slow = allowed_W, is_slow
