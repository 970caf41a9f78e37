"""The device's side of a model that pools: steps of whole sequences, which keep nothing.

T tokens | R rows (sequences) | S = R + 1 | D hidden | O numbers of a result | M positions
H head size | P blocks of a row
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
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
from nanovllm.platforms.base import DryRun, HostCopy, Platform, Replay
from nanovllm.runner.no_grad import in_group
from nanovllm.runner.spec import EngineSpec

STEP = 16  # the tokens of every step are a multiple of it
# Steps of the same tokens for few rows, which have so many tokens or more on average, and for many:
# kernels of attention start programs for each row.
LONG = 128
ALIGNED = 16  # bytes, of each input


class PoolSequence(NamedTuple):
    """One sequence of a step. second_at: where the second of two texts begins, 0 for one text."""

    token_ids: Sequence[int]
    second_at: int = 0


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
        self._steps: dict[tuple[int, int], PoolStep] = {}

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
            for num_rows in self.row_counts(num_tokens):
                self._step(num_tokens, num_rows)
        self.platform.synchronize()
        self.compiler.seal()

    @in_group
    def run_bucket(self, kind: str, size: int) -> None:
        """Build and run the programs of one bucket on padding, and capture nothing. `kind` is
        "prefill"."""
        assert kind == "prefill", kind
        for num_rows in self.row_counts(size):
            PoolStep(self, size, num_rows).launch()
        self.platform.synchronize()

    @in_group
    def dry_run_bucket(self, size: int, dry_run: DryRun) -> None:
        """Build the programs of one bucket and call them with fake tensors: see
        `warmup.dry_run_bucket`."""
        for num_rows in self.row_counts(size):
            with dry_run.mode:
                step = PoolStep(self, size, num_rows)
            self.run(step.inputs)

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
        step = self._step(-(-num_tokens // STEP) * STEP, len(sequences))
        step.fill(sequences)
        step.replay()
        return self.platform.read_back(step.result_RO[: len(sequences)])

    def close(self) -> None:
        """Drop everything that holds device memory."""
        self.platform.synchronize()
        for step in self._steps.values():
            step.__dict__.clear()
        self._steps.clear()
        for name in ("params", "compiler", "_memory", "_tables", "_block_P", "group"):
            self.__dict__.pop(name, None)
        self.platform.release()

    def _step(self, num_tokens: int, num_rows: int) -> PoolStep:
        """The step of a bucket; without padding, a new one."""
        if self.layout.pad:
            num_tokens = buckets.smallest_fit(self.layout.prefill_tokens, num_tokens)
            num_rows = buckets.smallest_fit(self.row_counts(num_tokens), num_rows)
        found = self._steps.get((num_tokens, num_rows))
        if found is not None:
            return found
        made = PoolStep(self, num_tokens, num_rows)
        if self.layout.pad:
            made.capture(self.platform.capture if self.captures else None)
            self._steps[num_tokens, num_rows] = made
        return made

    # regions ----------------------------------------------------------------------------------

    def run(self, inputs: PoolInputs, layers: Sequence[int] | None = None) -> Tensor:
        """A step, op by op: results [R, O]. `layers` are all unless they are given."""
        cfg, pooler, outer = self.model.config, self.pooler, self.params.outer
        key = (len(inputs.token_T), len(inputs.chosen_R))
        h_TD = self._run("embed", key, partial(pooler.embed, cfg), params=outer, inputs=inputs)
        batch, longest = self._batch(inputs), min(key[0], self.layout.max_model_len)
        programs = self.model.layer_programs(keeps_last=pooler.pooling != "mean")
        backend = self.spec.attention.key(max(longest, 2), key[0])
        for layer_idx in range(len(programs)) if layers is None else layers:
            name, kind = programs[layer_idx]
            keep_R = inputs.chosen_R if name == "last_layer" else None
            h_TD = self._run(
                name,
                (*key, kind.name),
                partial(self.model.layer, cfg, LayerCall(backend, kind, longest)),
                w=self.params.layers[layer_idx],
                kv=self._memory_of(layer_idx),
                cos_sin_MH=self._table_of(layer_idx),
                batch=batch._replace(keep_R=keep_R),
                h_TD=h_TD,
            )
        region = partial(pool, cfg, pooler.pooling, pooler.norm, pooler.head)
        return self._run("pool", key, region, params=outer, inputs=inputs, h_XD=h_TD)

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


class PoolStep:
    """The static inputs and results of a bucket. Initially all padding."""

    def __init__(self, runner: PoolRunner, num_tokens: int, num_rows: int) -> None:
        pooler, device = runner.pooler, runner.platform.device
        self._shape = InputShape(
            num_tokens, num_rows, pooler.has_types, runner.layout.block_size, pooler.is_causal
        )
        self._buffer = torch.zeros(self._shape.num_bytes, dtype=torch.uint8, device=device)
        self.inputs = PoolInputs(**{
            name: self._buffer.narrow(0, first, size * dtype.itemsize).view(dtype)
            for name, (first, size, dtype) in self._shape.fields.items()
        })  # fmt: skip
        size = (num_rows, pooler.size)
        self.result_RO = torch.zeros(size, dtype=torch.float32, device=device)
        self._runner = runner
        self.replay: Replay = self.launch

    def fill(self, sequences: Sequence[PoolSequence]) -> None:
        """Copy sequences to the static inputs, at once. Does not synchronise."""
        is_last = self._runner.pooler.pooling == "last"
        self._runner.platform.write(self._buffer, self._shape.filled(sequences, is_last=is_last))

    def capture(self, capture: Callable[[Callable[[], None]], Replay] | None) -> None:
        """Run the step's programs, and capture it as `replay` if `capture` is given."""
        if capture is None:
            self.launch()
            return
        self._runner.run(self.inputs, self._runner.model.distinct_layers)
        self.replay = capture(self.launch)

    def launch(self) -> None:
        """The whole step, op by op."""
        self.result_RO.copy_(self._runner.run(self.inputs))


class InputShape:
    """Where each of the inputs of a bucket is in one piece of memory: `fields` are by the names of
    `PoolInputs` (first byte, number of values, dtype)."""

    def __init__(
        self, num_tokens: int, num_rows: int, has_types: bool, block_size: int, is_causal: bool
    ) -> None:
        self._block_size = block_size
        wide, narrow = torch.int64, torch.int32
        sizes: dict[str, tuple[int, torch.dtype]] = {
            "token_T": (num_tokens, wide),
            "pos_T": (num_tokens, wide),
            "start_S": (num_rows + 1, narrow),
            "chosen_R": (num_rows, wide),
        }
        if has_types:
            sizes["type_T"] = num_tokens, wide
        if is_causal:
            sizes |= {"slot_T": (num_tokens, wide), "block_R": (num_rows, narrow)}
        self.fields: dict[str, tuple[int, int, torch.dtype]] = {}
        self.num_bytes = 0
        for name, (size, dtype) in sizes.items():
            self.fields[name] = self.num_bytes, size, dtype
            self.num_bytes += -(-size * dtype.itemsize // ALIGNED) * ALIGNED

    def filled(self, sequences: Sequence[PoolSequence], *, is_last: bool) -> np.ndarray:
        """The bytes of all inputs, padded. `is_last`: rows are chosen by their last tokens, else by
        the first."""
        whole = np.zeros(self.num_bytes, np.uint8)
        at = {
            name: whole[first : first + size * dtype.itemsize].view(f"i{dtype.itemsize}")
            for name, (first, size, dtype) in self.fields.items()
        }
        len_R = np.array([len(one.token_ids) for one in sequences])
        end_R = len_R.cumsum()
        first_R, num_tokens, num_rows = end_R - len_R, int(end_R[-1]), len(sequences)
        ids = chain.from_iterable(one.token_ids for one in sequences)
        at["token_T"][:num_tokens] = np.fromiter(ids, np.int64, num_tokens)
        pos_T = np.arange(num_tokens) - np.repeat(first_R, len_R)
        at["pos_T"][:num_tokens] = pos_T
        at["start_S"][1 : num_rows + 1] = end_R
        at["start_S"][num_rows + 1 :] = num_tokens
        at["chosen_R"][:num_rows] = end_R - 1 if is_last else first_R
        if "type_T" in at:
            second_R = np.array([one.second_at or len(one.token_ids) for one in sequences])
            at["type_T"][:num_tokens] = pos_T >= np.repeat(second_R, len_R)
        if "slot_T" in at:
            num_R = -(-len_R // self._block_size)
            block_R = num_R.cumsum() - num_R
            at["block_R"][:num_rows] = block_R
            at["block_R"][num_rows:] = block_R[-1] + num_R[-1]
            at["slot_T"][:num_tokens] = pos_T + np.repeat(block_R * self._block_size, len_R)
            at["slot_T"][num_tokens:] = (block_R[-1] + num_R[-1]) * self._block_size
        return whole
