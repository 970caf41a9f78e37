"""Launches the steps that plans describe, and does not wait for them.

`device_owner.py` has what they run on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanovllm.models.experts import offloaded
from nanovllm.runner.async_output import AsyncOutput
from nanovllm.runner.device_graphs import PrefillStep
from nanovllm.runner.device_owner import DeviceOwner
from nanovllm.runner.encoders import MMItem
from nanovllm.runner.graph_cache import GraphCache
from nanovllm.runner.mm_embeds import fill
from nanovllm.runner.no_grad import in_group, without_grad
from nanovllm.runner.persistent import Form
from nanovllm.runner.sampling import LogprobCopies, copy_logprobs, read_logprobs
from nanovllm.runner.state import Span
from nanovllm.runner.state_update import write
from nanovllm.runner.steps import ALONE
from nanovllm.schedule.plan import DraftReading, LogitEdits, PromptLogprobs, StepPlan


class Runner(DeviceOwner):
    """One rank's part of the device's work. On several ranks all must call the same methods."""

    @in_group
    def launch(self, plan: StepPlan) -> AsyncOutput:
        """Start a step; returns at once on devices that work asynchronously.

        Raises ValueError for an adapter if the model has none.
        """
        if not self.residents_are_known:
            self._reset_residents()
        write(plan, self.state, self.sampler, self.platform)
        self.adapters.note(plan.settings)
        for one in plan.adapters:
            self.adapters.load(*one)
        if plan.restores:
            self.snapshots.restore(plan.restores, self.platform)
        if plan.is_prefill:
            launched = self._prefill(plan)
            self.embeddings.trim()
            if plan.snapshots:
                self.snapshots.save(plan.snapshots, self.platform)
            return self._with_drafts(launched)
        if plan.drafts.readings:
            self._read(plan.drafts.readings)
        launched = self._verify(plan) if len(plan.token_T) else self._decode(plan)
        return self._with_drafts(launched)

    def _with_drafts(self, launched: AsyncOutput) -> AsyncOutput:
        """The output, with the drafts that the step has left of rows whose masks the host computes.
        Such a row waits for its tokens anyway, and these come with them."""
        plan, draft_SK = launched.plan, self.state.draft_SK
        if draft_SK is None or not plan.sampling.masked or plan.drafts.rests:
            return launched
        rows = [plan.rows[row] for row in plan.sampling.masked]
        row_M = self.platform.upload(rows, torch.int64)
        drafts = self.platform.read_back(draft_SK.index_select(0, row_M))
        return replace(launched, drafts=drafts)

    def _read(self, readings: Sequence[DraftReading]) -> None:
        """Let the second model read tokens, op by op."""
        token_T = np.concatenate([one.token_ids for one in readings])
        rows, nums = [one.row for one in readings], [len(one.token_ids) for one in readings]
        bucket = self.layout.prefill_bucket(len(token_T), len(rows))
        arrays = self.buckets.span_arrays(rows, nums, token_T, *bucket)
        starts = np.zeros(bucket[1], np.int64)
        starts[: len(rows)] = [one.start for one in readings]
        row_idx_R, num_tokens_R, token_T_, start_R = (
            self.platform.upload(one, torch.int64) for one in (*arrays, starts)
        )
        self.steps.read(Span(row_idx_R, num_tokens_R, token_T_), start_R)

    def _reset_residents(self) -> None:
        self.platform.synchronize()
        for one in self.offloaded:
            offloaded.reset(one)
        self.residents_are_known = True

    @without_grad
    def prepare(
        self,
        edits: LogitEdits | None = None,
        *,
        has_penalties: bool = False,
        has_masks: bool = False,
    ) -> None:
        """Allocate what a request with these edits, with penalties or with masks needs.

        Call it before the request is queued, so that no step must allocate. Raises ValueError for
        edits that do not fit, and torch.OutOfMemoryError. Nothing has changed then.
        """
        self.sampler.prepare(edits, has_penalties, has_masks)

    def check_adapter(self, adapter_id: int, folder: Path) -> bytes:
        """Check an adapter's files; returns their digest. Raises ValueError."""
        return self.adapters.check(adapter_id, folder)

    def read_adapter(self, adapter_id: int) -> None:
        """Begin to read a checked adapter to host memory, for plans that load it."""
        self.adapters.read(adapter_id)

    def adapter_is_read(self, adapter_id: int) -> bool:
        """Raises ValueError if it cannot be read."""
        return self.adapters.is_read(adapter_id)

    def wait_for_adapters(self, seconds: float) -> bool:
        """Wait up to so long until an adapter that is being read is in host memory. False if none
        is being read."""
        return self.adapters.wait(seconds)

    def drop_adapter(self, adapter_id: int) -> None:
        """Free an adapter's host memory. No plan that loads it follows."""
        self.adapters.drop(adapter_id)

    def add_embeddings(self, key: str, embeds: Tensor) -> None:
        """Keep embeddings [n, D] on the device for plans that name them, until they are dropped."""
        if self.steps.whole and not self.model.takes_embeddings:
            raise ValueError(
                "embeddings are not supported: where a step is one program, only models with "
                "encoders have programs that take them: use enforce_eager=True"
            )
        self.embeddings.give(key, embeds.to(self.platform.device, self.model_dtype))

    def encode(self, media: Mapping[str, MMItem]) -> None:
        """Compute the embeddings of images, videos or clips, and keep them under these keys for the
        next step at least. Does not wait for the device."""
        self.towers.encode(media)

    def check_ranks(self) -> None:
        """Raise the failure of the other ranks, if there are any and they have failed."""

    def call_on_failure(self, callback: Callable[[Exception], None]) -> None:
        """See `WorkerGroup.call_on_failure`. Without other ranks nothing fails alone."""

    def drop_embeddings(self, keys: Iterable[str]) -> None:
        """Drop embeddings that `add_embeddings` has added."""
        self.embeddings.drop(keys)

    def forget_encoded(self, keys: Iterable[str]) -> None:
        """Drop embeddings that `encode` has computed, on this rank."""
        self.embeddings.forget(keys)

    def _buckets_of(self, plan: StepPlan) -> GraphCache:
        """The steps of a plan, without slots if no row has an adapter."""
        if self.plain_buckets is None or self.adapters.has_any(plan.rows):
            return self.buckets
        return self.plain_buckets

    def _launched(
        self,
        plan: StepPlan,
        tokens: Tensor,
        logprobs: LogprobCopies | None = None,
        prompt_logprobs: list[list[LogprobCopies]] | None = None,
        counts: Tensor | None = None,
    ) -> AsyncOutput:
        read_back = self.platform.read_back
        counts_copy = None if counts is None else read_back(counts)
        return AsyncOutput(plan, read_back(tokens), counts_copy, logprobs, prompt_logprobs or [])

    def _logprobs(self, plan: StepPlan, logits_RV: Tensor, token_R: Tensor) -> LogprobCopies | None:
        num_top = plan.sampling.num_logprobs
        if num_top is None:
            return None
        return copy_logprobs(self.platform, logits_RV, token_R, num_top, len(plan.rows))

    def _decode(self, plan: StepPlan) -> AsyncOutput:
        step = self._buckets_of(plan).decode(
            self.layout.decode_bucket(len(plan.rows)), rests=plan.drafts.rests
        )
        step.fill(plan.rows)
        self.announce(plan.seq_lens, step.row_idx_R.shape[0])
        if plan.sampling.is_plain:
            step.replay()
        elif not plan.sampling.needs_host and not self.steps.whole:
            step.replay_with(self.sampler.variant(plan.sampling))
        else:
            with ALONE if plan.drafts.rests else self.steps.proposing(step.row_idx_R):
                logits_RV = step.logits()
                token_R = self.sampler.sample(plan.sampling, step.row_idx_R, logits_RV)
            logprobs = self._logprobs(plan, logits_RV, token_R)
            return self._checked(self._launched(plan, token_R, logprobs), Form(len(step.row_idx_R)))
        return self._checked(self._launched(plan, step.token_R), Form(len(step.row_idx_R)))

    def _checked(self, launched: AsyncOutput, form: Form) -> AsyncOutput:
        """The output, which raises an error if the step is one kernel and has failed."""
        persistent = self.steps.persistent
        if persistent is None:
            return launched
        check = persistent.check_later(form, self.platform.read_back)
        return launched if check is None else replace(launched, check=check)

    def announce(self, seq_lens: list[int], num_rows: int) -> None:
        """Pass the lengths of a decode step's rows to a platform that needs them on the host. The
        other rows of the bucket are padding."""
        if self.platform.traits.wants_lengths:
            self.platform.announce(seq_lens + [1] * (num_rows - len(seq_lens)))

    def _verify(self, plan: StepPlan) -> AsyncOutput:
        num = max(plan.tokens_per_row, 1 + plan.drafts.room)
        num_rows, num = self.layout.verify_bucket(len(plan.rows), num)
        step = self._buckets_of(plan).verify(num_rows, num)
        arrays = self.buckets.span_arrays(
            plan.rows, plan.num_tokens, plan.token_T, num_rows * num, num_rows
        )
        step.fill(arrays)
        logprobs = None
        if plan.sampling.is_plain:
            step.replay()
        else:
            run = step.accept if self.steps.whole else step.replay_with
            if found := run(self.sampler.variant(plan.sampling)):
                logprobs = read_logprobs(self.platform, found, sum(plan.num_tokens))
        launched = self._launched(plan, step.token_RK, logprobs, counts=step.count_R)
        return self._checked(launched, Form(num_rows * num, has_several=True))

    def _prefill(self, plan: StepPlan) -> AsyncOutput:
        bucket = self.layout.prefill_bucket(len(plan.token_T), len(plan.rows))
        step = self._buckets_of(plan).prefill(*bucket, plan.has_given)
        step.fill(self.buckets.span_arrays(plan.rows, plan.num_tokens, plan.token_T, *bucket))
        if step.given is not None:
            fill(step.given, plan, self.embeddings, self.platform)
        if plan.sampling.is_plain and not plan.prompt_logprobs:
            step.replay()
            return self._launched(plan, step.token_R)
        with self.steps.proposing(step.span):
            return self._prefill_edited(plan, step, bucket[1])

    def _prefill_edited(self, plan: StepPlan, step: PrefillStep, group: int) -> AsyncOutput:
        """A prefill step with another sampler, or with log-probabilities of prompts."""
        prompt_logprobs: list[list[LogprobCopies]] = []
        if plan.prompt_logprobs:
            hidden = step.hidden()
            prompt_logprobs = [
                self._prompt_logprobs(one, partial(step.logits_at, hidden), group)
                for one in plan.prompt_logprobs
            ]
            logits_RW = step.logits_at(hidden, hidden.last_R)
            if plan.sampling.is_plain:
                return self._launched(plan, step.sample(logits_RW), None, prompt_logprobs)
            logits_RV = self.steps.gathered(logits_RW)
        else:
            logits_RV = step.logits()
        rows = step.span.row_idx_R, logits_RV, step.span.num_tokens_R
        token_R = self.sampler.sample(plan.sampling, *rows)
        logprobs = self._logprobs(plan, logits_RV, token_R)
        return self._launched(plan, token_R, logprobs, prompt_logprobs)

    def _prompt_logprobs(
        self, wanted: PromptLogprobs, logits_at: Callable[[Tensor], Tensor], group: int
    ) -> list[LogprobCopies]:
        """Log-probabilities of prompt tokens, as many at a time as the head's program takes.
        `logits_at` gives the logits after tokens of the step."""
        found: list[LogprobCopies] = []
        for first in range(0, len(wanted.token_ids), group):
            token_ids = wanted.token_ids[first : first + group]
            index = [wanted.start + first + min(i, len(token_ids) - 1) for i in range(group)]
            following = token_ids + [0] * (group - len(token_ids))
            index_R = self.platform.upload(index, torch.int64)
            logits_RV = self.steps.gathered(logits_at(index_R))
            token_R = self.platform.upload(following, torch.int64)
            found.append(
                copy_logprobs(self.platform, logits_RV, token_R, wanted.num_top, len(token_ids))
            )
        return found
