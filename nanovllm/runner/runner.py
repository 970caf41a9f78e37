"""Owns everything on the device: weights, cache, state, programs, captured steps.

It launches the steps that plans describe and does not wait for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from nanovllm.compile.program import Compiler
from nanovllm.compile.trace import tensors
from nanovllm.kernels import collectives
from nanovllm.kernels.collectives import Communicator
from nanovllm.models.experts import offloaded
from nanovllm.models.experts.offloaded import Offloaded
from nanovllm.models.interface import LayerCache, Model, Params
from nanovllm.models.rope import rotary_table
from nanovllm.platforms import attention
from nanovllm.platforms.base import HostCopy, MemoryBudget, Platform, Replay
from nanovllm.platforms.regions import Region
from nanovllm.runner import columns
from nanovllm.runner.audio_tower import AudioSteps
from nanovllm.runner.captured import DecodeStep, PrefillStep, VerifyStep
from nanovllm.runner.embeddings import Embeddings
from nanovllm.runner.given import GivenInputs, fill
from nanovllm.runner.inputs import SpanArrays, span_arrays
from nanovllm.runner.sampling import LogprobCopies, Sampler, copy_logprobs
from nanovllm.runner.spec import EngineSpec
from nanovllm.runner.state import accept_and_advance, new_state
from nanovllm.runner.steps import Steps, Table
from nanovllm.runner.tower import TowerSteps
from nanovllm.schedule.plan import (
    PAD_BLOCK,
    LogitEdits,
    Logprobs,
    PromptLogprobs,
    StepPlan,
    StepResult,
)


@dataclass(frozen=True)
class Launched:
    """A step on its way to its `StepResult`."""

    plan: StepPlan
    tokens: HostCopy  # [bucket's rows], or [rows, K] with counts
    counts: HostCopy | None
    logprobs: LogprobCopies | None
    prompt_logprobs: list[list[LogprobCopies]]  # parts of each of the plan's
    check: Callable[[], None] = lambda: None  # raises if the result is not one

    def wait(self) -> StepResult:
        """Wait for the device and return what the step brought."""
        found = self.tokens.tolist()
        self.check()
        if self.counts is None:
            tokens = [[one] if wanted else [] for one, wanted in zip(found, self.plan.is_sampled)]
        else:
            counts = self.counts.tolist()[: len(self.plan.rows)]
            tokens = [row[:count] for row, count in zip(found, counts)]
        return StepResult(
            tokens,
            self.logprobs.wait() if self.logprobs is not None else None,
            [_joined([part.wait() for part in parts]) for parts in self.prompt_logprobs],
        )


def _joined(parts: Sequence[Logprobs]) -> Logprobs:
    return Logprobs(*(np.concatenate(values) for values in zip(*parts)))


def _as_it_is(step: Callable[[], None]) -> Replay:
    return step


Args = ParamSpec("Args")
Result = TypeVar("Result")


def _in_group(
    method: Callable[Concatenate[Runner, Args], Result],
) -> Callable[Concatenate[Runner, Args], Result]:
    """A method whose steps communicate with the other ranks, if there are any."""

    @wraps(method)
    def run(self: Runner, /, *args: Args.args, **kwargs: Args.kwargs) -> Result:
        if self.group is None:
            return method(self, *args, **kwargs)
        with collectives.using(self.group):
            return method(self, *args, **kwargs)

    return run


class Encodable(NamedTuple):
    """What a tower makes embeddings of: an image, a video or a clip of sound, as the checkpoint's
    processor gives it. `values` are patches and `grid` their (frames, rows, columns), or mel
    features and their (frames,). `tower` is a key of `Runner.towers`."""

    values: Tensor
    grid: tuple[int, ...]
    tower: str = "vision"


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
        self.cfg, self.layout = cfg, layout = model.config, spec.layout
        self.platform, self.compiler = platform, compiler
        # eager mode shows each op where it runs, so nothing is captured there
        record = platform.capture if capture and compiler.lowering is not None else _as_it_is
        decode, spans = attention.recordable(spec.attention, platform)
        self._capture = record if decode else _as_it_is
        # the host announces lengths for decode steps only
        self._capture_tower = _as_it_is if platform.traits.wants_lengths else record
        self._capture_spans = self._capture_tower if spans else _as_it_is
        self.state = new_state(layout.max_num_seqs, layout.blocks_per_row, platform.device)
        self.cos_sin_MH, *others = (
            rotary_table(*rope, layout.max_model_len, platform.device, cfg.head_dim)
            for rope in cfg.ropes
        )
        self.other_tables = tuple(map(Table, others))
        self.sampler = Sampler(platform, self.state, cfg.vocab_size, cfg.dtype)
        self.model_dtype = cfg.dtype
        self.embeddings = Embeddings(spec.embedding_cache_bytes)
        # Without programs that take embeddings, the rare steps that have some get new memory.
        self._given: GivenInputs | None = None
        if model.takes_embeddings:
            self._given = GivenInputs(cfg, platform, layout.prefill_tokens[-1])
        self.towers: dict[str, TowerSteps | AudioSteps] = {}
        whole = platform.traits.whole_steps
        if model.tower is not None:
            self.towers["vision"] = TowerSteps(
                model.tower, params.tower, platform, compiler, layout.vision_patches, whole
            )
        if model.audio_tower is not None:
            # its regions are programs of their own, which such platforms cannot have
            own = Compiler(None) if whole else compiler
            self.towers["audio"] = AudioSteps(
                model.audio_tower, params.audio_tower, platform, own, layout.audio_chunks
            )
        self._scales: list[tuple[Tensor, ...]] = [() for _ in params.layers]
        if spec.cache_dtype is torch.float8_e4m3fn:
            assert model.kv_scales is not None
            self._scales = [model.kv_scales(cfg, layer) for layer in params.layers]
        # False: a step that was interrupted has perhaps changed the tables of resident experts and
        # not their weights
        self.residents_are_known = True
        self.graphs_bytes = 0  # device memory that capturing steps took
        self._decode_steps: dict[int, DecodeStep] = {}
        # by tokens, and whether embeddings are given
        self._prefill_steps: dict[tuple[int, bool], PrefillStep] = {}
        self._verify_steps: dict[tuple[int, int], VerifyStep] = {}
        self.cache_region = Region(platform.device)
        # A small cache until its size is known. If programs contain it, none are built.
        first = Compiler(None) if platform.traits.whole_steps else compiler
        self.steps = self._make_steps(2, first)

    @property
    def block_bytes(self) -> int:
        return self.model.kv_bytes_per_token(self.spec.cache_dtype) * self.layout.block_size

    @property
    def weights_bytes(self) -> int:
        """Bytes of weights on the device, with buffers for experts."""
        # the head may be the embedding table
        unique = {tensor.data_ptr(): tensor.nbytes for tensor in tensors(self.params)}
        return sum(unique.values()) - self.host_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of experts in the host's memory."""
        return sum(one.num_experts * one.expert_bytes for one in self.offloaded)

    @property
    def offloaded(self) -> list[Offloaded]:
        """The experts of layers whose experts are in the host's memory."""
        stored = (getattr(layer, "experts", None) for layer in self.params.layers)
        return [one for one in stored if isinstance(one, Offloaded)]

    def expert_counts(self) -> list[int]:
        """The counters of all layers together, in the order of `COUNTERS`. Waits for the device."""
        counters = torch.stack([one.counters_C for one in self.offloaded])
        return self.platform.read_back(counters.sum(0)).tolist()

    @_in_group
    def measure_budget(self, utilization: float) -> MemoryBudget:
        """Run the largest prefill step and call of the tower once; returns the memory that they,
        weights and the cache of embeddings leave."""
        self.platform.reset_peak()
        self.run_bucket("prefill", self.layout.prefill_tokens[-1])
        with torch.no_grad():
            for tower in self.towers.values():
                tower.run_budget(tower.budgets[-1])
        self.platform.synchronize()
        budget = self.platform.memory_budget(utilization)
        kept_bytes = self.spec.embedding_cache_bytes
        return replace(budget, allowance_bytes=budget.allowance_bytes - kept_bytes)

    def allocate_cache(self, num_blocks: int) -> None:
        """Zeroed cache blocks; the state's block tables refer to them by number."""
        self.cache_region = self.platform.region()
        self.steps = self._make_steps(num_blocks, self.compiler)

    def smallest(self, value: int) -> int:
        """The smallest of the ranks' numbers."""
        return value if self.group is None else self.group.min_int(value)

    @_in_group
    def warm_up(self, progress: Callable[[str], object]) -> None:
        """Build, run and capture the steps of every bucket, and seal the compiler."""
        if not self.layout.pad:
            return
        self.platform.synchronize()
        used_bytes = self.platform.used_bytes()
        # from the largest down: captured steps share one memory pool, and the first one sizes it
        for num_tokens in reversed(self.layout.prefill_tokens):
            progress(f"prefill {num_tokens}")
            for has_given in self._variants:
                self.prefill_step(*self.layout.prefill_bucket(num_tokens, 1), has_given)
        for num_rows in reversed(self.layout.decode_rows):
            progress(f"decode {num_rows}")
            self._decode_step(num_rows)
            for num in self.layout.verify_tokens:
                self._verify_step(num_rows, num)
        with torch.no_grad():
            for name, tower in self.towers.items():
                for budget in reversed(tower.budgets):
                    progress(f"{name} {budget}")
                    tower.run_budget(budget, few=True)
                if isinstance(tower, TowerSteps) and self._capture_tower is not _as_it_is:
                    tower.capture(self._capture_tower)
            columns.warm_up(self.cfg, self.layout.logits_rows, self.platform.device)
            self.sampler.warm_up()
        self.platform.synchronize()
        self.graphs_bytes = self.platform.used_bytes() - used_bytes
        self.compiler.seal()

    @_in_group
    def run_bucket(self, kind: str, size: int) -> None:
        """Build and run the programs of one bucket on padding, and capture nothing.

        `kind` is "prefill" with a size in tokens, "vision" with one in patches, "audio" with one in
        chunks, or "decode" with one in rows.
        """
        with torch.no_grad():
            if kind == "prefill":
                for step in self.padding_steps(size):
                    step.launch()
                    step.build_hidden()
                    columns.warm_up(self.cfg, [len(step.token_R)], self.platform.device)
            elif kind in self.towers:
                self.towers[kind].run_budget(size, few=True)
            else:
                self.steps.decode(
                    torch.full((size,), self.state.pad_row, device=self.platform.device)
                )
                for num in self.layout.verify_tokens:
                    VerifyStep(self.steps, self.platform, size, num).launch()
                if size == self.layout.decode_rows[0]:  # once: its kernels are the same for all
                    self.sampler.warm_up()
        self.platform.synchronize()

    @_in_group
    def decode_uncaptured(
        self, num_rows: int, watch: AbstractContextManager[object], rows: Sequence[int] = ()
    ) -> None:
        """Launch a bucket's decode step of rows op by op under `watch`. For profiling.

        Requests go on as if it had not run: it writes the keys and values that their next step
        writes too, and the state is restored.
        """
        step = self._decode_step(num_rows)
        step.fill(list(rows))
        with torch.no_grad(), self.steps.restoring_state(), watch:
            step.launch()

    def close(self) -> None:
        """Drop everything that holds device memory.

        Captured steps refer to themselves, so reference counting alone would not free them.
        """
        self.platform.synchronize()
        for steps in (self._decode_steps, self._prefill_steps, self._verify_steps):
            for step in steps.values():
                step.__dict__.clear()
            steps.clear()
        self.embeddings.clear()
        tables = ("cos_sin_MH", "other_tables")
        self._given = None
        self.towers.clear()
        for name in ("steps", "params", "state", "sampler", "compiler", *tables):
            self.__dict__.pop(name, None)
        self.cache_region.close()
        self.platform.release()

    def _make_steps(self, num_blocks: int, compiler: Compiler) -> Steps:
        cfg = self.cfg
        shape = (num_blocks, self.layout.block_size, cfg.num_kv_heads, cfg.head_dim)

        def blocks() -> Tensor:
            # memory of its own for each: programs take them as inputs, and inputs must not alias
            return self.cache_region.zeros(shape, self.spec.cache_dtype)

        caches = tuple(LayerCache(blocks(), blocks(), *scales) for scales in self._scales)
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
            predicts=self.spec.offload is not None and self.spec.offload.predicts,
        )

    # steps ------------------------------------------------------------------------------------

    @_in_group
    def launch(self, plan: StepPlan) -> Launched:
        """Start a step; returns at once on devices that work asynchronously.

        Raises ValueError for an adapter, since none can be loaded.
        """
        with torch.no_grad():
            if not self.residents_are_known:
                self._reset_residents()
            self._write(plan)
            if plan.is_prefill:
                launched = self._prefill(plan)
                self.embeddings.trim()
                return launched
            return self._verify(plan) if len(plan.token_T) else self._decode(plan)

    def _reset_residents(self) -> None:
        self.platform.synchronize()
        for one in self.offloaded:
            offloaded.reset(one)
        self.residents_are_known = True

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
        with torch.no_grad():
            self.sampler.prepare(edits, has_penalties, has_masks)

    def add_embeddings(self, key: str, embeds: Tensor) -> None:
        """Keep embeddings [n, D] on the device for plans that name them, until they are dropped."""
        if self.steps.whole and not self.model.takes_embeddings:
            raise ValueError(
                "embeddings are given, but where a step is one program only models with "
                "towers have programs that take them: use enforce_eager=True"
            )
        self.embeddings.give(key, embeds.to(self.platform.device, self.model_dtype))

    def encode(self, media: Mapping[str, Encodable]) -> None:
        """Compute the embeddings of images, videos or clips, and keep them under these keys for the
        next step at least. Does not wait for the device."""
        for name, tower in self.towers.items():
            own = {key: one for key, one in media.items() if one.tower == name}
            if not own:
                continue
            values = torch.cat([one.values for one in own.values()])
            grids = [one.grid for one in own.values()]
            with torch.no_grad():
                features_LGO = tower.features(values, grids)
            sizes = [tower.num_tokens(grid) for grid in grids]
            for key, part_LGO in zip(own, features_LGO.split(sizes, dim=1)):
                embeds = part_LGO.transpose(0, 1).flatten(1).to(self.model_dtype)
                self.embeddings.keep(key, embeds)

    def drop_embeddings(self, keys: Iterable[str]) -> None:
        """Forget those that `add_embeddings` has added."""
        self.embeddings.drop(keys)

    def _write(self, plan: StepPlan) -> None:
        """Write what a step does not derive from the state: rows of new requests, new blocks."""
        state, upload = self.state, self.platform.upload
        if plan.settings:
            rows = plan.settings
            if adapter := next((row.adapter for row in rows if row.adapter), 0):
                raise ValueError(f"adapter {adapter} is not loaded: only 0, none, is")
            tables = np.full((len(rows), state.block_table_SP.shape[1]), PAD_BLOCK, np.int32)
            for table_P, row in zip(tables, rows):
                table_P[: len(row.blocks)] = row.blocks
            numbers = [(row.row, row.pos, row.rope_offset, row.seed) for row in rows]
            row_R, *columns = upload(numbers, torch.int64).unbind(1)
            for target, values in zip((state.pos_S, state.rope_offset_S, state.seed_S), columns):
                target.index_copy_(0, row_R, values)
            sampling_RF = upload([row.sampling for row in rows], torch.float32)
            state.sampling_SF.index_copy_(0, row_R, sampling_RF)
            state.block_table_SP.index_copy_(0, row_R, upload(tables, torch.int32))
            self.sampler.edits.clear(row.row for row in rows)
        if plan.new_blocks:
            row_N, index_N, block_N = upload(plan.new_blocks, torch.int64).unbind(1)
            state.block_table_SP.index_put_((row_N, index_N), block_N.int())
        self.sampler.remember(plan.histories)
        self.sampler.edits.write(plan.edits)
        if plan.allowed_MW is not None:
            masked = [plan.rows[row] for row in plan.choice.masked]
            self.sampler.masks.write(plan.rows, masked, plan.allowed_MW)

    def _launched(
        self,
        plan: StepPlan,
        tokens: Tensor,
        logits_RV: Tensor | None = None,
        prompt_logprobs: list[list[LogprobCopies]] | None = None,
        counts: Tensor | None = None,
    ) -> Launched:
        logprobs, num_top = None, plan.choice.num_logprobs
        if num_top is not None:
            assert logits_RV is not None
            num = len(plan.rows)
            logprobs = copy_logprobs(self.platform, logits_RV, tokens, num_top, num)
        read_back = self.platform.read_back
        counts_copy = None if counts is None else read_back(counts)
        return Launched(plan, read_back(tokens), counts_copy, logprobs, prompt_logprobs or [])

    def _decode_step(self, num_rows: int) -> DecodeStep:
        step = self._decode_steps.get(num_rows)
        if step is None:
            with torch.no_grad():
                step = DecodeStep(self.steps, self.platform, self._capture, num_rows)
            self._decode_steps[num_rows] = step
        return step

    def _decode(self, plan: StepPlan) -> Launched:
        step = self._decode_step(self.layout.decode_bucket(len(plan.rows)))
        step.fill(plan.rows)
        self._announce(plan, step.row_idx_R.shape[0])
        if plan.choice.is_plain:
            step.replay()
        elif not plan.choice.needs_host and not self.steps.whole:
            step.replay_with(self.sampler.variant(plan.choice))
        else:
            logits_RV = step.logits()
            token_R = self.sampler.sample(plan.choice, step.row_idx_R, logits_RV)
            return self._launched(plan, token_R, logits_RV)
        return self._launched(plan, step.token_R)

    def _announce(self, plan: StepPlan, num_rows: int) -> None:
        if self.platform.traits.wants_lengths:
            self.platform.announce(plan.seq_lens + [1] * (num_rows - len(plan.rows)))

    def _verify_step(self, num_rows: int, num: int) -> VerifyStep:
        step = self._verify_steps.get((num_rows, num))
        if step is None:
            step = VerifyStep(self.steps, self.platform, num_rows, num)
            if self.layout.pad:
                with torch.no_grad():
                    step.capture(self._capture_spans)
                self._verify_steps[num_rows, num] = step
        return step

    def _verify(self, plan: StepPlan) -> Launched:
        num_rows, num = self.layout.verify_bucket(len(plan.rows), plan.tokens_per_row)
        step = self._verify_step(num_rows, num)
        arrays = self.span_arrays(
            plan.rows, plan.num_tokens, plan.token_T, num_rows * num, num_rows
        )
        step.fill(arrays)
        if plan.choice.is_plain:
            step.replay()
        else:
            assert plan.choice.state_suffices
            logits_TV, tokens = step.logits()
            chosen_T = self.sampler.choose(tokens.row_T, logits_TV, tokens.num_T)
            step.set(*accept_and_advance(num, self.state, step.span, tokens, chosen_T))
        return self._launched(plan, step.token_RK, counts=step.count_R)

    def prefill_step(self, num_tokens: int, num_rows: int, has_given: bool = False) -> PrefillStep:
        """The step of a bucket; without padding, a new one. With `has_given` embeddings and
        positions are among its inputs."""
        step = self._prefill_steps.get((num_tokens, has_given))
        if step is None:
            step = self._new_prefill_step(num_tokens, num_rows, has_given)
            # without padding every step has a size of its own
            if self.layout.pad and has_given in self._variants:
                with torch.no_grad():
                    step.build_hidden()
                    step.capture(self._capture_spans)
                self._prefill_steps[num_tokens, has_given] = step
        return step

    def padding_steps(self, num_tokens: int) -> list[PrefillStep]:
        """New steps of a bucket that hold only padding: one for each of its programs."""
        bucket = self.layout.prefill_bucket(num_tokens, 1)
        return [self._new_prefill_step(*bucket, has_given) for has_given in self._variants]

    @property
    def _variants(self) -> tuple[bool, ...]:
        """Whether embeddings are given, for each kind of prefill step that has programs."""
        return (False, True) if self.model.takes_embeddings else (False,)

    def _new_prefill_step(self, num_tokens: int, num_rows: int, has_given: bool) -> PrefillStep:
        given = self._given_inputs(num_tokens).of(num_tokens) if has_given else None
        return PrefillStep(self.steps, self.platform, num_tokens, num_rows, given)

    def _given_inputs(self, num_tokens: int) -> GivenInputs:
        """Those that the engine has, or new ones for steps of up to so many tokens."""
        return self._given or GivenInputs(self.cfg, self.platform, num_tokens)

    def _prefill(self, plan: StepPlan) -> Launched:
        bucket = self.layout.prefill_bucket(len(plan.token_T), len(plan.rows))
        step = self.prefill_step(*bucket, plan.has_given)
        step.fill(self.span_arrays(plan.rows, plan.num_tokens, plan.token_T, *bucket))
        if step.given is not None:
            fill(step.given, plan, self.embeddings, self.platform)
        if plan.choice.is_plain and not plan.prompt_logprobs:
            step.replay()
            return self._launched(plan, step.token_R)
        prompt_logprobs: list[list[LogprobCopies]] = []
        if plan.prompt_logprobs:
            h_TD, last_R = step.hidden()
            prompt_logprobs = [
                self._prompt_logprobs(one, h_TD, bucket[1]) for one in plan.prompt_logprobs
            ]
            logits_RW = self.steps.logits_at(h_TD, last_R)
            if plan.choice.is_plain:
                return self._launched(plan, step.sample(logits_RW), None, prompt_logprobs)
            logits_RV = self.steps.gathered(logits_RW)
        else:
            logits_RV = step.logits()
        rows = step.span.row_idx_R, logits_RV, step.span.num_tokens_R
        token_R = self.sampler.sample(plan.choice, *rows)
        return self._launched(plan, token_R, logits_RV, prompt_logprobs)

    def _prompt_logprobs(
        self, wanted: PromptLogprobs, h_TD: Tensor, group: int
    ) -> list[LogprobCopies]:
        """Log-probabilities of prompt tokens, as many at a time as the head's program takes."""
        found: list[LogprobCopies] = []
        for first in range(0, len(wanted.token_ids), group):
            token_ids = wanted.token_ids[first : first + group]
            index = [wanted.start + first + min(i, len(token_ids) - 1) for i in range(group)]
            following = token_ids + [0] * (group - len(token_ids))
            index_R = self.platform.upload(index, torch.int64)
            logits_RV = self.steps.gathered(self.steps.logits_at(h_TD, index_R))
            token_R = self.platform.upload(following, torch.int64)
            found.append(
                copy_logprobs(self.platform, logits_RV, token_R, wanted.num_top, len(token_ids))
            )
        return found

    def span_arrays(
        self,
        rows: Sequence[int],
        nums: Sequence[int],
        token_ids: np.ndarray,
        num_tokens: int,
        num_rows: int,
    ) -> SpanArrays:
        """`inputs.span_arrays` with this state's padding row."""
        return span_arrays(
            rows,
            nums,
            token_ids,
            num_rows=num_rows,
            num_tokens=num_tokens,
            pad_row=self.state.pad_row,
        )
