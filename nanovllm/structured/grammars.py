"""Compiles the grammars of requests in worker threads while the engine runs."""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nanovllm.checks import InvalidValue, WorkFailed
from nanovllm.sampling import SamplingParams
from nanovllm.structured import library
from nanovllm.structured.grammar_sandbox import GrammarSandbox, TooSlow
from nanovllm.structured.library import Source
from nanovllm.structured.matcher import Compiled, Masks, Matcher
from nanovllm.structured_params import FIELD
from nanovllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

NUM_WORKERS, NUM_SLOW = 4, 2
# A slower grammar continues in threads for slow ones, so that it does not delay the others.
QUICK_S = 0.5


class GrammarRefusal(NamedTuple):
    """A grammar that cannot be compiled. The reason may quote it."""

    form: str
    reason: str

    @property
    def error(self) -> InvalidValue:
        return InvalidValue(FIELD, f"{FIELD}.{self.form} is refused: {self.reason}")


@dataclass(frozen=True)
class GrammarLimits:
    """timeout_s: to compile one grammar. max_cached: compiled grammars kept for later requests."""

    timeout_s: float
    max_cached: int


class Work(Future[Compiled]):
    """A grammar being compiled. slow: its work among the slow grammars, if it is one."""

    slow: Future[None] | None = None

    def give_up(self) -> bool:
        """Cancel it if it is not being compiled right now. Returns whether it is cancelled."""
        return self.cancel() or (self.slow is not None and self.slow.cancel())

    @property
    def is_given_up(self) -> bool:
        return self.cancelled() or (self.slow is not None and self.slow.cancelled())


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Several threads can use it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Iterable[int]) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._eos_ids = sorted(eos_ids) or [0]
        self._of_library: llguidance.LLTokenizer | None = None
        self._lock = threading.Lock()
        num = NUM_WORKERS + NUM_SLOW
        self._trials = [GrammarSandbox(tokenizer.special_tokens) for _ in range(num)]
        # the last one used already has a process
        self._idle: queue.LifoQueue[GrammarSandbox] = queue.LifoQueue()
        for trial in self._trials:
            self._idle.put(trial)
        self.masks: Masks | None = None

    def compile(self, found: Source, timeout_s: float) -> Compiled:
        """A compiled grammar. Raises ValueError with the cause; TooSlow after this time."""
        import llguidance

        trial = self._idle.get()
        try:
            text = trial.run(found, timeout_s)
        finally:
            self._idle.put(trial)
        of_library = llguidance.LLMatcher(
            self._library_tokenizer(), text, log_level=0, limits=library.limits()
        )
        assert self.masks is not None
        compiled = self.masks.compiled(of_library)
        if of_library.is_error():
            raise ValueError(library.short(of_library.get_error()))
        return compiled

    def prepare(self) -> None:
        """Load the tables that all grammars share. Raises ImportError without the library, and
        ValueError for an unsupported tokenizer.

        Takes 0.8 s for 151,000 tokens, during which the library blocks all other threads.
        """
        self._library_tokenizer()

    def kill(self) -> None:
        """End the processes: threads in `compile` raise."""
        for trial in self._trials:
            trial.kill()

    def close(self) -> None:
        """End the processes once no thread is in `compile`."""
        for trial in self._trials:
            trial.close()
        if self.masks is not None:
            self.masks.close()

    def _library_tokenizer(self) -> llguidance.LLTokenizer:
        import llguidance

        with self._lock:
            if self._of_library is None:
                text = self._tokenizer.as_json()
                num_tokens = max(self._vocab_size, self._tokenizer.num_tokens())
                eos_ids = self._eos_ids
                self._of_library = llguidance.LLTokenizer(text, num_tokens, eos_ids)
                self.masks = Masks(self._vocab_size, num_tokens, eos_ids)
            return self._of_library


class Grammars:
    """The grammars of an engine's requests. Use it from one thread at a time."""

    def __init__(self, compiler: GrammarCompiler | None, limits: GrammarLimits) -> None:
        """compiler: None without a tokenizer; `InputProcessor.check` then refuses the requests."""
        self._compiler, self._limits = compiler, limits
        self._pool = ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="grammar")
        self._slow = ThreadPoolExecutor(NUM_SLOW, thread_name_prefix="slow-grammar")
        self._cache: OrderedDict[Source, Work] = OrderedDict()
        self._waiting: dict[int, tuple[Source, SamplingParams]] = {}
        self._ids_of: dict[Source, set[int]] = {}  # the waiting requests of each grammar
        self._changed = threading.Event()

    def prepare(self) -> None:
        """Run `GrammarCompiler.prepare` in a thread. Its errors recur with the first grammar."""
        if self._compiler is not None:
            self._pool.submit(self._compiler.prepare)

    def add(self, request_id: int, found: Source, params: SamplingParams) -> None:
        """Start compiling a request's grammar; requests with equal grammars share the work."""
        assert self._compiler is not None
        if found not in self._cache or self._cache[found].is_given_up:
            work = Work()
            work.add_done_callback(lambda _: self._changed.set())
            # Ctrl-C may come between any two lines: work in the cache must have been submitted
            self._pool.submit(self._compile, work, found, self._compiler)
            self._cache[found] = work
        self._cache.move_to_end(found)
        self._waiting[request_id] = found, params
        self._ids_of.setdefault(found, set()).add(request_id)

    def take(
        self, wait_s: float = 0.0
    ) -> Iterator[tuple[int, Matcher | GrammarRefusal | WorkFailed]]:
        """Yield requests that are ready, with a matcher, a refusal or an error that is not theirs.

        If there are none, wait up to `wait_s` for one. A request is removed only when the caller
        takes the next one: if Ctrl-C interrupts it, the request is yielded again.
        """
        if wait_s and not any(self._cache[found].done() for found in self._ids_of):
            self._changed.wait(wait_s)
        self._changed.clear()
        for request_id, (found, params) in list(self._waiting.items()):
            work = self._cache[found]
            if work.done():
                yield request_id, self._matcher(work, params)
                self._forget(request_id)
        self._trim()

    def drop(self, request_id: int) -> None:
        """Remove a request that has ended."""
        found = self._forget(request_id)
        if found is not None and found not in self._ids_of and self._cache[found].give_up():
            del self._cache[found]

    def masks(self, matchers: Sequence[Matcher], proposed: Sequence[list[int]]) -> np.ndarray:
        """The masks of `Masks.along`."""
        return self._masks.along(matchers, proposed)

    def wait_for_mask(self, wait_s: float) -> bool:
        """Wait as `Masks.wait` does."""
        has_masks = self._compiler is not None and self._compiler.masks is not None
        return has_masks and self._masks.wait(wait_s)

    def __contains__(self, request_id: int) -> bool:
        """Whether the grammar of a request is being compiled."""
        return request_id in self._waiting

    def __len__(self) -> int:
        """The number of requests whose grammars are being compiled."""
        return len(self._waiting)

    def close(self) -> None:
        """End the threads and the processes. Waiting work is cancelled."""
        self._waiting.clear()
        self._ids_of.clear()
        if self._compiler is not None:
            self._compiler.kill()
        for pool in (self._pool, self._slow):
            pool.shutdown(cancel_futures=True)
        if self._compiler is not None:
            self._compiler.close()

    def _compile(self, work: Work, found: Source, compiler: GrammarCompiler) -> None:
        """Compile a grammar within the time that suffices for most."""
        if not work.set_running_or_notify_cancel():
            return
        quick_s = min(QUICK_S, self._limits.timeout_s)
        try:
            work.set_result(compiler.compile(found, quick_s))
        except TooSlow as error:
            if quick_s == self._limits.timeout_s:
                work.set_exception(error)
            else:
                work.slow = self._slow.submit(self._go_on, work, found, compiler)
        except BaseException as error:
            work.set_exception(error)

    def _go_on(self, work: Work, found: Source, compiler: GrammarCompiler) -> None:
        """Compile a slow grammar."""
        try:
            work.set_result(compiler.compile(found, self._limits.timeout_s))
        except BaseException as error:
            work.set_exception(error)

    def _matcher(self, work: Work, params: SamplingParams) -> Matcher | GrammarRefusal | WorkFailed:
        try:
            compiled = work.result()
        except ValueError as error:
            assert params.structured_outputs is not None
            return GrammarRefusal(params.structured_outputs.form, str(error))
        except Exception as error:  # raised here, it would come back in each step
            return WorkFailed.of("compiling the grammar", error)
        return Matcher(compiled, self._masks, ignores_eos=params.ignore_eos)

    @property
    def _masks(self) -> Masks:
        assert self._compiler is not None and self._compiler.masks is not None
        return self._compiler.masks

    def _trim(self) -> None:
        """Remove failed grammars, and the least recently used ones beyond the limit."""
        idle = [
            (found, work)
            for found, work in self._cache.items()
            if work.done() and found not in self._ids_of
        ]
        failed = [found for found, work in idle if _has_failed(work)]
        num_spare = max(0, len(self._cache) - len(failed) - self._limits.max_cached)
        kept = [found for found, work in idle if not _has_failed(work)]
        for found in [*failed, *kept[:num_spare]]:
            del self._cache[found]

    def _forget(self, request_id: int) -> Source | None:
        """Remove a waiting request; returns its grammar, or None if it does not wait."""
        if request_id not in self._waiting:
            return None
        found, _ = self._waiting[request_id]
        # the request itself last: interrupted before, this runs again
        ids = self._ids_of.get(found, set())
        ids.discard(request_id)
        if not ids:
            self._ids_of.pop(found, None)
        self._waiting.pop(request_id, None)
        return found


def _has_failed(work: Work) -> bool:
    return work.cancelled() or work.exception() is not None
