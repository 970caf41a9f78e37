"""Plans and results of steps: numbers and arrays only, no requests and no tensors.

A plan can be stored, sent to another process and run there with the same result. A step has R rows,
which feed T tokens, row after row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from nanovllm import wire

PAD_BLOCK = 0  # belongs to padding, never to a request
NO_TOKEN = -1  # in `StepResult.tokens`: no token could be chosen (`reference.sample.sample`)
ALL_TOKENS = -1  # for `num_top` and `num_logprobs`: the whole vocabulary
NEWEST = -1  # in `StepPlan.token_T`: the row's newest token, which may be only on the device
MOST_MASKED = 7  # draft tokens of a row with a grammar in one step
DRAFT = -2  # the row's next proposed token, which a proposer on the device has left in the state
# Columns of the device's table of sampling settings. The plain sampler reads only the first one.
SAMPLING_FIELDS = (
    "temperature", "top_p", "min_p", "top_k",
    "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


NewBlock = tuple[int, int, int, int]  # (row, group of layers, index in the block table, block)


class RowCopy(NamedTuple):
    """The state that recurrent layers keep of a row after its first `pos` tokens, and a slot."""

    row: int
    pos: int
    slot: int


class RowSettings(NamedTuple):
    """The device state of a row at the start of a request.

    `pos` is the position of the first token that the row feeds. `blocks` has a block table for each
    group of layers. `rope_offset` is added to positions before the rotation. `adapter` is the
    number of a slot, 0 for the model without an adapter.
    """

    row: int
    pos: int
    seed: int
    sampling: list[float]  # SAMPLING_FIELDS
    blocks: list[list[int]]
    rope_offset: int = 0
    adapter: int = 0


class AdapterLoad(NamedTuple):
    """An adapter that is copied to the slot `number`, from 1 on, before the step."""

    adapter_id: int
    number: int


class TokenHistory(NamedTuple):
    """The tokens so far of a row with penalties: they initialise its token counts."""

    row: int
    prompt_ids: list[int]
    output_ids: list[int]


class RowTokens(NamedTuple):
    """All known tokens of a row whose last chunk is in the step, int32. A proposer reads them."""

    row: int
    token_ids: np.ndarray


class DraftReading(NamedTuple):
    """Known tokens of a row from position `start` on, int64, that the second model reads before the
    step: earlier steps ran without it."""

    row: int
    start: int
    token_ids: np.ndarray


@dataclass(frozen=True)
class StepDrafts:
    """What a step does for a proposer that drafts only as many tokens as pay.

    room: the draft tokens of a row that it has room for, at least; the proposer drafts so many
        after it. readings: what the second model reads before it. rests: the proposer does not run.
    """

    room: int = 0
    readings: list[DraftReading] = field(default_factory=list)
    rests: bool = False


NO_DRAFTS = StepDrafts()


class LogitEdits(NamedTuple):
    """Changes of one request's logits before penalties, temperature and filters.

    bias: numbers that are added to the logits of these tokens; −inf forbids a token.
    allowed: all other tokens get −inf. None: all tokens are allowed.
    bad: sequences of one or more tokens that the output must not contain. The last token of a
        sequence gets −inf while the output ends with the tokens before it. The prompt does not
        count.
    """

    bias: dict[int, float]
    allowed: Sequence[int] | None
    bad: list[list[int]]

    @property
    def context_tokens(self) -> int:
        """The number of newest output tokens that decide which tokens `bad` forbids."""
        return max((len(sequence) for sequence in self.bad), default=1) - 1


class RowEdits(NamedTuple):
    """The edits of a row that now belongs to a request with edits.

    output_ids: the newest output tokens, at least `LogitEdits.context_tokens` of them if there are
        as many.
    """

    row: int
    edits: LogitEdits
    output_ids: list[int]


class PromptLogprobs(NamedTuple):
    """A request for log-probabilities of the prompt tokens `token_ids` from position `first` on.

    Their logits are those after tokens number `start`, `start + 1`, … of the step. `num_top` may be
    ALL_TOKENS.
    """

    request_id: int
    first: int
    start: int
    token_ids: list[int]
    num_top: int


class EmbeddingSpan(NamedTuple):
    """Tokens `start` … `start + num − 1` of the step use rows `source` … of embeddings `key`."""

    key: str
    source: int
    start: int
    num: int


class PastTokens(NamedTuple):
    """Tokens (int32) that the buffer of earlier answers has from place `start` on."""

    start: int
    token_ids: np.ndarray


@dataclass(frozen=True)
class SamplingMetadata:
    """How to choose the next tokens, apart from each row's temperature.

    forbidden: (row of the step, token id) pairs that must not be chosen. Such a row feeds one
        token.
    num_logprobs: the number of likeliest tokens to report for each row; ALL_TOKENS: all of them;
        None: no log-probabilities.
    masked: the rows of the step that may choose only some tokens (`StepPlan.allowed_MW`).
    """

    has_filters: bool = False
    has_penalties: bool = False
    has_edits: bool = False
    forbidden: list[tuple[int, int]] = field(default_factory=list)
    num_logprobs: int | None = None
    masked: list[int] = field(default_factory=list)

    @property
    def has_masks(self) -> bool:
        return bool(self.masked or self.forbidden)

    @property
    def needs_host(self) -> bool:
        """True if the choice returns more than tokens to the host.

        Filters, penalties, edits and masks need only tables on the device, so a step can be
        captured with them.
        """
        return self.num_logprobs is not None

    @property
    def state_suffices(self) -> bool:
        """True if the choice does not depend on earlier tokens either: all rows can verify
        proposals."""
        return not (self.has_penalties or self.has_edits or self.has_masks or self.needs_host)

    @property
    def is_timed(self) -> bool:
        """True if steps of this kind take times that are alike, with masks or without."""
        has_others = self.has_penalties or self.has_edits or self.needs_host
        return not (has_others or self.forbidden)

    @property
    def is_plain(self) -> bool:
        return not self.has_filters and self.state_suffices


PLAIN = SamplingMetadata()


@dataclass(frozen=True)
class StepPlan:
    """One step of the device.

    request_ids, rows: [R] the requests, and their rows of the device state.
    num_tokens: [R] tokens that each row feeds; in a decode step its newest token and the proposed
        tokens after it.
    seq_lens: [R] tokens of each row in the cache after the step; at most so many while it is not
        known how many proposals of an earlier step were accepted.
    token_T: int64 [T] the tokens, row after row; NEWEST for a row's newest token, DRAFT for those
        that follow it in the state. Empty in a decode step in which every row feeds only its newest
        token.
    is_sampled: [R] whether the step samples the row's next token.
    adapters: copies to slots before the step. past: earlier answers for a proposer.
    restores: copies from slots to rows before the step. snapshots: from rows to slots after it.
    position_3T: int64 [3, T] the positions of the tokens in time, height and width. None: each has
        one position, which the device derives from the state.
    allowed_MW: int32 [M, ceil(V / 32)], for each of `SamplingMetadata.masked` a mask of the tokens
        that it may choose: token v is bit v % 32 of word v // 32. A row of a decode step that feeds
        n tokens has n masks: those of the choices after each.
    """

    is_prefill: bool
    request_ids: list[int]
    rows: list[int]
    num_tokens: list[int]
    seq_lens: list[int]
    token_T: np.ndarray
    is_sampled: list[bool]
    settings: list[RowSettings] = field(default_factory=list)
    new_blocks: list[NewBlock] = field(default_factory=list)
    adapters: list[AdapterLoad] = field(default_factory=list)
    restores: list[RowCopy] = field(default_factory=list)
    snapshots: list[RowCopy] = field(default_factory=list)
    histories: list[TokenHistory] = field(default_factory=list)
    known: list[RowTokens] = field(default_factory=list)
    past: list[PastTokens] = field(default_factory=list)
    drafts: StepDrafts = NO_DRAFTS
    edits: list[RowEdits] = field(default_factory=list)
    sampling: SamplingMetadata = PLAIN
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    embeddings: list[EmbeddingSpan] = field(default_factory=list)
    position_3T: np.ndarray | None = None
    allowed_MW: np.ndarray | None = None

    @property
    def tokens_per_row(self) -> int:
        """K of a decode step: the largest number of tokens that a row feeds."""
        return max(self.num_tokens)

    @property
    def masks_of(self) -> list[int]:
        """How many masks each of `SamplingMetadata.masked` has in `allowed_MW`."""
        return [1 if self.is_prefill else self.num_tokens[row] for row in self.sampling.masked]

    def proposed(self, row: int) -> list[int]:
        """The tokens that a row of a decode step feeds after its newest."""
        end = sum(self.num_tokens[: row + 1])
        found: list[int] = self.token_T[end - self.num_tokens[row] + 1 : end].tolist()
        return found

    @property
    def has_given(self) -> bool:
        """True if tokens have embeddings or M-RoPE positions."""
        return bool(self.embeddings) or self.position_3T is not None

    def to_bytes(self) -> bytes:
        """The plan as a message, for `from_bytes`."""
        return wire.dump(self)

    @staticmethod
    def from_bytes(data: bytes) -> StepPlan:
        return _load(data)


_load = wire.decoder(StepPlan)


class Logprobs(NamedTuple):
    """Log-probabilities of N tokens, and those of the L likeliest tokens with their ids.

    rank_N: 1 for the likeliest token: one more than the number of tokens with a larger
        log-probability.
    """

    chosen_N: np.ndarray
    top_NL: np.ndarray
    top_token_NL: np.ndarray
    rank_N: np.ndarray


@dataclass(frozen=True)
class StepResult:
    """The result of a step.

    tokens: [R] lists of each row's new tokens: 1 … K of them, none for rows that do not sample.
        The last one is NO_TOKEN if all logits after the token before it are NaN or −inf.
    logprobs: those of all new tokens, row after row, if the plan requests them.
    prompt_logprobs: one entry for each entry of `StepPlan.prompt_logprobs`.
    drafts: the draft tokens that the device has left after those of each of
        `SamplingMetadata.masked`: the host computes masks along them. Empty without a proposer, or
        if it rested.
    """

    tokens: list[list[int]]
    logprobs: Logprobs | None = None
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    drafts: list[list[int]] = field(default_factory=list)
