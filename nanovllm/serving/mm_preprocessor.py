"""Prepares prompts with media in the client's process: in threads and processes, outside its event
loop.

Importing this module does not import torch; creating a `MMPreprocessor` does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from nanovllm.config import EngineConfig
from nanovllm.engine.mm_admission import MediaGate
from nanovllm.engine.request import EngineRequest, MediaPrompt
from nanovllm.media.mm_inputs import MMInput
from nanovllm.parallel.channel import MAX_PAYLOAD_BYTES, pack
from nanovllm.pooling_params import PoolingParams
from nanovllm.programs import DoesNotStart
from nanovllm.prompts import Prompt
from nanovllm.replicas import messages
from nanovllm.sampling import SamplingParams
from nanovllm.serving.async_engine import EngineDead, QueueFull, Unavailable
from nanovllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanovllm.media.prepare import MediaPreparation

logger = logging.getLogger(__name__)

MAX_PATCHES_BYTES = MAX_PAYLOAD_BYTES // 2  # of one prompt


Ask = Callable[[MediaPrompt], EngineRequest]  # raises ValueError
Prepared = tuple[EngineRequest, bytes, object]


class MMPreprocessor:
    """Prepares the multimodal prompts of one client. Use it in one event loop.

    The gate has the client's share of `max_held_bytes`. Encoded media of prompts that wait for
    preparation may take as much again.
    """

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer | None,
        scale: Sequence[Any],
        num_clients: int,
    ) -> None:
        """scale: the fields of `Scale`. num_clients: who share the bounds in bytes. Raises
        ValueError for a checkpoint whose processor is not supported."""
        from nanovllm.engine.mm_processor import MediaPrompts  # imports torch

        options = config.media
        self.gate = MediaGate(options, num_clients)
        shared = replace(
            options,
            media_cache_bytes=options.media_cache_bytes // num_clients,
            max_decoding_bytes=max(1, options.max_decoding_bytes // num_clients),
        )
        self._prompts = MediaPrompts.of(config, tokenizer, scale, shared)
        self._pool = ThreadPoolExecutor(self.gate.num_slots, thread_name_prefix="prompts")
        self._running: set[MediaPreparation] = set()
        self.num_given = 0  # bytes of encoded media that wait
        self._is_cancelled = False

    def check_media(self, media: Sequence[MMInput]) -> None:
        """Raises ValueError for media that the model or the options do not allow."""
        self._prompts.check_media(media)

    async def prepare(
        self, prompt: Prompt, params: SamplingParams | PoolingParams, ask: Ask
    ) -> Prepared:
        """The request that `ask` makes of the prompt with its media, the message with the media,
        and their key: pass it to the gate's `leave` when the answers have ended.

        Cancelling the task stops the work. Raises ValueError for media that cannot be read or do
        not fit, QueueFull if waiting media take too many bytes, Unavailable if the process that
        decodes them does not start, and EngineDead after `close`.
        """
        self._prompts.check(prompt, params)
        num_given = sum(_num_bytes(one.value) for one in prompt.media)
        if self.num_given and self.num_given + num_given > self.gate.max_held:
            raise QueueFull(
                f"the waiting images have {self.num_given} bytes and {num_given} are added: the "
                f"limit is {self.gate.max_held}"
            )
        self.num_given += num_given
        try:
            key, is_open = object(), asyncio.get_running_loop().create_future()
            try:
                self.gate.enter(key, partial(_resolve, is_open))
                await is_open
                return await self._prepared(prompt, ask, key)
            except BaseException:
                self.gate.leave(key)
                raise
        finally:
            self.num_given -= num_given

    async def _prepared(self, prompt: Prompt, ask: Ask, key: object) -> Prepared:
        if self._is_cancelled:
            raise EngineDead("the engine is closed")
        work = self._prompts.submit(prompt)
        self._running.add(work)
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._pool, self._encoded, prompt, work, ask)
        except BaseException:
            work.cancel()  # the request was cancelled
            raise
        finally:
            self._running.discard(work)
        asked, message, num_bytes = found
        self.gate.hold(key, num_bytes)
        return asked, message, key

    def _encoded(
        self, prompt: Prompt, work: MediaPreparation, ask: Ask
    ) -> tuple[EngineRequest, bytes, int]:
        """Wait for the media and assemble the prompt. Called in a thread."""
        try:
            found = self._prompts.made(prompt, work.result())
        except CancelledError:
            raise EngineDead("the engine is closed") from None
        except DoesNotStart as error:
            logger.error("%s", error)
            raise Unavailable(str(error)) from None
        if found.num_bytes > MAX_PATCHES_BYTES:
            raise ValueError(
                f"the prompt's images have patches of {found.num_bytes} bytes: at most "
                f"{MAX_PATCHES_BYTES} are supported"
            )
        asked = ask(found)
        return asked, pack(messages.MEDIA, messages.dump_media(asked)), found.num_bytes

    def cancel(self) -> None:
        """Cancel all work, also that of prompts that wait. Call it in the event loop."""
        self._is_cancelled = True
        for work in self._running:
            work.cancel()

    def close(self) -> None:
        """Wait for the threads to end. May be called from any thread."""
        self._prompts.close()
        self._pool.shutdown()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _num_bytes(value: Any) -> int:
    """The size of encoded media: a reference, or the frames of a video."""
    if isinstance(value, (list, tuple)):
        return sum(map(_num_bytes, value))
    return len(value) if isinstance(value, str) else 0
