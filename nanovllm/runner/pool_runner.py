"""The device's side of a model that pools: steps of whole sequences, which keep nothing.

T tokens | R rows (sequences) | S = R + 1 | D hidden | O numbers of a result | M positions
H head size | P blocks of a row
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from nanovllm.compile import buckets
from nanovllm.compile.program import Compiler
from nanovllm.compile.trace import tensors
from nanovllm.kernels.collectives import Communicator
from nanovllm.models.layer_state import PagedKV
from nanovllm.models.model import Batch, LayerCache, LayerCall, Model
from nanovllm.models.pooling import Pooler, PoolInputs, PoolWeights, pool
from nanovllm.models.rope import rotary_table
from nanovllm.platforms import attention
from nanovllm.platforms.base import DryRun, HostCopy, Platform
from nanovllm.runner.embeddings import Embeddings
from nanovllm.runner.encoders import Encoders, MMItem
from nanovllm.runner.mm_embeds import MMEmbedInputs, MMEmbeds, add_features, with_given
from nanovllm.runner.no_grad import in_group
from nanovllm.runner.pool_inputs import PoolSequence as PoolSequence
from nanovllm.runner.pool_step import PoolStep
from nanovllm.runner.spec import EngineSpec

STEP = 16  # the tokens of every step are a multiple of it
# Steps of the same tokens for few rows, which have so many tokens or more on average, and for many:
# kernels of attention start programs for each row.
LONG = 128


class PoolRunner:
    """Runs steps of a model that pools, or one rank's part of them: all ranks must call the same
    methods. Programs are built on first use; `warm_up` uses every
    bucket. The buckets are those of prefill in the layout of `spec`."""

    def __init__(
        self,
        model: Model,
        params: PoolWeights,
        spec: EngineSpec,
        platform: Platform,
        compiler: Compiler,
        *,
        capture: bool = True,
        group: Communicator | None = None,
    ) -> None:
        """`group` communicates with the other ranks, if there are any."""
        self.model, self.params, self.spec, self.group = model, params, spec, group
        self.platform, self.compiler, self.layout = platform, compiler, spec.layout
        self.pooler: Pooler = model.pooler
        is_recordable = not self.pooler.is_causal or attention.recordable(spec.attention)[1]
        is_graph = compiler.lowering is not None and self.layout.pad
        self.captures = capture and is_graph and is_recordable
        cfg, length = model.config, self.layout.max_model_len
        self._tables = [
            rotary_table(*rope, length, platform.device, cfg.head_dim) for rope in cfg.ropes
        ]
        self._memory = self._new_memory() if self.pooler.is_causal else {}
        num_blocks = -(-min(length, self.layout.prefill_tokens[-1]) // self.layout.block_size)
        self._block_P = torch.arange(num_blocks, dtype=torch.int32, device=platform.device)
        self.embeddings = Embeddings(spec.embedding_cache_bytes)
        self.towers = Encoders(model, params, platform, compiler, self.layout, self.embeddings)
        self._steps: dict[tuple[int, int, bool], PoolStep] = {}

    @cached_property
    def given_inputs(self) -> MMEmbedInputs:
        """The memory that steps with images share."""
        return MMEmbedInputs(self.model.config, self.platform, self.layout.prefill_tokens[-1])

    @property
    def variants(self) -> tuple[bool, ...]:
        """The kinds of steps that have programs: with images or not."""
        return (False, True) if self.model.takes_embeddings else (False,)

    def _new_memory(self) -> dict[tuple[int, ...], LayerCache]:
        """Memory for the keys and values of a step, which all layers of one shape share, by their
        numbers of heads and head sizes. Every row begins a block; the last block is for padding."""
        size, layout = self.layout.block_size, self.layout
        num_blocks = (layout.prefill_tokens[-1] + layout.max_num_seqs * (size - 1)) // size + 1
        found: dict[tuple[int, ...], LayerCache] = {}
        for kept in dict.fromkeys(self.model.kept):
            assert isinstance(kept, PagedKV)
            shapes = kept.shapes(num_blocks, size)
            made = (
                torch.zeros(shape, dtype=self.model.config.dtype, device=self.platform.device)
                for shape in shapes
            )
            found[shapes[0][2:]] = LayerCache(*made)
        return found

    @property
    def weights_bytes(self) -> int:
        unique = {tensor.data_ptr(): tensor.nbytes for tensor in tensors(self.params)}
        return sum(unique.values())

    @in_group
    def warm_up(self, progress: Callable[[str], object]) -> None:
        """Build, run and capture the step of every bucket, and seal the compiler."""
        if not self.layout.pad:
            return
        # from the largest down: captured steps share one memory pool, and the first one sizes it
        for num_tokens in reversed(self.layout.prefill_tokens):
            progress(f"pooling {num_tokens}")
            for num_rows, has_given in product(self.row_counts(num_tokens), self.variants):
                self._step(num_tokens, num_rows, has_given)
        self.towers.warm_up(self.platform.capture if self.captures else None, progress)
        self.platform.synchronize()
        self.compiler.seal()

    @in_group
    def run_bucket(self, kind: str, size: int) -> None:
        """Build and run the programs of one bucket on padding, and capture nothing. `kind` is
        "prefill", or "vision" with a size in patches."""
        if kind in self.towers:
            self.towers.run_bucket(kind, size)
        else:
            assert kind == "prefill", kind
            for num_rows, has_given in product(self.row_counts(size), self.variants):
                PoolStep(self, size, num_rows, has_given=has_given).launch()
        self.platform.synchronize()

    @in_group
    def dry_run_bucket(self, size: int, dry_run: DryRun) -> None:
        """Build the programs of one bucket and call them with fake tensors: see
        `warmup.dry_run_bucket`."""
        for num_rows, has_given in product(self.row_counts(size), self.variants):
            with dry_run.mode:
                step = PoolStep(self, size, num_rows, has_given=has_given)
            self.run(step.inputs, step.given)

    def row_counts(self, num_tokens: int) -> list[int]:
        """The rows of the steps of a bucket, ascending: one number where steps are synchronous, and
        attention visits only the rows that there are."""
        most = min(num_tokens, self.layout.max_prefill_rows)
        if not self.platform.traits.run_ahead:
            return [most]
        return sorted({min(most, max(1, num_tokens // LONG)), most})

    @in_group
    def launch(self, sequences: Sequence[PoolSequence]) -> HostCopy:
        """Start a step; returns the copy of its results [R, O], in fp32, R the number of
        sequences."""
        num_tokens = sum(len(one.token_ids) for one in sequences)
        has_given = any(one.given for one in sequences)
        step = self._step(-(-num_tokens // STEP) * STEP, len(sequences), has_given)
        step.fill(sequences)
        step.replay()
        self.embeddings.trim()
        return self.platform.read_back(step.result_RO[: len(sequences)])

    def encode(self, media: Mapping[str, MMItem]) -> None:
        """See `Encoders.encode`."""
        self.towers.encode(media)

    def check_ranks(self) -> None:
        """Raise the failure of the other ranks, if there are any and they have failed."""

    def call_on_failure(self, callback: Callable[[Exception], None]) -> None:
        """See `WorkerGroup.call_on_failure`. Without other ranks nothing fails alone."""

    def drop_embeddings(self, keys: Iterable[str]) -> None:
        """See `Embeddings.drop`."""
        self.embeddings.drop(keys)

    def forget_encoded(self, keys: Iterable[str]) -> None:
        """See `Embeddings.forget`. On this rank."""
        self.embeddings.forget(keys)

    def close(self) -> None:
        """Drop everything that holds device memory."""
        self.platform.synchronize()
        self.embeddings.clear()
        self.towers.by_name.clear()
        for step in self._steps.values():
            step.__dict__.clear()
        self._steps.clear()
        names = ("params", "compiler", "_memory", "_tables", "_block_P", "given_inputs", "group")
        for name in names:
            self.__dict__.pop(name, None)
        self.platform.release()

    def _step(self, num_tokens: int, num_rows: int, has_given: bool = False) -> PoolStep:
        """The step of a bucket; without padding, a new one."""
        if self.layout.pad:
            num_tokens = buckets.smallest_fit(self.layout.prefill_tokens, num_tokens)
            num_rows = buckets.smallest_fit(self.row_counts(num_tokens), num_rows)
        found = self._steps.get((num_tokens, num_rows, has_given))
        if found is not None:
            return found
        made = PoolStep(self, num_tokens, num_rows, has_given=has_given)
        if self.layout.pad:
            made.capture(self.platform.capture if self.captures else None)
            self._steps[num_tokens, num_rows, has_given] = made
        return made

    # regions ----------------------------------------------------------------------------------

    def run(
        self, inputs: PoolInputs, given: MMEmbeds | None = None, layers: Sequence[int] | None = None
    ) -> Tensor:
        """A step, op by op: results [R, O]. `given` has the embeddings of images, and positions.
        `layers` are all unless they are given."""
        cfg, pooler, outer = self.model.config, self.pooler, self.params.outer
        key = (len(inputs.token_T), len(inputs.chosen_R))
        h_TD = self._run("embed", key, partial(pooler.embed, cfg), params=outer, inputs=inputs)
        batch, rows_TH = self._batch(inputs), None
        if given is not None:
            h_TD, rows_TH = self._run(
                "with_given",
                key[:1],
                partial(with_given, self.model.embed_factor),
                given=given._replace(embeds_LTD=given.embeds_LTD.narrow(0, 0, 1)),
                cos_sin_MH=self._tables[0],
                h_TD=h_TD,
            )
            batch = batch._replace(end_T=given.end_T)
            if given.row_T is not None:  # rotations are a table with a row for each token
                batch = batch._replace(rope_pos_T=given.row_T)
        keeps_last = pooler.pooling != "mean"
        needs_all = given is not None and self.model.adds_to_last
        h_XD = h_TD
        for layer_idx, name in self._layer_names(layers, keeps_last and not needs_all):
            keep_R = inputs.chosen_R if name == "last_layer" else None
            h_XD = self._layer(layer_idx, name, batch._replace(keep_R=keep_R), rows_TH, h_XD)
            if given is not None and name != "last_layer":
                h_XD = self._with_features(layer_idx, given, h_XD)
        if keeps_last and needs_all:
            h_XD = h_XD.index_select(0, inputs.chosen_R)
        region = partial(pool, cfg, pooler.pooling, pooler.norm, pooler.head)
        return self._run("pool", key, region, params=outer, inputs=inputs, h_XD=h_XD)

    def _layer_names(self, layers: Sequence[int] | None, keeps_last: bool) -> list[tuple[int, str]]:
        """The layers that run, all if `layers` is None, with the names of their programs."""
        names = [name for name, _ in self.model.layer_programs(keeps_last=keeps_last)]
        return [(i, names[i]) for i in (range(len(names)) if layers is None else layers)]

    def _layer(
        self, layer_idx: int, name: str, batch: Batch, rows_TH: Tensor | None, h_TD: Tensor
    ) -> Tensor:
        kind, num_rows = self.model.layer_kinds[layer_idx], len(batch.seq_len_R)
        longest = min(len(h_TD), self.layout.max_model_len)
        backend = self.spec.attention.key(max(longest, 2), len(h_TD))
        ahead = () if batch.end_T is None else ("ahead",)
        made: Tensor = self._run(
            name,
            (len(h_TD), num_rows, kind.name, *ahead),
            partial(self.model.layer, self.model.config, LayerCall(backend, kind, longest)),
            w=self.params.layers[layer_idx],
            kv=self._memory_of(layer_idx),
            cos_sin_MH=self._table_of(layer_idx) if rows_TH is None else rows_TH,
            batch=batch,
            h_TD=h_TD,
        )
        return made

    def _with_features(self, layer_idx: int, given: MMEmbeds, h_TD: Tensor) -> Tensor:
        """The hidden states after a layer, with the level of features that is added there."""
        if layer_idx + 1 >= len(given.embeds_LTD):
            return h_TD
        added: Tensor = self._run(
            "add_features",
            (len(h_TD),),
            add_features,
            is_given_T=given.is_given_T,
            features_TD=given.embeds_LTD.select(0, layer_idx + 1),
            h_TD=h_TD,
        )
        return added

    def _batch(self, inputs: PoolInputs) -> Batch:
        """The inputs of layers. The blocks of a row follow one another."""
        len_R = inputs.start_S.diff()
        if inputs.slot_T is None or inputs.block_R is None:
            none_R0 = inputs.start_S.new_empty((len(len_R), 0))
            return Batch(inputs.pos_T, inputs.pos_T, none_R0, len_R, inputs.start_S)
        longest = min(len(inputs.token_T), self.layout.max_model_len)
        num_blocks = -(-longest // self.layout.block_size)
        table_RP = inputs.block_R.unsqueeze(1) + self._block_P.narrow(0, 0, num_blocks)
        return Batch(inputs.pos_T, inputs.slot_T, table_RP, len_R, inputs.start_S)

    def _memory_of(self, layer_idx: int) -> LayerCache | None:
        if not self._memory:
            return None
        kept = self.model.kept[layer_idx]
        assert isinstance(kept, PagedKV)
        return self._memory[kept.shapes(1, self.layout.block_size)[0][2:]]

    def _table_of(self, layer_idx: int) -> Tensor:
        ropes = self.model.layer_ropes
        return self._tables[ropes[layer_idx] if ropes else 0]

    def _run(
        self, name: str, key: tuple[object, ...], function: Callable[..., Any], **inputs: object
    ) -> Any:
        program = self.compiler.program(f"pooling_{name}", key, function, inputs)
        return program(*inputs.values())
