"""Online inference in a Python program: tasks of one event loop share an engine."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Awaitable, Generator, Iterable
from contextlib import suppress
from dataclasses import fields
from os import PathLike
from types import TracebackType
from typing import Any

from nanovllm import log
from nanovllm.config import EngineConfig
from nanovllm.engine.engine_client import NO_PROFILE
from nanovllm.parallel.errors import RankFailed
from nanovllm.parallel.monitor import CLOSE_SECONDS
from nanovllm.serving import admission
from nanovllm.serving.async_engine import EngineDead
from nanovllm.serving.client import Client
from nanovllm.serving.engine_process import EngineProcess

logger = logging.getLogger(__name__)


class AsyncLLM(Client):
    """A model in a separate process, for tasks of one event loop.

    The constructor checks the options, starts the process and returns; it needs no running loop.
    The model loads in the background, and the first request waits for it. To wait earlier, use
    `llm = await AsyncLLM.start(model)`, `async with AsyncLLM(model) as llm`, or
    `await llm.ready()`. Then `async for output in llm.generate(prompt, params)`.

    `await llm.close()` and `llm.shutdown()` end the process, from any event loop and thread. It
    also ends when the last reference to the object goes away and when this process ends.

    Options are those of `LLM`; `max_queued` is that of `Client`. Raises TypeError for an unknown
    option, and ValueError.
    """

    _patience_s = 10.0  # the reason usually comes at once, but not on a busy machine

    def __init__(
        self, model: str | PathLike[str], *, max_queued: int = admission.MAX_QUEUED, **options: Any
    ) -> None:
        log.configure()
        config = EngineConfig.from_options(model, options)
        admission.checked_limit(max_queued)
        self._cause: Exception | None = None
        self._process = EngineProcess(config, 1)
        super().__init__(
            config,
            self._process.clients[0],
            admission.own_counts(self._process.num_engines),
            max_queued=max_queued,
        )
        found = weakref.WeakMethod(self._note_cause)

        def note(cause: Exception) -> None:
            # the process's thread must not keep the engine alive: collecting it ends the process
            method = found()
            if method is not None:
                method(cause)

        self._process.call_on_failure(note)

    @classmethod
    async def start(cls, model: str | PathLike[str], **options: Any) -> AsyncLLM:
        """A warm engine. Raises the errors of the constructor and of `ready`, after cleanup."""
        llm = cls(model, **options)
        try:
            await llm.ready()
        except BaseException:
            await llm.close()
            raise
        return llm

    @classmethod
    def from_engine_args(
        cls,
        engine_args: EngineConfig,
        start_engine_loop: bool = True,
        usage_context: object = None,
        stat_loggers: None = None,
    ) -> AsyncLLM:
        """An engine from vLLM's `AsyncEngineArgs`. `usage_context` (vLLM's usage statistics) has no
        effect. Raises ValueError for other values of `start_engine_loop` and `stat_loggers` than
        the defaults."""
        if start_engine_loop is not True:
            raise ValueError(f"start_engine_loop is {start_engine_loop!r}: only True is supported")
        if stat_loggers is not None:
            raise ValueError("stat_loggers is not supported: use `metrics()`")
        options = {one.name: getattr(engine_args, one.name) for one in fields(EngineConfig)}
        return cls(**options)

    def abort(self, request_id: str | Iterable[str]) -> Awaitable[None]:  # type: ignore[override]
        """Abort one or more requests; their streams end. Unknown ids are ignored. Takes effect
        before it returns; vLLM's `await llm.abort(…)` also works."""
        for name in [request_id] if isinstance(request_id, str) else list(request_id):
            super().abort(name)
        return _Done()

    def shutdown(self, timeout: float | None = None) -> None:
        """Do what `close` does, blocking, for programs without an event loop. vLLM's name.

        timeout: None or at least 3 seconds; in any case the process is killed if it has not ended
        after 3 seconds.
        """
        if timeout is not None and timeout < CLOSE_SECONDS:
            raise ValueError(f"timeout is {timeout!r}: it must be None or at least {CLOSE_SECONDS}")
        self._begin_close()
        self._finish_close()

    def _finish_close(self) -> None:
        super()._finish_close()
        self._process.close()

    async def __aenter__(self) -> AsyncLLM:
        try:
            await self.ready()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _note_cause(self, cause: Exception) -> None:
        """Record why the process ended on its own. Called in another thread."""
        logger.error("%s", cause)
        # the process's output and texts of errors may contain paths and prompts
        self._cause = EngineDead(cause.what) if isinstance(cause, RankFailed) else cause
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._fail, self._cause)

    async def start_profile(self, *_: object, **__: object) -> None:
        """Not supported, like stop_profile: use `nanovllm bench throughput --profile`."""
        raise ValueError(NO_PROFILE)

    stop_profile = start_profile

    def _lost_all(self) -> None:
        if self._cause is not None:
            self._fail(self._cause)
        else:
            super()._lost_all()


class _Done(Awaitable[None]):
    """An awaitable that is done, for callers that await the result."""

    def __await__(self) -> Generator[None, None, None]:
        yield from ()


AsyncLLMEngine = AsyncLLM  # vLLM's name
