"""Encodes a client's prompts for the engine without blocking the event loop."""

from __future__ import annotations

import asyncio
import operator
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from nanovllm.config import EngineConfig
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.request import EngineInfo, EngineRequest
from nanovllm.lora_request import LoRARequest
from nanovllm.media import mm_inputs as media_given
from nanovllm.media.mm_inputs import MMInput
from nanovllm.pooling_params import PoolingParams
from nanovllm.prompts import Prompt
from nanovllm.sampling import RequestOutputKind, SamplingParams
from nanovllm.serving.mm_preprocessor import MMPreprocessor
from nanovllm.tokenizer import LONG_TEXT

CHECKED_FORMS = 16  # of parameters, kept for later prompts with the same


class Encoder:
    """Encodes texts, and prepares media."""

    def __init__(self, intake: InputProcessor, seeing: MMPreprocessor | None) -> None:
        """seeing: None for a text-only model."""
        self._intake, self._seeing = intake, seeing
        self._checked: deque[tuple[object, ...]] = deque(maxlen=CHECKED_FORMS)

    @classmethod
    async def open(
        cls, config: EngineConfig, intake: InputProcessor, info: EngineInfo, num_clients: int
    ) -> Encoder:
        """num_clients: the clients that share the limits on media. Raises ValueError."""
        if info.media_scale is None:
            return cls(intake, None)
        args = config, intake.tokenizer, info.media_scale, num_clients
        return cls(intake, await asyncio.to_thread(MMPreprocessor, *args))

    def check_media(self, media: Sequence[MMInput]) -> None:
        """Raises ValueError for media that the model or the options do not allow."""
        if self._seeing is None:
            media_given.refuse(self._intake.model, media)
        else:
            self._seeing.check_media(media)

    def check_forms(self, params: SamplingParams) -> None:
        """Do what `InputProcessor.check_forms` does, once for prompts that share parameters: it may
        take some 50 ms. Values of fields are immutable, so the same objects have been checked."""
        if not (params.has_edits or params.is_structured):
            return
        given = (
            params.structured_outputs, params.logit_bias, params.allowed_token_ids, params.bad_words
        )  # fmt: skip
        if not any(all(map(operator.is_, given, one)) for one in self._checked):
            self._intake.check_forms(params)
            self._checked.append(given)

    async def encode(
        self,
        prompt: Prompt,
        params: SamplingParams | PoolingParams,
        priority: int,
        lora_request: LoRARequest | None = None,
    ) -> tuple[EngineRequest, bytes, object | None]:
        """The request, the message with its media, and the media's key: call `release` with it when
        the answers have ended. Raises the errors of `MMPreprocessor.prepare`, and ValueError for an
        invalid prompt."""
        text, tokenizer = prompt.text or "", self._intake.tokenizer
        is_long = prompt.token_ids is None and len(text) > LONG_TEXT
        incremental = _is_incremental(params)
        asked = partial(
            self._intake.request,
            params=params,
            incremental=incremental,
            priority=priority,
            lora_request=lora_request,
        )
        if prompt.media:
            self.check_media(prompt.media)
            assert self._seeing is not None
            return await self._seeing.prepare(prompt, params, asked)
        if isinstance(params, PoolingParams):
            return await asyncio.to_thread(asked, prompt) if is_long else asked(prompt), b"", None
        if is_long and tokenizer is not None:
            token_ids = await asyncio.to_thread(tokenizer.encode, text)
            prompt = replace(prompt, token_ids=token_ids)
        return asked(prompt), b"", None

    def release(self, key: object | None) -> None:
        """Release the media of a finished request."""
        if key is not None and self._seeing is not None:
            self._seeing.gate.leave(key)

    def cancel(self) -> None:
        """Cancel the preparation of media. Call it in the client's event loop."""
        if self._seeing is not None:
            self._seeing.cancel()

    def close(self) -> None:
        """Wait for the threads to end. May be called from any thread."""
        if self._seeing is not None:
            self._seeing.close()


def _is_incremental(params: SamplingParams | PoolingParams) -> bool:
    """Whether tokens come as they are made. Log-probabilities do: those of a whole answer would be
    a large message, whose objects would be made at once."""
    if isinstance(params, PoolingParams):
        return False
    is_final = params.output_kind is RequestOutputKind.FINAL_ONLY
    return bool(params.stop) or params.logprobs is not None or not is_final
