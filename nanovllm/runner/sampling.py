"""The sampler for filters, edits, masks, penalties and log-probabilities.

The plain sampler needs only a temperature and is a part of the step (`state.choose_and_advance`).
Filters, edits, masks and penalties need only tables on the device, so decode steps are captured
with them. All other choices run op by op between captured parts. Both slow down plain requests only
in the same batch.

R rows | N tokens to choose | S rows of the state | V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.platforms.base import DryRun, HostCopy, Platform
from nanovllm.runner.logit_edits import EditTables
from nanovllm.runner.masks import WORD_TOKENS, MaskTable
from nanovllm.runner.state import DeviceState, advance, choose
from nanovllm.schedule.edit_limits import check
from nanovllm.schedule.plan import (
    ALL_TOKENS,
    MOST_MASKED,
    SAMPLING_FIELDS,
    LogitEdits,
    Logprobs,
    SamplingMetadata,
    TokenHistory,
)

TEMPERATURE, TOP_P, MIN_P, TOP_K, REPETITION, PRESENCE, FREQUENCY = range(len(SAMPLING_FIELDS))


class Penalties(NamedTuple):
    """Per row: how often each token was generated, whether it is in the prompt, and the three
    penalties."""

    output_count_RV: Tensor
    in_prompt_RV: Tensor
    repetition_R1: Tensor
    presence_R1: Tensor
    frequency_R1: Tensor


def penalize(logits_RV: Tensor, p: Penalties) -> Tensor:
    """Logits in fp32 after the penalties. The repetition penalty applies to tokens of prompt and
    output, the presence and frequency penalties to tokens of the output."""
    logits_RV = logits_RV.float()
    generated_RV = p.output_count_RV > 0
    repeated_RV = torch.where(
        logits_RV > 0, logits_RV / p.repetition_R1, logits_RV * p.repetition_R1
    )
    logits_RV = torch.where(generated_RV | p.in_prompt_RV, repeated_RV, logits_RV)
    return logits_RV - generated_RV * p.presence_R1 - p.output_count_RV * p.frequency_R1


def sample_filtered(logits_RV: Tensor, fields_RF: Tensor, seed_R: Tensor, pos_R: Tensor) -> Tensor:
    """`ops.apply_top_k_top_p`, then `ops.sample`. The columns of fields_RF are SAMPLING_FIELDS."""
    temperature_R, top_p_R, min_p_R, top_k_R = fields_RF.unbind(1)[:REPETITION]
    kept_RV = ops.apply_top_k_top_p(logits_RV, temperature_R, top_k_R, top_p_R, min_p_R)
    return ops.sample(kept_RV, temperature_R, seed_R, pos_R)


def dry_run_filtered(visit: Callable[..., object], logits_RV: Tensor, one_R: Tensor) -> None:
    """Call `visit(op, args, kwargs)` for each op that `sample_filtered` calls."""
    visit(ops.apply_top_k_top_p, [logits_RV, one_R, one_R, one_R, one_R], {})
    visit(ops.sample, [logits_RV, one_R, one_R.long(), one_R.long()], {})


def dry_run_masked(visit: Callable[..., object], logits_RV: Tensor, row_R: Tensor) -> None:
    """Call `visit(op, args, kwargs)` for the op of `MaskTable`."""
    num_words = -(-logits_RV.shape[1] // WORD_TOKENS)
    allowed_RW = row_R.new_zeros((len(row_R), num_words), dtype=torch.int32)
    visit(ops.apply_token_bitmask, [logits_RV, allowed_RW, row_R], {})


def logprobs(
    logits_RV: Tensor, token_R: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Logprobs`, from the log-softmax of the model's own logits at token_R and at
    the `num_top` likeliest tokens (ALL_TOKENS: all). NO_TOKEN is looked up as token 0."""
    vocab_size = logits_RV.shape[1]
    num_top = vocab_size if num_top == ALL_TOKENS else min(num_top, vocab_size)
    logprob_RV = logits_RV.float().log_softmax(-1)
    top_RL, top_token_RL = logprob_RV.topk(num_top, dim=-1)
    chosen_R1 = logprob_RV.gather(1, token_R.clamp(min=0).unsqueeze(1))
    rank_R = (logprob_RV > chosen_R1).sum(-1) + 1
    return chosen_R1.squeeze(1), top_RL, top_token_RL, rank_R


class LogprobCopies(NamedTuple):
    """Log-probabilities of the first `num` rows, while they are copied to the host."""

    num: int
    copies: list[HostCopy]

    def wait(self) -> Logprobs:
        return Logprobs(*(copy.numpy()[: self.num] for copy in self.copies))


def copy_logprobs(
    platform: Platform, logits_RV: Tensor, token_R: Tensor, num_top: int, num: int
) -> LogprobCopies:
    return read_logprobs(platform, logprobs(logits_RV, token_R, num_top), num)


def read_logprobs(platform: Platform, values: Sequence[Tensor], num: int) -> LogprobCopies:
    """Copies of the fields of `Logprobs`, of the first `num` rows."""
    return LogprobCopies(num, [platform.read_back(value) for value in values])


class Kind(NamedTuple):
    """The parts of a sampler beside the temperature that need only tables on the device."""

    has_filters: bool
    has_penalties: bool
    has_edits: bool
    has_masks: bool


def kind_of(sampling: SamplingMetadata) -> Kind:
    return Kind(
        sampling.has_filters, sampling.has_penalties, sampling.has_edits, sampling.has_masks
    )


class Variant(NamedTuple):
    """A sampler that reads only the device's memory: a decode step can be captured with it.

    `choose(row_idx_R, logits_RV)` returns token_R and advances the state. `verify(row_idx_T,
    logits_TV, num_T)` returns token_T for several tokens of a row, and does not. A step that was
    captured with another `version` of the same `kind` must be captured again. With `num_logprobs`
    the log-probabilities of verified tokens are computed, too (`logprobs`).
    """

    kind: Kind
    version: int
    choose: Callable[[Tensor, Tensor], Tensor]
    verify: Callable[[Tensor, Tensor, Tensor], Tensor]
    num_logprobs: int | None = None


class Sampler:
    """Owns the token counts for penalties and the tables for edits.

    The first request that needs them allocates them.
    """

    def __init__(
        self,
        platform: Platform,
        state: DeviceState,
        vocab_size: int,
        dtype: torch.dtype,
        num_verified: int = 1,
    ) -> None:
        """`dtype` is the dtype of the model's logits. Logits after penalties are in fp32. Rows feed
        up to `num_verified` tokens in a decode step."""
        self.platform, self.state, self.vocab_size = platform, state, vocab_size
        self.edits = EditTables(platform, state.token_S.shape[0], vocab_size)
        num_masks = min(num_verified, 1 + MOST_MASKED)
        self.masks = MaskTable(platform, state.token_S.shape[0], vocab_size, num_masks)
        self._dtypes = dict.fromkeys((dtype, torch.float32))
        self._output_count_SV: Tensor | None = None
        self._in_prompt_SV: Tensor | None = None

    def warm_up(self) -> None:
        """Load the kernels of filters and masks, so that the first request with them does not
        wait."""
        pad_row_1 = torch.full((1,), self.state.pad_row, device=self.platform.device)
        for dtype in self._dtypes:
            logits_1V = torch.zeros(1, self.vocab_size, dtype=dtype, device=self.platform.device)
            self.masks.warm_up(logits_1V)
            self.choose_and_advance(pad_row_1, logits_1V)

    def dry_run(self, dry_run: DryRun) -> None:
        """Call the ops of `warm_up` with fake tensors."""
        for dtype in self._dtypes:
            with dry_run.mode:
                one_1 = torch.ones(1, device=self.platform.device)
                logits_1V = torch.ones(1, self.vocab_size, dtype=dtype, device=self.platform.device)
                row_1 = one_1.long()
            dry_run_filtered(dry_run.visit, logits_1V, one_1)
            dry_run_masked(dry_run.visit, logits_1V, row_1)

    def prepare(self, edits: LogitEdits | None, has_penalties: bool, has_masks: bool) -> None:
        """Allocate what a request with these edits, with penalties or with masks needs.

        Raises ValueError for edits that do not fit, and torch.OutOfMemoryError. Nothing has changed
        then.
        """
        if edits is not None:
            check(edits, self.vocab_size)
            self.edits.reserve([edits])
        if has_penalties:
            self._tables()
        if has_masks:
            self.masks.reserve()

    def variant(self, sampling: SamplingMetadata) -> Variant:
        """The sampler for a choice."""
        kind = kind_of(sampling)
        version = self.edits.version if kind.has_edits else 0
        chooses = partial(self._sample, kind), partial(self._choose, kind, verifies=True)
        num = sampling.num_logprobs
        if num is not None and num > 0:  # few sizes: each is captured and kept
            num = 1 << (num - 1).bit_length()
        return Variant(kind, version, *chooses, num)

    def remember(self, histories: Sequence[TokenHistory]) -> None:
        """Set the counts of rows that now belong to requests with penalties."""
        for row, prompt_ids, output_ids in histories:
            counts_SV, in_prompt_SV = self._tables()
            counts_SV[row] = 0
            in_prompt_SV[row] = False
            in_prompt_SV[row, self.platform.upload(prompt_ids, torch.int64)] = True
            if output_ids:
                output = self.platform.upload(output_ids, torch.int64)
                counts_SV[row].index_add_(0, output, torch.ones_like(output, dtype=torch.int32))

    def choose(self, row_idx_N: Tensor, logits_NV: Tensor, num_N: Tensor | None = None) -> Tensor:
        """Choose token_N, at positions pos + num_N (pos + 1 without num_N), by the rows' filters,
        temperatures and seeds. Reads only device tensors, so it can be captured."""
        return sample_filtered(
            logits_NV,
            self.state.sampling_SF[row_idx_N],
            seed_R=self.state.seed_S[row_idx_N],
            pos_R=self.state.pos_S[row_idx_N] + (1 if num_N is None else num_N),
        )

    def choose_and_advance(
        self, row_idx_R: Tensor, logits_RV: Tensor, num_R: Tensor | None = None
    ) -> Tensor:
        token_R = self.choose(row_idx_R, logits_RV, num_R)
        advance(self.state, row_idx_R, token_R, num_R)
        return token_R

    def sample(
        self,
        sampling: SamplingMetadata,
        row_idx_R: Tensor,
        logits_RV: Tensor,
        num_R: Tensor | None = None,
    ) -> Tensor:
        """Choose token_R as `sampling` describes, advance the state and record the tokens.

        The order is that of vLLM: edits and masks, penalties, temperature and filters. Forbidden
        tokens are in the masks.
        """
        return self._sample(kind_of(sampling), row_idx_R, logits_RV, num_R)

    def _sample(
        self, kind: Kind, row_idx_R: Tensor, logits_RV: Tensor, num_R: Tensor | None = None
    ) -> Tensor:
        """The part of `sample` that does not need the host."""
        token_R = self._choose(kind, row_idx_R, logits_RV, num_R)
        advance(self.state, row_idx_R, token_R, num_R)
        return token_R

    def _choose(
        self,
        kind: Kind,
        row_idx_N: Tensor,
        logits_NV: Tensor,
        num_N: Tensor | None = None,
        *,
        verifies: bool = False,
    ) -> Tensor:
        """`_sample` without advancing the state. A row with edits or penalties chooses one token;
        what is recorded of other rows has no meaning."""
        if kind.has_edits:
            logits_NV = self.edits.edit(row_idx_N, logits_NV)
        if kind.has_masks:
            num = num_N if verifies else None
            logits_NV = self.masks.apply_token_bitmask(row_idx_N, logits_NV, num)
        if kind.has_penalties:
            logits_NV = self._penalize(row_idx_N, logits_NV)
        if kind.has_filters:
            token_N = self.choose(row_idx_N, logits_NV, num_N)
        else:
            token_N = choose(self.state, row_idx_N, logits_NV, num_N)
        if kind.has_edits:
            self.edits.append(row_idx_N, token_N)
        if kind.has_penalties:
            self._count(row_idx_N, token_N)
        return token_N

    def _penalize(self, row_idx_R: Tensor, logits_RV: Tensor) -> Tensor:
        counts_SV, in_prompt_SV = self._tables()
        strengths = self.state.sampling_SF[row_idx_R, REPETITION:].split(1, dim=1)
        return penalize(
            logits_RV, Penalties(counts_SV[row_idx_R], in_prompt_SV[row_idx_R], *strengths)
        )

    def _count(self, row_idx_R: Tensor, token_R: Tensor) -> None:
        counts_SV, _ = self._tables()
        one_R = torch.ones_like(token_R, dtype=counts_SV.dtype)
        place_R = row_idx_R * self.vocab_size + token_R.clamp(min=0)  # NO_TOKEN ends a request
        counts_SV.view(-1).scatter_add_(0, place_R, one_R)

    def _tables(self) -> tuple[Tensor, Tensor]:
        if self._output_count_SV is None or self._in_prompt_SV is None:
            shape, device = (self.state.token_S.shape[0], self.vocab_size), self.platform.device
            counts_SV = torch.zeros(shape, dtype=torch.int32, device=device)
            self._in_prompt_SV = torch.zeros(shape, dtype=torch.bool, device=device)
            self._output_count_SV = counts_SV
        return self._output_count_SV, self._in_prompt_SV
