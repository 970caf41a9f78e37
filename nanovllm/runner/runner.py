"""Owns everything on the device: weights, cache, state, programs, captured steps. Launches steps and does not wait."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from nanovllm.compile import buckets
from nanovllm.compile.program import Compiler
from nanovllm.compile.trace import tensors
from nanovllm.models.config import ModelConfig
from nanovllm.models.dense import LayerCache, Params
from nanovllm.models.kv_scales import kv_scales
from nanovllm.models.rope import rotary_table
from nanovllm.platforms import attention
from nanovllm.platforms.base import HostCopy, MemoryBudget, Platform, Rehearsal, Replay
from nanovllm.runner import sampling as sampler
from nanovllm.runner.captured import DecodeStep, PrefillStep
from nanovllm.runner.filtered import (
    FilteredSampler,
    LogprobCopies,
    copy_logprobs,
    filters_suffice,
    needs_filtering,
)
from nanovllm.runner.inputs import PrefillArrays, prefill_arrays
from nanovllm.runner.state import SAMPLING_FIELDS, new_state
from nanovllm.runner.steps import Steps
from nanovllm.schedule.request import Request
from nanovllm.schedule.scheduler import Chunk, DecodePlan, Plan, PrefillPlan
from nanovllm.schedule.stall import StallBound

logger = logging.getLogger(__name__)

# The context against which attention is timed, so long that it stands out.
STALL_CONTEXT_TOKENS = 16_384
# How often a step is timed, and the milliseconds from which once is enough: what disturbs it is a part of one.
STALL_REPEATS, STALL_LONG_MS = 2, 20.0


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

    @property
    def blocks_per_row(self) -> int:
        return -(-self.max_model_len // self.block_size)

    def decode_bucket(self, num_rows: int) -> int:
        return buckets.smallest_fit(self.decode_rows, num_rows) if self.pad else num_rows

    def prefill_bucket(self, num_tokens: int, num_rows: int) -> tuple[int, int]:
        """(T, R) for a prefill step."""
        if not self.pad:
            return num_tokens, num_rows
        tokens = buckets.smallest_fit(self.prefill_tokens, num_tokens)
        return tokens, min(tokens, self.max_prefill_rows)


@dataclass(frozen=True)
class PromptLogprobs:
    """Log-probabilities of prompt tokens `first` … of one request."""

    request: Request
    first: int
    num: int
    copies: LogprobCopies


@dataclass(frozen=True)
class Launched:
    """A step on its way: which requests get a token from it, and where it will be. `rows[i]` is request i's."""

    requests: list[Request]
    rows: list[int]
    tokens: HostCopy
    logprobs: LogprobCopies | None
    prompt_logprobs: list[PromptLogprobs]


def _as_it_is(step: Callable[[], None]) -> Replay:
    return step


class Runner:
    def __init__(
        self,
        model: ModuleType,
        cfg: ModelConfig,
        params: Params,
        layout: Layout,
        platform: Platform,
        compiler: Compiler,
        *,
        capture: bool = True,
    ) -> None:
        self.model, self.cfg, self.params = model, cfg, params
        self.layout, self.platform, self.compiler = layout, platform, compiler
        # eager mode is for seeing each op run where it stands, so nothing is captured there
        record = platform.capture if capture and compiler.lowering is not None else _as_it_is
        records_decode, records_prefill = attention.recordable(cfg.attention_backend, platform)
        self._record = record if records_decode else _as_it_is
        self._record_prefill = record if records_prefill else _as_it_is
        self.state = new_state(layout.max_num_seqs, layout.blocks_per_row, platform.device)
        self.cos_sin_MH = rotary_table(
            cfg.inv_freq, cfg.rope_scale, layout.max_model_len, platform.device
        )
        self.filtered = FilteredSampler(platform, self.state, cfg.vocab_size, cfg.dtype)
        self._scales: list[tuple[Tensor, ...]] = [() for _ in params.layers]
        if cfg.kv_dtype is torch.float8_e4m3fn:
            self._scales = [kv_scales(cfg, layer) for layer in params.layers]
        self.graphs_bytes = 0  # device memory that recording the decode steps took
        self._decode_steps: dict[int, DecodeStep] = {}
        self._prefill_steps: dict[int, PrefillStep] = {}
        # until the size of the cache is known; where it is a static size of the programs, nothing is built for this one
        first = Compiler(None) if platform.whole_steps else compiler
        self.steps = self._make_steps(2, first)

    @property
    def block_bytes(self) -> int:
        return self.cfg.kv_bytes_per_token * self.layout.block_size

    @property
    def weights_bytes(self) -> int:
        unique = {
            tensor.data_ptr(): tensor.nbytes for tensor in tensors(self.params)
        }  # the head may be the embedding
        return sum(unique.values())

    def measure_budget(self, utilization: float) -> MemoryBudget:
        """What is left beside the weights and the largest prefill step, which is run once to see what it takes."""
        self.platform.reset_peak()
        self.run_bucket("prefill", self.layout.prefill_tokens[-1])
        return self.platform.memory_budget(utilization)

    def allocate_cache(self, num_blocks: int) -> None:
        """Zeroed cache blocks; the state's block tables refer to them by number."""
        self.steps = self._make_steps(num_blocks, self.compiler)

    def warm_up(self, progress: Callable[[str], object]) -> None:
        """Build, run and record the steps of every bucket, and close the compiler."""
        if not self.layout.pad:
            return
        self.platform.synchronize()
        used_bytes = self.platform.used_bytes()
        # from the largest down: recorded steps share one memory pool, and the first one sizes it
        for num_tokens in reversed(self.layout.prefill_tokens):
            progress(f"prefill {num_tokens}")
            self._prefill_step(*self.layout.prefill_bucket(num_tokens, 1))
        for num_rows in reversed(self.layout.decode_rows):
            progress(f"decode {num_rows}")
            self._decode_step(num_rows)
        with torch.no_grad():
            self.filtered.warm_up()
        self.platform.synchronize()
        self.graphs_bytes = self.platform.used_bytes() - used_bytes
        self.compiler.seal()

    def run_bucket(self, kind: str, size: int) -> None:
        """Build and run the programs of one bucket, "prefill" tokens or "decode" rows, on padding, and record nothing."""
        with torch.no_grad():
            if kind == "prefill":
                step = self._new_prefill_step(*self.layout.prefill_bucket(size, 1))
                step.launch()
                step.build_hidden()
            else:
                self.steps.decode(
                    torch.full((size,), self.state.pad_row, device=self.platform.device)
                )
                if size == self.layout.decode_rows[0]:  # once: its kernels are the same for all
                    self.filtered.warm_up()
        self.platform.synchronize()

    def rehearse_bucket(self, kind: str, size: int, rehearsal: Rehearsal) -> None:
        """Build the programs of one bucket, and call them with fake tensors made under the rehearsal's mode: a runner that was
        itself made under it computes nothing and takes no memory. `compiler.instead` must stand in for the programs."""
        mode = rehearsal.mode
        with torch.no_grad():
            if kind == "prefill":
                with mode:
                    sizes = self.layout.prefill_bucket(size, 1)
                    step = PrefillStep(
                        self.steps, self.platform, *sizes, self.layout.blocks_per_row
                    )
                self.steps.sample(step.sample_row_R, step.logits())
                step.build_hidden()
            else:
                with mode:
                    row_idx_R = torch.zeros(size, dtype=torch.int64, device=self.platform.device)
                self.steps.decode(row_idx_R)
                if size == self.layout.decode_rows[0]:
                    self.filtered.rehearse(rehearsal)

    def measure_stall(self, max_ms: float) -> StallBound:
        """Time prefill steps of padding, and one whose tokens attend to a long context; programs must be warm."""
        sizes = self.layout.prefill_tokens
        step_ms: list[tuple[int, float]] = []
        for num_tokens in sizes:  # a larger step that seems faster is noise
            step_ms.append(
                (num_tokens, max(self._prefill_ms(num_tokens), step_ms[-1][1] if step_ms else 0.0))
            )
        num_tokens = min(sizes[-1], self.layout.max_model_len)
        alone_ms = step_ms[-1][1] if num_tokens == sizes[-1] else self._prefill_ms(num_tokens)
        context = min(self.layout.max_model_len, max(2 * num_tokens, STALL_CONTEXT_TOKENS))
        attended = num_tokens * (context - num_tokens / 2)
        attention_ms = max(0.0, self._prefill_ms(num_tokens, context) - alone_ms) / attended
        bound = StallBound(max_ms, tuple(step_ms), attention_ms)
        logger.debug("prefill steps: %s", bound)
        return bound

    def _prefill_ms(self, num_tokens: int, context: int = 0) -> float:
        """A step of padding; with `context` its tokens are the last of so many, all in the padding block."""
        best_ms = math.inf
        step = self._prefill_step(*self.layout.prefill_bucket(num_tokens, 1))
        arrays = self._padding(step)
        if context:
            arrays.seq_len_R[0], arrays.q_start_S[1:] = context, num_tokens
        step.fill(arrays)
        for _ in range(STALL_REPEATS):
            self.platform.synchronize()
            started = time.perf_counter()
            with torch.no_grad():
                step.replay()
            self.platform.synchronize()
            best_ms = min(best_ms, 1e3 * (time.perf_counter() - started))
            if best_ms >= STALL_LONG_MS:
                break
        return best_ms

    def launch(self, plan: Plan) -> Launched:
        """Start a step; returns at once on devices that work asynchronously."""
        with torch.no_grad():
            return self._prefill(plan) if isinstance(plan, PrefillPlan) else self._decode(plan)

    def decode_uncaptured(self, num_rows: int, watch: AbstractContextManager[object]) -> None:
        """Launch a bucket's decode step op by op under `watch`, on padding alone, which touches no request. For profiling."""
        step = self._decode_step(num_rows)
        step.rows = []
        step.row_idx_R.fill_(self.state.pad_row)
        with torch.no_grad(), watch:
            step.launch()

    def close(self) -> None:
        """Forget everything that holds device memory; captured steps refer to themselves, so counting would not do."""
        self.platform.synchronize()
        for step in (*self._decode_steps.values(), *self._prefill_steps.values()):
            step.__dict__.clear()
        self._decode_steps.clear()
        self._prefill_steps.clear()
        for name in ("steps", "params", "state", "filtered", "cos_sin_MH", "compiler"):
            self.__dict__.pop(name, None)
        self.platform.release()

    def _make_steps(self, num_blocks: int, compiler: Compiler) -> Steps:
        cfg, device = self.cfg, self.platform.device
        shape = (num_blocks, self.layout.block_size, cfg.num_kv_heads, cfg.head_dim)

        def blocks() -> Tensor:
            # memory of its own for each: programs take them as inputs, and inputs must not alias
            return torch.zeros(shape, dtype=cfg.cache_dtype, device=device)

        caches = tuple(LayerCache(blocks(), blocks(), *scales) for scales in self._scales)
        whole = self.platform.whole_steps and compiler.lowering is not None
        return Steps(
            self.model, cfg, self.params, caches, self.cos_sin_MH, self.state, compiler, whole=whole
        )

    # decode -----------------------------------------------------------------------------------------------------

    def _decode_step(self, num_rows: int) -> DecodeStep:
        step = self._decode_steps.get(num_rows)
        if step is None:
            with torch.no_grad():
                step = DecodeStep(self.steps, self.platform, self._record, num_rows)
            self._decode_steps[num_rows] = step
        return step

    def _decode(self, plan: DecodePlan) -> Launched:
        requests = plan.requests
        if plan.new_blocks:
            row, block_idx, block = self.platform.upload(plan.new_blocks, torch.int64).unbind(1)
            self.state.block_table_SP.index_put_((row, block_idx), block.int())
        step = self._decode_step(self.layout.decode_bucket(len(requests)))
        rows = [request.row for request in requests]
        rows += [self.state.pad_row] * (step.row_idx_R.shape[0] - len(rows))
        if rows != step.rows:
            step.rows = []  # should the copy break off
            step.row_idx_R.copy_(self.platform.upload(rows, torch.int64))
            step.rows = rows
        if self.platform.wants_lengths:
            num_padding = len(rows) - len(requests)
            self.platform.announce(
                [request.num_computed for request in requests] + [1] * num_padding
            )
        token_R, logprobs = step.token_R, None
        if not any(needs_filtering(request) for request in requests):
            step.replay()
        elif not self.steps.whole and all(filters_suffice(request) for request in requests):
            step.filtered(self.filtered.choose)
        else:
            token_R, logprobs = self.filtered.sample(requests, step.row_idx_R, step.logits())
        return Launched(
            requests, list(range(len(requests))), self.platform.read_back(token_R), logprobs, []
        )

    # prefill ----------------------------------------------------------------------------------------------------

    def _prefill(self, plan: PrefillPlan) -> Launched:
        chunks = plan.chunks
        num_tokens, num_rows = self.layout.prefill_bucket(
            sum(chunk.num_tokens for chunk in chunks), len(chunks)
        )
        arrays = prefill_arrays(
            chunks,
            num_tokens=num_tokens,
            num_rows=num_rows,
            block_size=self.layout.block_size,
            blocks_per_row=self.layout.blocks_per_row,
            pad_row=self.state.pad_row,
        )
        self._admit(chunks, arrays)
        step = self._prefill_step(num_tokens, num_rows)
        step.fill(arrays)
        prompt_logprobs: list[PromptLogprobs] = []
        logprobs, token_R = None, step.token_R
        filters = any(chunk.is_last and needs_filtering(chunk.request) for chunk in chunks)
        wants_all = any(chunk.request.needs_prompt_logits for chunk in chunks)
        if not filters and not wants_all:
            step.replay()
        else:
            if wants_all:
                h_TD = step.hidden()
                prompt_logprobs = self._prompt_logprobs(chunks, arrays, h_TD)
                logits_RV = self.steps.logits_at(h_TD, step.last_R)
            else:
                logits_RV = step.logits()
            if filters:
                requests = [chunk.request for chunk in chunks]
                token_R, logprobs = self.filtered.sample(requests, step.sample_row_R, logits_RV)
            else:
                token_R = self.steps.sample(step.sample_row_R, logits_RV)
        sampled = [row for row, chunk in enumerate(chunks) if chunk.is_last]
        tokens = self.platform.read_back(token_R)
        return Launched(
            [chunks[row].request for row in sampled], sampled, tokens, logprobs, prompt_logprobs
        )

    def _prefill_step(self, num_tokens: int, num_rows: int) -> PrefillStep:
        step = self._prefill_steps.get(num_tokens)
        if step is None:
            step = self._new_prefill_step(num_tokens, num_rows)
            if self.layout.pad:  # else every step has a size of its own
                # lengths that the host must tell are told for decode steps alone
                record = _as_it_is if self.platform.wants_lengths else self._record_prefill
                with torch.no_grad():
                    step.build_hidden()
                    step.record(record)
                self._prefill_steps[num_tokens] = step
        return step

    def _new_prefill_step(self, num_tokens: int, num_rows: int) -> PrefillStep:
        """A step that holds padding: it touches no block of a request."""
        step = PrefillStep(
            self.steps, self.platform, num_tokens, num_rows, self.layout.blocks_per_row
        )
        step.fill(self._padding(step))
        return step

    def _padding(self, step: PrefillStep) -> PrefillArrays:
        return prefill_arrays(
            [],
            num_tokens=step.token_T.shape[0],
            num_rows=step.token_R.shape[0],
            block_size=self.layout.block_size,
            blocks_per_row=self.layout.blocks_per_row,
            pad_row=self.state.pad_row,
        )

    def _admit(self, chunks: Sequence[Chunk], arrays: PrefillArrays) -> None:
        """Write what the device must know of each request into its row: all that decode steps do not derive."""
        upload, row_idx = self.platform.upload, [chunk.request.row for chunk in chunks]
        row_idx_R = upload(row_idx, torch.int64)
        fields = [
            [getattr(chunk.request.params, name) for name in SAMPLING_FIELDS] for chunk in chunks
        ]
        pos = [chunk.start + chunk.num_tokens - 1 for chunk in chunks]
        self.state.pos_S.index_copy_(0, row_idx_R, upload(pos, torch.int64))
        self.state.seed_S.index_copy_(
            0, row_idx_R, upload([chunk.request.seed for chunk in chunks], torch.int64)
        )
        self.state.sampling_SF.index_copy_(0, row_idx_R, upload(fields, torch.float32))
        self.state.block_table_SP.index_copy_(
            0, row_idx_R, upload(arrays.block_table_RP[: len(chunks)], torch.int32)
        )
        self.filtered.admit([chunk.request for chunk in chunks if chunk.is_last])

    def _prompt_logprobs(
        self, chunks: Sequence[Chunk], arrays: PrefillArrays, h_TD: Tensor
    ) -> list[PromptLogprobs]:
        """For requests that ask: the log-probability of each prompt token, from the logits of the token before it."""
        found: list[PromptLogprobs] = []
        for row, chunk in enumerate(chunks):
            request, offset = chunk.request, int(arrays.q_start_S[row])
            if not request.needs_prompt_logits:
                continue
            num = min(chunk.num_tokens, len(request.prompt_ids) - 1 - chunk.start)
            group = arrays.last_R.shape[0]  # as many at a time as the head's program takes
            for start in range(0, num, group):
                size = min(group, num - start)
                index = [offset + start + min(i, size - 1) for i in range(group)]
                first = chunk.start + start + 1
                following = request.prompt_ids[first : first + size] + [0] * (group - size)
                logits_RV = self.steps.logits_at(h_TD, self.platform.upload(index, torch.int64))
                token_R = self.platform.upload(following, torch.int64)
                num_top = min(request.params.prompt_logprobs or 0, self.cfg.vocab_size)
                values = sampler.logprobs(logits_RV, token_R, num_top)
                found.append(
                    PromptLogprobs(request, first, size, copy_logprobs(self.platform, values))
                )
        return found
