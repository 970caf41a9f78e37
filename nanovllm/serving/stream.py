"""The answers to one prompt: a queue between the client and the task that reads them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from nanovllm.schedule.outputs import OutputDelta
from nanovllm.serving.answer import Answer
from nanovllm.serving.async_engine import Delta, EngineDead

# More bytes of log-probabilities of a prompt are unpacked in a thread: 1000 take some 0.1 ms.
INLINE_BYTES = 1 << 14


class RequestState:
    """A request's answers and their unread tokens. The client writes, one task reads."""

    def __init__(self, name: str, first_id: int, answers: Sequence[Answer]) -> None:
        """first_id: the id of the first answer; the others follow."""
        self.name, self.first_id, self.answers = name, first_id, answers
        self.num_unfinished = len(answers)
        self.media_key: object | None = None  # key of the prompt's media, which the engine holds
        self._fresh: dict[int, None] = {}  # indices of answers with unread tokens, oldest first
        self._waiter: asyncio.Future[None] | None = None
        self._failure: EngineDead | None = None

    def note(self, answer: Answer) -> None:
        """Record that an answer has unread tokens."""
        self._fresh[answer.index] = None
        self._wake()

    def fail(self, failure: EngineDead) -> None:
        self._failure = failure
        self._wake()

    async def take(self) -> list[OutputDelta]:
        """Wait for unread tokens; [] after all answers have ended. Raises EngineDead."""
        while True:
            await self._unpack()
            fresh, self._fresh = self._fresh, {}
            found = [one for index in fresh if (one := self.answers[index].take()) is not None]
            if found or all(answer.done is not None for answer in self.answers):
                return found
            if self._failure is not None:
                raise EngineDead(*self._failure.args)
            if self._waiter is not None:
                raise RuntimeError("another task is reading these answers")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    async def _unpack(self) -> None:
        """Unpack the log-probabilities of a long prompt, which only the first answer has."""
        first = self.answers[0]
        if first.num_packed > INLINE_BYTES:
            await asyncio.to_thread(first.unpack)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Aborts(Protocol):
    def abort_feed(self, feed: RequestState) -> None:
        """Abort the unfinished answers of one prompt."""


class OpenStream:
    """Implements `Stream`. Leaving the loop over it aborts unfinished answers."""

    def __init__(self, client: Aborts, prompt_token_ids: list[int], feed: RequestState) -> None:
        self.request_id, self.prompt_token_ids = feed.name, prompt_token_ids
        self._client, self._feed = client, feed
        self._loop = asyncio.get_running_loop()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        try:
            while found := await self._feed.take():
                for one in found:
                    yield delta(one)
        finally:
            self.abort()

    async def take(self) -> list[OutputDelta]:
        """Wait for new output: at most one increment per answer, whose `request_id` is the answer's
        index; [] after the end. Raises EngineDead."""
        return await self._feed.take()

    def abort(self) -> None:
        self._client.abort_feed(self._feed)

    def __del__(self) -> None:
        if all(answer.done is not None for answer in self._feed.answers):
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the client with it
            self._loop.call_soon_threadsafe(self._client.abort_feed, self._feed)


def delta(one: OutputDelta) -> Delta:
    """Convert an increment, whose `request_id` is the index of its answer, for readers."""
    done = one.completion
    if done is None:
        return Delta(one.request_id, one.text, one.token_ids, one.logprobs)
    return Delta(
        output_index=one.request_id,
        text=one.text,
        token_ids=one.token_ids,
        logprobs=one.logprobs,
        finish_reason=done.finish_reason,
        stop_reason=done.stop_reason,
        error=done.error,
        error_field=done.error_field,
        num_cached_tokens=done.num_cached_tokens,
        prompt_logprobs=done.prompt_logprobs,
        pooled=done.pooled,
    )
