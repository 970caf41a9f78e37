"""Owns everything on the device: weights, cache, state, programs, captured steps.

It launches the steps that plans describe and does not wait for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.compile.program import Compiler
from nanovllm.compile.trace import tensors
from nanovllm.kernels.collectives import Communicator
from nanovllm.models import shards
from nanovllm.models.experts import offloaded
from nanovllm.models.experts.offloaded import Offloaded
from nanovllm.models.layer_state import LayerState, Recurrent, recurrent_bytes
from nanovllm.models.model import Model, Params
from nanovllm.models.rope import rotary_table
from nanovllm.models.shards import Shard
from nanovllm.platforms.base import MemoryBudget, Platform
from nanovllm.platforms.regions import Place, Region
from nanovllm.runner import vocab_parallel
from nanovllm.runner.adapter_store import AdapterStore
from nanovllm.runner.allocation import allocate
from nanovllm.runner.async_output import AsyncOutput
from nanovllm.runner.device_graphs import DecodeStep, PrefillStep, VerifyStep
from nanovllm.runner.draft import DraftParts
from nanovllm.runner.embeddings import Embeddings
from nanovllm.runner.encoders import Encoders, MMItem
from nanovllm.runner.graph_cache import Captures, GraphCache
from nanovllm.runner.mm_embeds import MMEmbedInputs, fill
from nanovllm.runner.no_grad import in_group, without_grad
from nanovllm.runner.persistent import PersistentSteps
from nanovllm.runner.sampling import LogprobCopies, Sampler, copy_logprobs, read_logprobs
from nanovllm.runner.sleep import Sleeper
from nanovllm.runner.spec import EngineSpec
from nanovllm.runner.state import Span, new_state
from nanovllm.runner.state_update import write
from nanovllm.runner.step_regions import Table
from nanovllm.runner.steps import ALONE, Steps
from nanovllm.schedule.plan import DraftReading, LogitEdits, PromptLogprobs, StepPlan


class Runner:
    """One rank's part of the device's work. On several ranks all must call the same methods."""

    def __init__(
        self,
        model: Model,
        params: Params,
        spec: EngineSpec,
        platform: Platform,
        compiler: Compiler,
        *,
        capture: bool = True,
        group: Communicator | None = None,
    ) -> None:
        self.model, self.params, self.spec, self.group = model, params, spec, group
        draft = spec.draft
        self.cfg, self.layout = cfg, layout = model.config, spec.layout
        self.platform, self.compiler = platform, compiler
        is_graph = capture and compiler.lowering is not None
        self._captures = Captures.of(platform, spec, is_graph=is_graph)
        self.state = new_state(
            layout.max_num_seqs,
            layout.blocks_per_row,
            platform.device,
            num_groups=len(model.page_groups.groups),
            has_adapters=model.lora is not None,
            num_drafts=0 if draft is None else draft.proposer.num,
            lookup_lens=(0, 0) if draft is None else draft.lookup_lens(layout.max_model_len),
        )
        shard = shards.ALL if group is None else Shard(group.rank, group.size)
        self.adapters = AdapterStore(model, params, platform, shard)
        self._draft = None if draft is None else DraftParts(spec, params, self.state, cfg)
        self.cos_sin_MH, *others = (
            rotary_table(*rope, layout.max_model_len, platform.device, cfg.head_dim)
            for rope in cfg.ropes
        )
        self.other_tables = tuple(map(Table, others))
        kept = cfg.vocab_size, cfg.dtype, layout.num_places
        self.sampler = Sampler(platform, self.state, *kept)
        self.model_dtype = cfg.dtype
        self.embeddings = Embeddings(spec.embedding_cache_bytes)
        self._given: MMEmbedInputs | None = None
        if model.takes_embeddings:
            self._given = MMEmbedInputs(cfg, platform, layout.prefill_tokens[-1])
        self.towers = Encoders(model, params, platform, compiler, layout, self.embeddings)
        self._scales = [self._kv_scales(*one) for one in zip(model.kept, params.layers)]
        # False: an interrupted step may have changed the tables of resident experts but not their
        # weights
        self.residents_are_known = True
        self.graphs_bytes = 0  # device memory that capturing steps took
        self.cache_region = Region(platform.device)
        # A small cache until its size is known. If programs contain it, none are built.
        first = Compiler(None) if platform.traits.whole_steps else compiler
        self.steps = self._make_steps(2, first)
        self.buckets, self.plain_buckets = self._make_buckets()

    @property
    def block_bytes(self) -> int:
        layout = self.layout
        num_bytes = self.model.page_groups.block_bytes(layout.block_size, self.spec.cache_dtype)
        if self.spec.draft is not None:
            num_bytes += self.spec.draft.kv_bytes_per_token * layout.block_size
        return num_bytes

    @property
    def rests(self) -> bool:
        """Whether plain decode steps run without the proposer."""
        return self.spec.draft is not None and self.spec.draft.rests

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of all slots for snapshots of rows' states."""
        return self.spec.snapshot_slots * recurrent_bytes(self.model.kept, self.cfg.dtype)

    @property
    def weights_bytes(self) -> int:
        """Bytes of weights on the device, with buffers for experts."""
        # the head may be the embedding table
        unique = {tensor.data_ptr(): tensor.nbytes for tensor in tensors(self.params)}
        return sum(unique.values()) - self.host_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of experts in host memory."""
        return sum(one.num_experts * one.expert_bytes for one in self.offloaded)

    @property
    def offloaded(self) -> list[Offloaded]:
        """The experts of layers whose experts are in the host's memory."""
        stored = (getattr(layer, "experts", None) for layer in self.params.layers)
        return [one for one in stored if isinstance(one, Offloaded)]

    def sleeper(self, weights: Region, reload: Callable[[Place], object]) -> Sleeper:
        """What puts these weights and the cache to sleep."""
        return Sleeper(weights, self.cache_region, reload)

    def expert_counts(self) -> list[int]:
        """The counters of all layers together, in the order of `COUNTERS`. Waits for the device."""
        counters = torch.stack([one.counters_C for one in self.offloaded])
        return self.platform.read_back(counters.sum(0)).tolist()

    @in_group
    def measure_budget(self, utilization: float) -> MemoryBudget:
        """Run the largest prefill step and the largest call of each encoder once. Returns the
        memory left after them, the weights and the cache of embeddings."""
        self.platform.reset_peak()
        self.run_bucket("prefill", self.layout.prefill_tokens[-1])
        self.towers.run_largest()
        self.platform.synchronize()
        budget = self.platform.memory_budget(utilization)
        kept_bytes = self.spec.embedding_cache_bytes + self.snapshot_bytes
        return replace(budget, allowance_bytes=budget.allowance_bytes - kept_bytes)

    def allocate_cache(self, num_blocks: int) -> None:
        """Allocate zeroed cache blocks; the state's block tables refer to them by number."""
        self._close_buckets()
        del (
            self.steps,
            self.buckets,
            self.plain_buckets,
        )  # with the states of rows, which take more than two blocks
        self.cache_region = self.platform.region()
        self.steps = self._make_steps(num_blocks, self.compiler)
        self.buckets, self.plain_buckets = self._make_buckets()

    def smallest(self, value: int) -> int:
        """The smallest of the ranks' numbers."""
        return value if self.group is None else self.group.min_int(value)

    @in_group
    def warm_up(self, progress: Callable[[str], object]) -> None:
        """Build, run and capture the steps of every bucket, and seal the compiler."""
        if not self.layout.pad:
            return
        self.platform.synchronize()
        used_bytes = self.platform.used_bytes()
        # from the largest down: captured steps share one memory pool, and the first one sizes it
        for num_tokens in reversed(self.layout.prefill_tokens):
            progress(f"prefill {num_tokens}")
            for buckets, has_given in product(self.all_buckets, self.buckets.variants):
                buckets.prefill(*self.layout.prefill_bucket(num_tokens, 1), has_given)
        for num_rows in reversed(self.layout.decode_rows):
            progress(f"decode {num_rows}")
            for buckets in self.all_buckets:
                buckets.decode(num_rows, rests=self.rests)
                for num in self.layout.verify_tokens:
                    buckets.verify(num_rows, num)
        self.towers.warm_up(self._captures.tower, progress)
        vocab_parallel.warm_up(self.cfg, self.layout.logits_rows, self.platform.device)
        self.sampler.warm_up()
        self.platform.synchronize()
        self.graphs_bytes = self.platform.used_bytes() - used_bytes
        self.compiler.seal()

    @in_group
    def run_bucket(self, kind: str, size: int) -> None:
        """Build and run the programs of one bucket on padding, and capture nothing.

        `kind` is "prefill" with a size in tokens, "vision" with one in patches, "audio" with one in
        chunks, or "decode" with one in rows.
        """
        if kind == "prefill":
            for step in chain.from_iterable(one.padding(size) for one in self.all_buckets):
                step.launch()
                step.build_hidden()
                vocab_parallel.warm_up(self.cfg, [len(step.token_R)], self.platform.device)
        elif kind in self.towers:
            self.towers.run_bucket(kind, size)
        else:
            row_idx_R = torch.full((size,), self.state.pad_row, device=self.platform.device)
            for steps in self.all_steps:
                with ALONE if self.rests else steps.proposing(row_idx_R):
                    steps.decode(row_idx_R)
                for num in self.layout.verify_tokens:
                    VerifyStep(steps, self.platform, size, num).launch()
            if size == self.layout.decode_rows[0]:  # once: its kernels are the same for all
                self.sampler.warm_up()
        self.platform.synchronize()

    @in_group
    def decode_uncaptured(
        self, num_rows: int, watch: AbstractContextManager[object], rows: Sequence[int] = ()
    ) -> None:
        """Launch a bucket's decode step of rows op by op under `watch`. For profiling.

        Requests are not affected: it writes the keys and values that their next step writes too,
        and the state is restored.
        """
        step = self.buckets.decode(num_rows, rests=self.rests)
        step.fill(list(rows))
        with self.steps.restoring_state(), self.snapshots.restoring(step.row_idx_R), watch:
            step.launch()

    def close(self) -> None:
        """Drop everything that holds device memory."""
        self.platform.synchronize()
        self._close_buckets()
        self.embeddings.clear()
        tables = ("cos_sin_MH", "other_tables")
        self._given = None
        self.towers.by_name.clear()
        self.adapters.close()
        parts = ("steps", "snapshots", "params", "state", "sampler", "compiler", "_draft")
        for name in (*parts, *tables):
            self.__dict__.pop(name, None)
        self.cache_region.close()
        self.platform.release()

    def _kv_scales(self, kept: LayerState, weights: Any) -> tuple[Tensor, ...]:
        """The scales of one layer's fp8 cache."""
        if self.spec.cache_dtype is not torch.float8_e4m3fn or isinstance(kept, Recurrent):
            return ()
        assert self.model.kv_scales is not None
        return self.model.kv_scales(self.cfg, weights)

    def _make_steps(self, num_blocks: int, compiler: Compiler) -> Steps:
        made = allocate(self.model, num_blocks, self.spec, self.cache_region, self._scales)
        caches, self.snapshots = made
        whole = self.platform.traits.whole_steps and compiler.lowering is not None
        return Steps(
            model=self.model,
            attention=self.spec.attention,
            params=self.params,
            caches=caches,
            cos_sin_MH=self.cos_sin_MH,
            other_tables=self.other_tables,
            state=self.state,
            compiler=compiler,
            whole=whole,
            verifies_rows=self.platform.traits.verifies_rows,
            synthetic_rate=None if self.spec.draft is None else self.spec.draft.synthetic_rate,
            predicts=self.spec.offload is not None and self.spec.offload.predicts,
            persistent=PersistentSteps(self.platform.device) if self.spec.persistent else None,
            drafting=(
                None
                if self._draft is None
                else self._draft.drafting(num_blocks, self.cache_region.zeros, compiler)
            ),
        )

    @property
    def all_steps(self) -> list[Steps]:
        """The steps, and of a model with slots for adapters those of rows without one. Where a step
        is one program there is no second set, since it takes long to compile."""
        if self.model.lora is None or self.steps.whole:
            return [self.steps]
        return [self.steps, self.steps.without_adapters]

    @property
    def all_buckets(self) -> list[GraphCache]:
        return list(filter(None, (self.buckets, self.plain_buckets)))

    def _make_buckets(self) -> tuple[GraphCache, GraphCache | None]:
        """The steps of all rows and, if there are others, those of rows without adapters."""
        rest = (self.platform, self.layout, self._captures, self._given)
        first, *others = (GraphCache(steps, *rest) for steps in self.all_steps)
        return first, others[0] if others else None

    def _close_buckets(self) -> None:
        for buckets in self.all_buckets:
            buckets.close()

    def _buckets_of(self, plan: StepPlan) -> GraphCache:
        """The steps of a plan, without slots if no row has an adapter."""
        if self.plain_buckets is None or self.adapters.has_any(plan.rows):
            return self.buckets
        return self.plain_buckets

    # steps ------------------------------------------------------------------------------------

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

    def wait_for_adapters(self, seconds: float) -> None:
        """Wait up to so long until an adapter that is being read is in host memory."""
        self.adapters.wait(seconds)

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

    def drop_embeddings(self, keys: Iterable[str]) -> None:
        """Drop embeddings that `add_embeddings` has added."""
        self.embeddings.drop(keys)

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
            return self._checked(self._launched(plan, token_R, logprobs), step)
        return self._checked(self._launched(plan, step.token_R), step)

    def _checked(self, launched: AsyncOutput, step: DecodeStep) -> AsyncOutput:
        """The output, which raises an error if the step is one kernel and has failed."""
        persistent = self.steps.persistent
        if persistent is None:
            return launched
        check = persistent.check_later(step.row_idx_R.shape[0], self.platform.read_back)
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
        return self._launched(plan, step.token_RK, logprobs, counts=step.count_R)

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
