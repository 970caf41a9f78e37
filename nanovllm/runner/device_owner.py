"""What a runner owns on the device: weights, cache, state, programs, captured steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor

from nanovllm.compile.program import Compiler
from nanovllm.compile.trace import tensors
from nanovllm.kernels.collectives import Communicator
from nanovllm.models import shards
from nanovllm.models.experts.offloaded import Offloaded
from nanovllm.models.layer_state import LayerState, Recurrent, recurrent_bytes
from nanovllm.models.model import Model, Params
from nanovllm.models.rope import rotary_table
from nanovllm.models.shards import Shard
from nanovllm.platforms.base import MemoryBudget, Platform
from nanovllm.platforms.regions import Place, Region
from nanovllm.runner import one_kernel, persistent, vocab_parallel
from nanovllm.runner.adapter_store import AdapterStore
from nanovllm.runner.allocation import allocate
from nanovllm.runner.device_graphs import VerifyStep
from nanovllm.runner.draft import DraftParts
from nanovllm.runner.embeddings import Embeddings
from nanovllm.runner.encoders import Encoders
from nanovllm.runner.graph_cache import Captures, GraphCache
from nanovllm.runner.mm_embeds import MMEmbedInputs
from nanovllm.runner.no_grad import in_group
from nanovllm.runner.proposer import Drafting
from nanovllm.runner.sampling import Sampler
from nanovllm.runner.sleep import Sleeper
from nanovllm.runner.spec import EngineSpec
from nanovllm.runner.state import new_state
from nanovllm.runner.step_regions import Table
from nanovllm.runner.steps import ALONE, Steps

logger = logging.getLogger(__name__)


class DeviceOwner:
    """One rank's memory, and its steps of every bucket."""

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
    def kinds_of_plain(self) -> tuple[bool, ...]:
        """Whether plain decode steps run without the proposer; both if it may stop reading."""
        ends = self.spec.draft is not None and self.spec.draft.ends
        return (False, True) if ends else (self.rests,)

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
        sizes = self.layout.decode_rows
        row_idx_R = self._padding_rows(sizes[0])
        one_kernel.begin(self.steps, row_idx_R, sizes, self.layout.verify_tokens)
        # from the largest down: captured steps share one memory pool, and the first one sizes it
        for num_tokens in reversed(self.layout.prefill_tokens):
            progress(f"prefill {num_tokens}")
            for buckets, has_given in product(self.all_buckets, self.buckets.variants):
                buckets.prefill(*self.layout.prefill_bucket(num_tokens, 1), has_given)
        for num_rows in reversed(self.layout.decode_rows):
            progress(f"decode {num_rows}")
            for buckets in self.all_buckets:
                for rests in self.kinds_of_plain:
                    buckets.decode(num_rows, rests=rests)
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
            row_idx_R = self._padding_rows(size)
            for steps in self.all_steps:
                with ALONE if self.rests else steps.proposing(row_idx_R):
                    steps.decode(row_idx_R)
                for num in self.layout.verify_tokens:
                    VerifyStep(steps, self.platform, size, num).launch()
            if size == self.layout.decode_rows[0]:  # once: these are the same for all
                one_kernel.store_plan(self.steps, row_idx_R)
                self.sampler.warm_up()
        self.platform.synchronize()

    def _padding_rows(self, num_rows: int) -> Tensor:
        return torch.full((num_rows,), self.state.pad_row, device=self.platform.device)

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

    def _persistent_steps(
        self, drafting: Drafting | None, whole: bool
    ) -> persistent.PersistentSteps | None:
        kept = {} if drafting is None else drafting.kept
        if kept is not None and not whole:
            return persistent.chosen(self.platform.device, self.spec.persistent, kept)
        if self.spec.persistent:
            why = "each is one program" if whole else "the head reads a layer twice"
            logger.info("no decode step is one kernel: %s", why)
        return None

    def _make_steps(self, num_blocks: int, compiler: Compiler) -> Steps:
        made = allocate(self.model, num_blocks, self.spec, self.cache_region, self._scales)
        caches, self.snapshots = made
        whole = self.platform.traits.whole_steps and compiler.lowering is not None
        drafting = None
        if self._draft is not None:
            drafting = self._draft.drafting(num_blocks, self.cache_region.zeros, compiler)
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
            persistent=self._persistent_steps(drafting, whole),
            drafting=drafting,
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
