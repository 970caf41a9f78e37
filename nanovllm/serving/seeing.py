"""Prepares prompts with images, videos and sound in the client's process: in threads and
processes, beside its event loop.

Importing this module does not import torch. Making a `Seeing` does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from nanovllm import hub
from nanovllm.config import EngineConfig
from nanovllm.media import settings
from nanovllm.media.given import Given
from nanovllm.parallel.channel import MAX_PAYLOAD_BYTES, pack
from nanovllm.prompts import Prompt
from nanovllm.sampling import SamplingParams
from nanovllm.serving import messages
from nanovllm.serving.interface import EngineDead, QueueFull
from nanovllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanovllm.media.prepare import Preparation

MAX_PATCHES_BYTES = MAX_PAYLOAD_BYTES // 2  # of one prompt


class Encoded(NamedTuple):
    """A prompt as it is sent. beside: the message with its images, or nothing. num_bytes: of their
    patches."""

    token_ids: list[int]
    beside: bytes = b""
    num_bytes: int = 0


class Seeing:
    """Prepares the prompts of one client. Use it in one event loop.

    A few prompts are in preparation at the same time, and none is begun while the patches of
    unfinished requests take the client's share of `max_held_bytes`. Encoded images of prompts that
    wait for their preparation may take as much.
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
        from nanovllm.engine.media_intake import MediaPrompts, Scale  # these import torch
        from nanovllm.replicas import attached

        options = config.media
        self._max_held = max(1, options.max_held_bytes // num_clients)
        shared = replace(
            options,
            media_cache_bytes=options.media_cache_bytes // num_clients,
            max_decoding_bytes=max(1, options.max_decoding_bytes // num_clients),
        )
        folder = hub.resolve(config.model, weights=False, revision=config.revision)
        self._prompts = MediaPrompts(
            config.model, tokenizer, Scale(*scale), settings.load(folder), shared
        )
        self._attached = attached
        num_prompts = 2 * options.num_media_workers
        self._slots = asyncio.Semaphore(num_prompts)
        self._pool = ThreadPoolExecutor(num_prompts, thread_name_prefix="prompts")
        self._running: set[Preparation] = set()
        self._num_given = self._num_held = 0  # bytes: of encoded images that wait, and of patches
        self._has_room = asyncio.Event()

    def check_media(self, media: Sequence[Given]) -> None:
        """Raises ValueError for media that the model or the options do not allow."""
        self._prompts.check_media(media)

    async def prepare(self, prompt: Prompt, params: SamplingParams) -> Encoded:
        """The prompt with its images. Give `num_bytes` to `release` once its answers have ended.

        A cancelled task ends the work. Raises ValueError for images that cannot be read or do not
        fit, QueueFull if those that wait take too many bytes, and EngineDead after `close`.
        """
        self._prompts.check(prompt, params)
        num_given = sum(_num_bytes(one.value) for one in prompt.media)
        if self._num_given and self._num_given + num_given > self._max_held:
            raise QueueFull(
                f"the images that wait have {self._num_given} bytes and {num_given} are added: at "
                f"most {self._max_held} may wait"
            )
        self._num_given += num_given
        try:
            async with self._slots:
                while self._num_held >= self._max_held:
                    self._has_room.clear()
                    await self._has_room.wait()
                return await self._prepared(prompt)
        finally:
            self._num_given -= num_given

    async def _prepared(self, prompt: Prompt) -> Encoded:
        work = self._prompts.submit(prompt)
        self._running.add(work)
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._pool, self._encoded, prompt, work)
        except BaseException:
            work.cancel()  # the request was cancelled
            raise
        finally:
            self._running.discard(work)
        self._num_held += found.num_bytes
        return found

    def _encoded(self, prompt: Prompt, work: Preparation) -> Encoded:
        """Wait for the images, and put the prompt together. Called in a thread."""
        try:
            found = self._prompts.made(prompt, work.result())
        except CancelledError:
            raise EngineDead("the engine is closed") from None
        if found.num_bytes > MAX_PATCHES_BYTES:
            raise ValueError(
                f"the prompt's images have patches of {found.num_bytes} bytes: at most "
                f"{MAX_PATCHES_BYTES} are supported"
            )
        beside = self._attached.Attached((), found.position_3T, found.images)
        message = pack(messages.BESIDE, self._attached.dump(b"", beside))
        return Encoded(found.token_ids, message, found.num_bytes)

    def release(self, num_bytes: int) -> None:
        """Subtract these bytes from those of held patches."""
        self._num_held -= num_bytes
        self._has_room.set()

    def cancel(self) -> None:
        """End all work. Call it in the event loop."""
        for work in self._running:
            work.cancel()

    def close(self) -> None:
        """Wait until the threads have ended. Any thread may call it."""
        self._prompts.close()
        self._pool.shutdown()


def _num_bytes(value: Any) -> int:
    """The bytes of encoded images: of a reference, or of the frames of a video."""
    if isinstance(value, (list, tuple)):
        return sum(map(_num_bytes, value))
    return len(value) if isinstance(value, str) else 0
