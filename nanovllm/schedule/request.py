"""The state of one request: its known tokens, and its progress on the device."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from nanovllm.checks import InvalidValue
from nanovllm.sampling import SamplingParams
from nanovllm.schedule.logprobs import Logprob
from nanovllm.schedule.plan import LogitEdits, NewBlock

# parameters that forbid tokens
STRUCTURED, EDITS = "structured_outputs", ("allowed_token_ids", "bad_words", "logit_bias")


class Status(enum.Enum):
    # its media or grammar are being prepared; not yet in the scheduler
    PREPARING = "preparing"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class MMSpan(NamedTuple):
    """Embeddings for prompt tokens `start` … `start + num − 1`. Their digest is their key."""

    start: int
    num: int
    digest: bytes

    @property
    def key(self) -> str:
        return self.digest.hex()


def block_content(
    contents: Sequence[MMSpan], position_3T: np.ndarray | None, start: int, end: int
) -> bytes:
    """What keys and values of tokens `start` … `end − 1` depend on beside token ids: digests and
    offsets of embeddings, and positions that differ from those in the sequence."""
    found = [
        one.digest + (one.start - start).to_bytes(8, "little", signed=True)
        for one in contents
        if one.start < end and one.start + one.num > start
    ]
    if position_3T is not None and (position_3T != np.arange(start, end)).any():
        found.append(position_3T.tobytes())
    return b"".join(found)


class Constraint(Protocol):
    """The grammar of an answer, and its state after the tokens so far.

    is_ended: only end-of-sequence may follow. is_slow: what may follow takes long to compute.
    error: the reason if nothing can follow; None otherwise.
    """

    is_ended: bool
    is_slow: bool
    error: str | None

    @property
    def is_ready(self) -> bool:
        """Whether the next allowed tokens are known."""
        ...

    def push(self, token_id: int) -> None:
        """Add a token to the answer."""
        ...

    def forced(self) -> Sequence[int]:
        """The next tokens of the answer, as far as nothing else may follow and it takes little time
        to find that out."""
        ...


@dataclass(eq=False)
class Request:
    """A request, with its tokens, its blocks and its row.

    The keys and values of `num_computed` tokens are in the cache once all launched steps are done.
    `num_in_flight` sampled tokens are on the device but not yet known to the host. Both counts
    include proposed tokens until the result of their step is known.
    """

    request_id: int
    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    max_output: int  # max_tokens, at most what max_model_len leaves for the output
    stop_ids: frozenset[int]  # within the vocabulary
    incremental: bool = False  # its tokens are streamed
    contents: tuple[MMSpan, ...] = ()
    prompt_position_3P: np.ndarray | None = None  # of the prompt's tokens, in time, height, width
    priority: int = 0  # requests with lower numbers go first
    edits: LogitEdits | None = None
    constraint: Constraint | None = None  # has consumed exactly output_ids
    cache_root: bytes = b""  # start of the digest chain: data that all keys and values depend on
    adapter_id: int = 0  # 0: none
    adapter: int = 0  # the number of its slot, while running
    num_passed: int = 0  # how often later requests were admitted while it waited for a slot
    output_ids: list[int] = field(default_factory=list)
    status: Status = Status.WAITING
    finish_reason: str | None = None
    row: int = -1  # of the device state, while running
    blocks: list[list[int]] = field(default_factory=list)  # a table for each group of layers
    new_blocks: list[NewBlock] = field(default_factory=list)  # that no prefill step has had yet
    block_digests: list[bytes] = field(default_factory=list)  # of the full blocks, chained
    is_decoding: bool = False  # its last prefill chunk has been launched
    is_verifying: bool = False  # a step with proposals of the host is in flight
    is_failing: bool = False  # its tokens in flight are dropped, then it restarts
    no_sharing: bool = False  # it shares no cached blocks and has no proposals
    snapshot: int | None = None  # the pinned slot whose state its first step begins with
    num_shared: int = 0  # tokens whose blocks were found in the cache at this admission
    num_computed: int = 0
    num_in_flight: int = 0
    num_cached: int | None = None  # prompt tokens found in the prefix cache at first admission
    num_ready: int = 0  # draft tokens after the newest token, of a proposer that varies
    drafts: list[int] = field(default_factory=list)  # those, where the host computes masks
    num_forced: int = 0  # of the drafts that a step verifies, those that its grammar forces
    num_drafted: int | None = None  # tokens that the second model has read; None: all
    drafts_ended: bool = False  # a head has not read some tokens, so it drafts no more
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=list)

    def expand(
        self, prompt_ids: list[int], contents: tuple[MMSpan, ...], positions: np.ndarray | None
    ) -> None:
        """Replace the prompt by the one with all tokens of its media."""
        self.prompt_ids, self.contents, self.prompt_position_3P = prompt_ids, contents, positions
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * len(prompt_ids)

    def whole(self, num_tokens: int, most: int) -> int:
        """About `num_tokens` of the next tokens, so that they end in no image: fewer, or if the
        first of them are of an image up to `most`, its rest; 0 if `most` is less than that."""
        start, end = self.num_computed, self.num_computed + num_tokens
        for one in self.contents:
            stop = one.start + one.num
            if one.start < end < stop:
                num = max(one.start, start) - start or stop - start
                return num if num <= most else 0
        return num_tokens

    def restart(self) -> None:
        """Return to waiting without cached tokens: the next prefill feeds all known tokens."""
        self.status = Status.WAITING
        self.row, self.blocks, self.new_blocks, self.block_digests = -1, [], [], []
        self.adapter = 0
        self.is_decoding = self.is_verifying = self.is_failing = False
        self.num_computed = self.num_in_flight = 0
        self.num_ready, self.num_drafted, self.drafts = 0, None, []
        self.drafts_ended = False
        self.snapshot = None
        del self.logprobs[len(self.output_ids) :]  # of dropped tokens

    @cached_property
    def needs_temperature_alone(self) -> bool:
        """True if the sampler in the step's graph is enough for all tokens of the request."""
        has_others = self.edits is not None or self.constraint is not None
        return self.params.is_plain and not has_others and not self.params.min_tokens

    @property
    def takes_drafts(self) -> bool:
        """Whether a step may verify several tokens of it: its next choice depends on no other.
        `num_computed` counts the newest token."""
        if self.drafts_ended:
            return False
        if self.needs_temperature_alone:
            return not self.params.disable_spec_decode
        params = self.params
        depends = self.constraint is not None or self.edits is not None or params.has_penalties
        must_go_on = params.min_tokens and self.min_tokens_hold
        return not (depends or must_go_on or params.disable_spec_decode)

    @property
    def takes_masked(self) -> bool:
        """Whether a step may verify tokens whose ids are on the host, with the masks of its grammar
        after each. `num_computed` counts the newest token."""
        if self.constraint is None or self.constraint.is_slow:
            return False
        params = self.params
        depends = self.edits is not None or params.has_penalties or params.disable_spec_decode
        return not (depends or self.min_tokens_hold)

    @cached_property
    def rope_offset(self) -> int:
        """What is added to the position in the sequence of a token of the answer."""
        if self.prompt_position_3P is None:
            return 0
        return int(self.prompt_position_3P.max()) + 1 - len(self.prompt_ids)

    def position_3T(self, start: int, end: int) -> np.ndarray:
        """The positions of known tokens `start` … `end − 1`: int64 [3, T]."""
        own_T = np.arange(start, end)
        found_3T = np.broadcast_to(own_T + self.rope_offset, (3, end - start)).copy()
        if self.prompt_position_3P is not None:
            given = self.prompt_position_3P[:, start:end]
            found_3T[:, : given.shape[1]] = given
        return found_3T

    @property
    def all_token_ids(self) -> list[int]:
        return self.prompt_ids + self.output_ids

    @property
    def num_known(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_scheduled_outputs(self) -> int:
        return len(self.output_ids) + self.num_in_flight

    @property
    def may_decode(self) -> bool:
        return (
            self.is_decoding
            and not self.is_verifying
            and not self.is_failing
            and not self.waits_for_mask
            and self.num_scheduled_outputs < self.max_output
        )

    @property
    def waits_for_mask(self) -> bool:
        """True if the next allowed tokens are not known yet: they depend on the token in flight, or
        a thread computes them."""
        if self.constraint is None:
            return False
        return self.num_in_flight > 0 or not self.constraint.is_ready

    @property
    def needs_prompt_logits(self) -> bool:
        """True until the first full prefill has computed the requested prompt log-probabilities."""
        return self.params.prompt_logprobs is not None and not self.output_ids

    @property
    def min_tokens_hold(self) -> bool:
        """True if the token being sampled (it counts as in flight) must not end the request."""
        return self.num_scheduled_outputs <= self.params.min_tokens

    @property
    def without_token(self) -> Exception:
        """The error if no token could be chosen after the known ones."""
        if self.constraint is not None and self.constraint.error is not None:
            return InvalidValue(STRUCTURED, self.constraint.error)
        error = f"no token can follow its {self.num_known} tokens: all logits are NaN or −inf"
        if self.constraint is not None:
            return InvalidValue(
                STRUCTURED,
                f"structured_outputs: {error}, perhaps because bias, allowed tokens, bad words and "
                "min_tokens forbid what the grammar allows",
            )
        names = [name for name in EDITS if getattr(self.params, name)]
        if len(self.output_ids) < self.params.min_tokens:
            names.append("min_tokens")
        if not names:
            return RuntimeError(error)
        words = "perhaps because bias, allowed tokens, bad words and min_tokens forbid all"
        return InvalidValue(names[0], f"{error}, {words}")

    def content(self, start: int, end: int) -> bytes:
        """See `block_content`."""
        has_positions = self.prompt_position_3P is not None
        position_3T = self.position_3T(start, end) if has_positions else None
        return block_content(self.contents, position_3T, start, end)
