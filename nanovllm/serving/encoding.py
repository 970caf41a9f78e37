"""Encodes the prompts of a client for the engine, without blocking the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from nanovllm.config import EngineConfig
from nanovllm.engine.intake import Intake
from nanovllm.media import given as media_given
from nanovllm.media.given import Given
from nanovllm.prompts import Prompt
from nanovllm.replicas.messages import Facts
from nanovllm.sampling import SamplingParams
from nanovllm.serving.seeing import Encoded, Seeing

# Longer texts are encoded in a thread, so that other tasks can run.
LONG_TEXT_CHARACTERS = 4096


class Encoder:
    """Encodes texts, and prepares images, videos and sound."""

    def __init__(self, intake: Intake, seeing: Seeing | None) -> None:
        """seeing: None for a model that reads text only."""
        self._intake, self._seeing = intake, seeing

    @classmethod
    async def open(
        cls, config: EngineConfig, intake: Intake, facts: Facts, num_clients: int
    ) -> Encoder:
        """num_clients: how many of them share the bounds of images. Raises ValueError."""
        if facts.media_scale is None:
            return cls(intake, None)
        args = config, intake.tokenizer, facts.media_scale, num_clients
        return cls(intake, await asyncio.to_thread(Seeing, *args))

    def check_media(self, media: Sequence[Given]) -> None:
        """Raises ValueError for media that the model or the options do not allow."""
        if self._seeing is None:
            media_given.refuse(self._intake.model, media)
        else:
            self._seeing.check_media(media)

    async def encode(self, prompt: Prompt, params: SamplingParams) -> Encoded:
        """The prompt, whose ids are valid. Give `num_bytes` to `release` once its answers have
        ended. Raises as `Seeing.prepare` does, and ValueError for an invalid prompt."""
        if prompt.media:
            self.check_media(prompt.media)
            assert self._seeing is not None
            found = await self._seeing.prepare(prompt, params)
            try:
                self._intake.prompt_ids(Prompt(None, found.token_ids), params)
            except ValueError:
                self.release(found.num_bytes)
                raise
            return found
        text, tokenizer = prompt.text or "", self._intake.tokenizer
        is_long = prompt.token_ids is None and len(text) > LONG_TEXT_CHARACTERS
        if is_long and tokenizer is not None:
            token_ids = await asyncio.to_thread(tokenizer.encode, text)
            prompt = replace(prompt, token_ids=token_ids)
        return Encoded(self._intake.prompt_ids(prompt, params))

    def release(self, num_bytes: int) -> None:
        """Subtract these bytes from those of held patches."""
        if num_bytes and self._seeing is not None:
            self._seeing.release(num_bytes)

    def cancel(self) -> None:
        """End the preparation of images. Call it in the client's event loop."""
        if self._seeing is not None:
            self._seeing.cancel()

    def close(self) -> None:
        """Wait until the threads have ended. Any thread may call it."""
        if self._seeing is not None:
            self._seeing.close()
