"""Online inference in a Python program: the tasks of one event loop share an engine."""

from __future__ import annotations

import asyncio
import logging
from os import PathLike
from types import TracebackType
from typing import Any

from nanovllm import log
from nanovllm.config import EngineConfig
from nanovllm.parallel.watch import RankFailed
from nanovllm.serving import quota
from nanovllm.serving.client import Client
from nanovllm.serving.engine_process import EngineProcess
from nanovllm.serving.interface import EngineDead

logger = logging.getLogger(__name__)


class AsyncLLM(Client):
    """A model in a process of its own, for tasks of one event loop.

    The constructor checks the options, starts the process and returns at once; it may be called
    without a running loop. The model loads meanwhile, and the first request waits for it. To wait
    beforehand: `llm = await AsyncLLM.start(model)`, `async with AsyncLLM(model) as llm`, or
    `await llm.ready()`. Then `async for output in llm.generate(prompt, params)`.

    Options are those of `LLM`; `max_queued` is that of `Client`. Raises TypeError for an unknown
    option, and ValueError.
    """

    _patience_s = 3.0

    def __init__(
        self, model: str | PathLike[str], *, max_queued: int = quota.MAX_QUEUED, **options: Any
    ) -> None:
        log.configure()
        config = EngineConfig.from_options(model, options)
        quota.checked_limit(max_queued)
        self._cause: Exception | None = None
        self._process = EngineProcess(config, 1)
        super().__init__(
            config, self._process.clients[0], quota.own_counts(), max_queued=max_queued
        )
        self._process.call_on_failure(self._note_cause)

    @classmethod
    async def start(cls, model: str | PathLike[str], **options: Any) -> AsyncLLM:
        """A warm engine. Raises the errors of the constructor and of `ready`, after cleaning up."""
        llm = cls(model, **options)
        try:
            await llm.ready()
        except BaseException:
            await llm.close()
            raise
        return llm

    async def close(self) -> None:
        """End all requests and the engine's process. Nothing of it is left."""
        await super().close()
        await asyncio.to_thread(self._process.close)

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
        """Called in another thread when the process has ended by itself."""
        logger.error("%s", cause)
        # output and texts of errors may hold paths and prompts
        self._cause = EngineDead(cause.what) if isinstance(cause, RankFailed) else cause
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._fail, self._cause)

    def _lost(self) -> None:
        if self._cause is not None:
            self._fail(self._cause)
        else:
            super()._lost()
