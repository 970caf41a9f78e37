"""Prepares media, grammars and adapters in threads, before their requests are queued."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from nanovllm.checks import WorkFailed
from nanovllm.engine.adapters import Adapters
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.metrics import EngineMetrics
from nanovllm.engine.mm_processor import MMProcessor
from nanovllm.engine.mm_store import MMStore
from nanovllm.engine.request import MediaPrompt
from nanovllm.prompts import Prompt, PromptRefused
from nanovllm.schedule.request import Request
from nanovllm.structured.grammars import GrammarRefusal, Grammars
from nanovllm.structured.library import Source
from nanovllm.structured.matcher import Matcher

logger = logging.getLogger(__name__)


class Preparation:
    """Requests with media, grammars or adapters that are being read, until they are queued. One
    thread at a time may use it.

    A request's adapter has its place in host memory before its media are prepared. So requests that
    hold prepared media never wait for places that others keep until they may prepare theirs.

    Ctrl-C can come between any two lines. So a result is stored in its request before it is removed
    here, and a request is queued before it is removed. Interrupted work is repeated.
    """

    def __init__(
        self,
        intake: InputProcessor,
        media: MMProcessor,
        grammars: Grammars,
        held: MMStore,
        metrics: EngineMetrics,
        adapters: Adapters,
    ) -> None:
        """Takes over `media` and `grammars`."""
        self._adapters = adapters
        self._intake, self._media, self._grammars = intake, media, grammars
        self._held, self._metrics = held, metrics
        self._requests: dict[int, Request] = {}
        self._without_place: dict[int, Prompt] = {}  # prompts whose adapters have no place yet

    def __len__(self) -> int:
        """The number of requests that are not queued yet."""
        return len(self._requests)

    def add(self, request: Request, prompt: Prompt | None, source: Source | None) -> None:
        """Begin to prepare a request's media, if any, and its grammar. Media wait until its adapter
        has a place."""
        self._requests[request.request_id] = request
        if prompt is not None:
            self._without_place[request.request_id] = prompt
            self._begin_media(request)
        if source is not None:
            self._grammars.add(request.request_id, source, request.params)

    def ready(self, wait_s: float) -> Iterator[tuple[Request, ValueError | None]]:
        """Requests that are ready, with None or with the error of what they waited for.

        If none is ready, wait up to `wait_s` for one. The caller queues or ends a request before it
        advances to the next one.
        """
        for request_id in list(self._without_place):  # Ctrl-C may have come while media began
            self._begin_media(self._requests[request_id])
        has_adapters = any(one.adapter_id for one in self._requests.values())
        if wait_s and has_adapters and self._adapters.wait(wait_s):
            wait_s = 0.0
        with self._metrics.waiting_for_media(wait_s > 0 and bool(self._media)):
            for request_id, prompt in self._media.take(wait_s if self._media else 0.0):
                yield from self._failed(request_id, prompt)
        for request_id, matcher in self._grammars.take(0.0 if self._media else wait_s):
            yield from self._failed(request_id, matcher)
        for request_id, request in list(self._requests.items()):
            if request_id in self._media or request_id in self._grammars:
                continue
            try:
                is_ready = not request.adapter_id or self._adapters.is_ready(request.adapter_id)
            except ValueError as error:
                _log(request_id, error)
                yield request, error
                continue
            if request_id in self._without_place:
                self._begin_media(request)
            elif is_ready:
                yield request, None
                self._requests.pop(request_id, None)

    def _begin_media(self, request: Request) -> None:
        """Begin to prepare a request's media if its adapter, if any, has a place."""
        if not request.adapter_id or self._adapters.has_place(request.adapter_id):
            self._media.add(request.request_id, self._without_place[request.request_id])
            del self._without_place[request.request_id]

    def _expand(self, request: Request, found: MediaPrompt) -> None:
        """Set a request's whole prompt. Raises ValueError if it is too long."""
        asked = self._intake.request(found, request.params)
        prompt_len, positions = len(asked.prompt_ids), asked.positions
        request.max_output = self._intake.max_output(request.params, prompt_len, positions)
        self._held.hold(asked.media)
        request.expand(asked.prompt_ids, asked.contents, asked.positions)

    def drop(self, request_id: int) -> None:
        """Remove a request that has ended, and cancel its work."""
        self._media.drop(request_id)
        self._grammars.drop(request_id)
        self._without_place.pop(request_id, None)
        self._requests.pop(request_id, None)

    def close(self) -> None:
        """End the threads and processes."""
        self._requests.clear()
        self._without_place.clear()
        self._media.close()
        self._grammars.close()

    def _failed(
        self, request_id: int, found: MediaPrompt | Matcher | GrammarRefusal | WorkFailed | str
    ) -> Iterator[tuple[Request, ValueError]]:
        """Store what was prepared in the request; yields the request and the error if that
        fails."""
        request = self._requests[request_id]
        if isinstance(found, Matcher):
            request.constraint = found
        elif isinstance(found, GrammarRefusal):
            # without the reason, which may quote the user's input
            logger.error("request %d: structured_outputs.%s is refused", request_id, found.form)
            yield request, found.error
        elif isinstance(found, WorkFailed):
            _log(request_id, found)
            yield request, found
        else:
            try:
                if isinstance(found, str):
                    raise PromptRefused(found)
                self._expand(request, found)
            except ValueError as error:
                _log(request_id, error)
                yield request, error


def _log(request_id: int, error: ValueError) -> None:
    """With the traceback of an error for which the request is not the cause."""
    traceback = error if isinstance(error, WorkFailed) else None
    logger.error("request %d: %s", request_id, error, exc_info=traceback)
