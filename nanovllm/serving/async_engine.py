"""The engine's interface for servers: requests from tasks of one event loop, and streams."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np

    from nanovllm.config import EngineConfig
    from nanovllm.engine.metrics import Metric
    from nanovllm.lora_request import LoRARequest
    from nanovllm.media.mm_inputs import MMInput
    from nanovllm.outputs import TopLogprobs
    from nanovllm.pooling_params import PoolingInfo, PoolingParams
    from nanovllm.prompts import AnyPrompt, Prompt
    from nanovllm.sampling import SamplingParams
    from nanovllm.tokenizer import Tokenizer


class QueueFull(Exception):
    """The queue is full. The message names the limit."""


class Draining(Exception):
    """The engine finishes running requests and accepts no new ones."""


class Unavailable(Exception):
    """A valid request cannot be served now; it may succeed later."""


class EngineDead(Exception):
    """The engine process has ended. The message has the reason, without paths or prompts."""


@dataclass(slots=True)
class Delta:
    """The new part of one answer since the previous delta.

    output_index: of the answer, 0 … n − 1. The last delta of an answer has a finish_reason and the
    fields after it. prompt_logprobs: of the first answer only; those of others would be equal.
    """

    output_index: int
    text: str
    token_ids: list[int]
    logprobs: list[TopLogprobs] | None = None
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "error"
    stop_reason: int | str | None = None
    error: str | None = None
    error_field: str | None = None  # the parameter at fault, if any
    num_cached_tokens: int = 0
    prompt_logprobs: list[TopLogprobs | None] | None = None
    pooled: np.ndarray | None = None


class Stream(Protocol):
    """The answers to one prompt. A slow reader gets larger deltas, not more of them."""

    request_id: str
    prompt_token_ids: list[int]  # including media tokens, once the first delta has arrived

    def __aiter__(self) -> AsyncIterator[Delta]:
        """Yields until the last of the n answers ends. Raises EngineDead."""
        ...

    def abort(self) -> None:
        """Abort the unfinished answers. May be called at any time, and repeatedly."""
        ...


class AsyncEngine(Protocol):
    config: EngineConfig
    tokenizer: Tokenizer | None
    max_model_len: int
    max_num_seqs: int
    default_params: SamplingParams
    eos_ids: frozenset[int]
    pooling: PoolingInfo | None

    @property
    def is_draining(self) -> bool: ...

    @property
    def failure(self) -> EngineDead | None: ...

    def check_media(self, media: Sequence[MMInput]) -> None:
        """Raises ValueError for media that the model or the options do not allow."""
        ...

    async def open(
        self,
        prompt: AnyPrompt | Prompt,
        params: SamplingParams | PoolingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        lora_request: LoRARequest | None = None,
    ) -> Stream:
        """Queue a prompt. Raises ValueError for an invalid one, QueueFull, Draining, Unavailable,
        EngineDead."""
        ...

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """Check an adapter and begin to read it. Raises ValueError and EngineDead."""
        ...

    async def remove_lora(self, lora_id: int) -> bool:
        """Forget an adapter; False if it is not known. Raises ValueError while requests use it, and
        EngineDead."""
        ...

    def abort(self, request_id: str) -> None: ...

    async def metrics(self) -> list[Metric]: ...
