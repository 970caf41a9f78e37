"""The sampler for requests that want more than a temperature: filters, penalties, forbidden tokens, log-probabilities.

Decode steps with filters alone are recorded with them. All else runs op by op between captured parts, on the logits of a
whole bucket; plain requests never wait for it unless they share a batch with one that needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.platforms.base import HostCopy, Platform, Rehearsal
from nanovllm.runner import sampling as sampler
from nanovllm.runner.state import SAMPLING_FIELDS, DeviceState, advance
from nanovllm.schedule.request import Request

TOP_P, MIN_P, TOP_K = (SAMPLING_FIELDS.index(name) for name in ("top_p", "min_p", "top_k"))


def needs_filtering(request: Request) -> bool:
    """Whether this request's next token is beyond the plain sampler."""
    return not request.params.is_plain or _min_tokens_hold(request)


def filters_suffice(request: Request) -> bool:
    """Whether all that is asked of this request's next token lies in the state."""
    params = request.params
    return not (params.has_penalties or params.logprobs is not None or _min_tokens_hold(request))


def _min_tokens_hold(request: Request) -> bool:
    # the token now being sampled is already counted as in flight
    return request.num_scheduled_outputs - 1 < request.params.min_tokens


@dataclass(frozen=True)
class LogprobCopies:
    """Log-probabilities on their way to the host."""

    chosen: HostCopy
    top: HostCopy
    top_token: HostCopy

    def rows(self) -> list[tuple[float, list[float], list[int]]]:
        """(the token's own, the likeliest ones', their ids) per row."""
        return list(zip(self.chosen.tolist(), self.top.tolist(), self.top_token.tolist()))


def copy_logprobs(platform: Platform, values: sampler.Logprobs) -> LogprobCopies:
    return LogprobCopies(*(platform.read_back(value) for value in values))


class FilteredSampler:
    """Owns the token counts that penalties need; they are allocated when the first such request comes."""

    def __init__(
        self, platform: Platform, state: DeviceState, vocab_size: int, dtype: torch.dtype
    ) -> None:
        """`dtype` is that of the model's logits; after penalties they are fp32."""
        self.platform, self.state, self.vocab_size = platform, state, vocab_size
        self._dtypes = dict.fromkeys((dtype, torch.float32))
        self._output_count_SV: Tensor | None = None
        self._in_prompt_SV: Tensor | None = None

    def warm_up(self) -> None:
        """Have what chooses loaded: the first request that wants it is not to wait."""
        pad_row_1 = torch.full((1,), self.state.pad_row, device=self.platform.device)
        for dtype in self._dtypes:
            self.choose(
                pad_row_1, torch.zeros(1, self.vocab_size, dtype=dtype, device=self.platform.device)
            )

    def rehearse(self, rehearsal: Rehearsal) -> None:
        """Call the ops of `warm_up` with fake tensors."""
        for dtype in self._dtypes:
            with rehearsal.mode:
                one_1 = torch.ones(1, device=self.platform.device)
                logits_1V = torch.ones(1, self.vocab_size, dtype=dtype, device=self.platform.device)
            sampler.rehearse_filtered(rehearsal.visit, logits_1V, one_1)

    def admit(self, requests: Sequence[Request]) -> None:
        """Set the counts of rows that now belong to requests with penalties, from their prompts and known outputs."""
        for request in requests:
            if not request.params.has_penalties:
                continue
            counts_SV, in_prompt_SV = self._tables()
            counts_SV[request.row] = 0
            in_prompt_SV[request.row] = False
            in_prompt_SV[request.row, self.platform.upload(request.prompt_ids, torch.int64)] = True
            if request.output_ids:
                output = self.platform.upload(request.output_ids, torch.int64)
                counts_SV[request.row].index_add_(
                    0, output, torch.ones_like(output, dtype=counts_SV.dtype)
                )

    def choose(self, row_idx_R: Tensor, logits_RV: Tensor) -> Tensor:
        """token_R by the rows' filters, temperatures and seeds, and the state advanced; it knows no request, so it can be
        recorded."""
        fields_RF = self.state.sampling_SF[row_idx_R]
        token_R = sampler.sample_filtered(
            logits_RV,
            temperature_R=fields_RF[:, 0],
            top_k_R=fields_RF[:, TOP_K],
            top_p_R=fields_RF[:, TOP_P],
            min_p_R=fields_RF[:, MIN_P],
            seed_R=self.state.seed_S[row_idx_R],
            pos_R=self.state.pos_S[row_idx_R] + 1,
        )
        advance(self.state, row_idx_R, token_R)
        return token_R

    def sample(
        self, requests: Sequence[Request], row_idx_R: Tensor, logits_RV: Tensor
    ) -> tuple[Tensor, LogprobCopies | None]:
        """Choose token_R for a bucket whose first rows are `requests`, advance the state, count the tokens."""
        adjusted_RV = self._forbid(requests, self._penalize(requests, row_idx_R, logits_RV))
        token_R = self.choose(row_idx_R, adjusted_RV)
        if any(request.params.has_penalties for request in requests):
            counts_SV, _ = self._tables()
            one = torch.ones_like(token_R, dtype=counts_SV.dtype)
            counts_SV.index_put_((row_idx_R, token_R), one, accumulate=True)
        wanted = [
            request.params.logprobs for request in requests if request.params.logprobs is not None
        ]
        if not wanted:
            return token_R, None
        num_top = min(max(wanted), self.vocab_size)
        return token_R, copy_logprobs(self.platform, sampler.logprobs(logits_RV, token_R, num_top))

    def _penalize(
        self, requests: Sequence[Request], row_idx_R: Tensor, logits_RV: Tensor
    ) -> Tensor:
        if not any(request.params.has_penalties for request in requests):
            return logits_RV
        counts_SV, in_prompt_SV = self._tables()
        strengths = [
            (p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
            for p in (request.params for request in requests)
        ]
        strengths += [(1.0, 0.0, 0.0)] * (row_idx_R.shape[0] - len(requests))
        repetition_R1, presence_R1, frequency_R1 = self.platform.upload(
            strengths, torch.float32
        ).split(1, dim=1)
        return sampler.penalize(
            logits_RV,
            sampler.Penalties(
                counts_SV[row_idx_R],
                in_prompt_SV[row_idx_R],
                repetition_R1,
                presence_R1,
                frequency_R1,
            ),
        )

    def _forbid(self, requests: Sequence[Request], logits_RV: Tensor) -> Tensor:
        """Before min_tokens, the ids that would end a request are out."""
        pairs = [
            (row, token_id)
            for row, request in enumerate(requests)
            if _min_tokens_hold(request)
            for token_id in request.stop_ids
            if token_id < self.vocab_size
        ]
        if not pairs:
            return logits_RV
        row_idx, token_idx = self.platform.upload(pairs, torch.int64).unbind(1)
        return logits_RV.index_put(
            (row_idx, token_idx), torch.tensor(float("-inf"), device=logits_RV.device)
        )

    def _tables(self) -> tuple[Tensor, Tensor]:
        if self._output_count_SV is None or self._in_prompt_SV is None:
            shape, device = (
                (self.state.token_S.shape[0], self.vocab_size),
                self.state.token_S.device,
            )
            self._output_count_SV = torch.zeros(shape, dtype=torch.int32, device=device)
            self._in_prompt_SV = torch.zeros(shape, dtype=torch.bool, device=device)
        return self._output_count_SV, self._in_prompt_SV
