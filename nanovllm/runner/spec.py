"""The settings of an engine beside its model: sizes, attention, cache dtype."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from nanovllm.compile import buckets
from nanovllm.models.experts.offloaded import OffloadPlan
from nanovllm.models.model import Model
from nanovllm.platforms.attention import Attention
from nanovllm.runner.proposer import DeviceProposer


@dataclass(frozen=True)
class Layout:
    """The static sizes of one engine."""

    block_size: int
    max_num_seqs: int
    max_model_len: int
    decode_rows: tuple[int, ...]
    prefill_tokens: tuple[int, ...]
    max_prefill_rows: int
    pad: bool = True
    verify_tokens: tuple[int, ...] = ()  # K of decode steps that feed several tokens a row
    vision_patches: tuple[int, ...] = ()  # T of calls of a vision tower
    audio_chunks: tuple[int, ...] = ()  # K of calls of an audio tower

    @property
    def blocks_per_row(self) -> int:
        return -(-self.max_model_len // self.block_size)

    @property
    def num_places(self) -> int:
        """The states that a recurrent layer keeps of each row: one for each token of a step that
        may be rejected."""
        return max(self.verify_tokens, default=1)

    @property
    def buckets(self) -> list[tuple[str, int]]:
        """("prefill", tokens), ("vision", patches), ("audio", chunks) and ("decode", rows), the
        ones that take longest to build first."""
        sizes = {
            "prefill": self.prefill_tokens,
            "vision": self.vision_patches,
            "audio": self.audio_chunks,
            "decode": self.decode_rows,
        }
        return [(kind, size) for kind, ascending in sizes.items() for size in reversed(ascending)]

    @property
    def logits_rows(self) -> list[int]:
        """How many rows of logits the steps of the buckets compute, in ascending order."""
        verified = (rows * num for rows in self.decode_rows for num in self.verify_tokens)
        prompts = (self.prefill_bucket(num, 1)[1] for num in self.prefill_tokens)
        return sorted({*self.decode_rows, *verified, *prompts})

    def decode_bucket(self, num_rows: int) -> int:
        return buckets.smallest_fit(self.decode_rows, num_rows) if self.pad else num_rows

    def verify_bucket(self, num_rows: int, num_tokens: int) -> tuple[int, int]:
        """(R, K) for a decode step of up to `num_tokens` tokens a row."""
        if not self.pad:
            return num_rows, num_tokens
        return self.decode_bucket(num_rows), buckets.smallest_fit(self.verify_tokens, num_tokens)

    def prefill_bucket(self, num_tokens: int, num_rows: int) -> tuple[int, int]:
        """(T, R) for a prefill step."""
        if not self.pad:
            return num_tokens, num_rows
        tokens = buckets.smallest_fit(self.prefill_tokens, num_tokens)
        return tokens, min(tokens, self.max_prefill_rows)


@dataclass(frozen=True)
class DraftSpec:
    """What proposes tokens on the device, and its model. The model's weights are `Params.draft`.

    reads_fed, reads_last: see `Drafting`. reads_history: whether the state has the tokens of each
    row, and num_past those of earlier answers, at most so many. adapts: whether steps have as many
    draft tokens as pay. synthetic_rate: see `state.accept_and_advance`.
    """

    proposer: DeviceProposer
    model: Model | None = field(default=None, repr=False)
    reads_fed: bool = True
    reads_last: bool = False
    reads_history: bool = False
    num_past: int = 0
    adapts: bool = False
    synthetic_rate: float | None = None

    def lookup_lens(self, max_model_len: int) -> tuple[int, int]:
        """The tokens of each row, and of earlier answers, that the state has."""
        return max_model_len if self.reads_history else 0, self.num_past

    @property
    def varies(self) -> bool:
        """Whether the proposer drafts only as many tokens as pay, since each costs a pass."""
        return self.adapts and self.model is not None

    @property
    def rests(self) -> bool:
        """Whether plain steps run without the proposer. Its model can read their tokens later, if
        it reads nothing else of them."""
        return self.varies and not self.proposer.layers

    @property
    def ends(self) -> bool:
        """Whether plain steps run without the proposer where reading on costs more than it may:
        its model reads results of layers, so it cannot read those tokens later."""
        return self.varies and bool(self.proposer.layers)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token takes in the caches of the second model."""
        return (
            0 if self.model is None else self.model.page_groups.token_bytes(self.model.config.dtype)
        )


@dataclass(frozen=True)
class EngineSpec:
    """The settings of one engine.

    `attention` names the attention op of each bucket. `cache_dtype` is the dtype of keys and
    values. `offload` is the placement of experts, None for all on the device. Embeddings of images
    take `embedding_cache_bytes` of the device at most between steps. `draft` proposes tokens on the
    device. `snapshot_slots` are those for states of recurrent layers. With
    `persistent`: decode and verifying steps are one kernel where it takes them; None: where it is
    faster.
    """

    layout: Layout
    attention: Attention
    cache_dtype: torch.dtype
    offload: OffloadPlan | None = None
    embedding_cache_bytes: int = 0
    draft: DraftSpec | None = None
    snapshot_slots: int = 0
    persistent: bool | None = False
