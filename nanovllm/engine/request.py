"""Data passed to and from an engine: its facts for clients, and a checked request.

Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nanovllm.lora_request import LoRARequest
from nanovllm.pooling_params import PoolingInfo, PoolingParams
from nanovllm.sampling import SamplingParams
from nanovllm.schedule.blocks import chained_digests
from nanovllm.schedule.plan import LogitEdits
from nanovllm.schedule.request import MMSpan, block_content
from nanovllm.schedule.whole_images import WholeImages
from nanovllm.structured.library import Source

if TYPE_CHECKING:
    from torch import Tensor

    from nanovllm.runner.encoders import MMItem


def root_of(root: bytes, adapter: bytes) -> bytes:
    """The start of a chain of digests for an adapter. No other root equals it."""
    return sha256(sha256(root).digest() + sha256(adapter).digest()).digest()


@dataclass(frozen=True)
class EngineInfo:
    """Facts of an engine: the limits for checks of prompts, and what clients report to users.

    checkpoint: a digest, set by processes. num_blocks: of the KV cache. num_deepstack: levels of
    features that embeddings may have after the first. uses_mrope: tokens have positions in time,
    height and width. media_scale: the fields of `Scale`, None for a text model.
    whole_images: the limits of images that must be in one step; None without such limits.
    pooling: None for a model that generates.
    """

    checkpoint: str
    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    hidden_size: int
    block_size: int
    num_blocks: int
    eos_ids: list[int]
    default_params: dict[str, Any]
    num_deepstack: int = 0
    uses_mrope: bool = False
    has_towers: bool = False
    media_scale: Sequence[Any] | None = None
    whole_images: WholeImages | None = None
    pooling: PoolingInfo | None = None


class MediaPrompt(NamedTuple):
    """A prompt with all placeholder tokens, its positions [3, T], and the images and clips that the
    tokens stand for. Without positions each token has its index three times."""

    token_ids: list[int]
    position_3T: np.ndarray | None
    images: list[tuple[MMSpan, MMItem]]
    cache_salt: str | None = None

    @property
    def num_bytes(self) -> int:
        return sum(image.values.nbytes for _, image in self.images)


@dataclass
class Forms:
    """What an engine derives from parameters, once for all requests that share this object.

    found: the edits of logits and the grammar, once the first of the requests has been added.
    """

    found: tuple[LogitEdits | None, Source | None] | None = None


@dataclass(frozen=True)
class EngineRequest:
    """A request that `InputProcessor.request` has checked. Adding it to an engine transfers
    ownership.

    seed: None draws one from the engine's. detokenizes: whether the engine makes the text and finds
        stop strings. contents: the positions of embeddings and media in the prompt, with digests.
    embeddings: [n, K · D] by the keys of contents. media: the same for images, frames and clips to
        encode. positions: int64 [3, T], or one for each token. adapter: None is the model as it
        is. pooling: what to make of the prompt, in place of an answer; `params` are then not read.
    second_at: the token with which the second of two texts begins; 0 for one text. forms: of
        `params`.
    """

    prompt_ids: list[int]
    params: SamplingParams
    incremental: bool = True
    priority: int = 0
    cache_salt: str | None = None
    seed: int | None = None
    detokenizes: bool = True
    contents: tuple[MMSpan, ...] = ()
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)
    media: Mapping[str, MMItem] = field(default_factory=dict)
    positions: np.ndarray | None = None
    adapter: LoRARequest | None = None
    pooling: PoolingParams | None = None
    second_at: int = 0
    forms: Forms = field(default_factory=Forms, compare=False)

    @property
    def cache_root(self) -> bytes:
        """The start of the chain of its blocks' digests. An engine adds that of the adapter."""
        root = sha256(self.cache_salt.encode()).digest() if self.cache_salt else b""
        return root if self.adapter is None else root_of(root, self.adapter.lora_name.encode())

    def block_digests(self, block_size: int) -> list[bytes]:
        """The digests of its prompt's full blocks, as an engine's cache has them."""

        def content(start: int, end: int) -> bytes:
            of_block = None if self.positions is None else self.positions[:, start:end]
            return block_content(self.contents, of_block, start, end)

        return chained_digests(self.prompt_ids, block_size, root=self.cache_root, content=content)

    @property
    def num_bytes(self) -> int:
        """Of its embeddings, media and positions."""
        tensors = [*self.embeddings.values(), *(one.values for one in self.media.values())]
        num_bytes = sum(one.nbytes for one in tensors)
        return num_bytes + (0 if self.positions is None else self.positions.nbytes)
