"""The device's side of a model that pools: steps of whole sequences, which keep nothing.

T tokens | R rows (sequences) | S = R + 1 | D hidden | O numbers of a result | M positions
H head size | B tokens of a block of memory for keys and values
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.compile import buckets
from nanovllm.compile.program import Compiler
from nanovllm.compile.trace import tensors
from nanovllm.kernels import ops
from nanovllm.models.layer_state import PagedKV
from nanovllm.models.model import Batch, LayerCache, LayerCall, Model
from nanovllm.models.pooling import Pooler, PoolInputs, PoolWeights, pool
from nanovllm.models.rope import rotary_table
from nanovllm.platforms.base import HostCopy, Platform, Replay
from nanovllm.runner.no_grad import without_grad

BLOCK = 16  # tokens; steps have a multiple of it


@dataclass(frozen=True)
class PoolLayout:
    """The static sizes of steps: `tokens` ascend. Without `pad` a step has the tokens that it
    needs."""

    tokens: tuple[int, ...]
    max_rows: int
    pad: bool = True

    def bucket(self, num_tokens: int, num_rows: int) -> tuple[int, int]:
        """(T, R) of a step."""
        if not self.pad:
            return -(-num_tokens // BLOCK) * BLOCK, num_rows
        tokens = buckets.smallest_fit(self.tokens, num_tokens)
        return tokens, self.rows(tokens)

    def rows(self, num_tokens: int) -> int:
        """R of a bucket."""
        return min(num_tokens, self.max_rows)


class PoolSequence(NamedTuple):
    """One sequence of a step. second_at: where the second of two texts begins, 0 for one text."""

    token_ids: Sequence[int]
    second_at: int = 0


class PoolRunner:
    """Runs steps of a model that pools. Programs are built on first use; `warm_up` uses every
    bucket."""

    def __init__(
        self,
        model: Model,
        params: PoolWeights,
        layout: PoolLayout,
        platform: Platform,
        compiler: Compiler,
        *,
        max_model_len: int,
        capture: bool = True,
    ) -> None:
        self.model, self.params, self.layout = model, params, layout
        self.platform, self.compiler = platform, compiler
        self.pooler: Pooler = model.pooler
        self._captures = capture and compiler.lowering is not None and layout.pad
        cfg = model.config
        self._tables = [
            rotary_table(*rope, max_model_len, platform.device, cfg.head_dim) for rope in cfg.ropes
        ]
        self._memory = self._new_memory() if self.pooler.is_causal else {}
        self._steps: dict[int, PoolStep] = {}

    def _new_memory(self) -> dict[tuple[int, ...], LayerCache]:
        """Memory for the keys and values of a step, which all layers of one shape share, by their
        numbers of heads and head sizes."""
        num_blocks = self.layout.tokens[-1] // BLOCK
        found: dict[tuple[int, ...], LayerCache] = {}
        for kept in dict.fromkeys(self.model.kept):
            assert isinstance(kept, PagedKV)
            shapes = kept.shapes(num_blocks, BLOCK)
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

    @without_grad
    def warm_up(self, progress: Callable[[str], object]) -> None:
        """Build, run and capture the step of every bucket, and seal the compiler."""
        if not self.layout.pad:
            return
        # from the largest down: captured steps share one memory pool, and the first one sizes it
        for num_tokens in reversed(self.layout.tokens):
            progress(f"pooling {num_tokens}")
            self._step(num_tokens, self.layout.rows(num_tokens))
        self.platform.synchronize()
        self.compiler.seal()

    @without_grad
    def launch(self, sequences: Sequence[PoolSequence]) -> HostCopy:
        """Start a step; returns the copy of its results [R, O], in fp32, R at least the number of
        sequences."""
        num_tokens = sum(len(one.token_ids) for one in sequences)
        step = self._step(*self.layout.bucket(num_tokens, len(sequences)))
        step.fill(sequences)
        step.replay()
        return self.platform.read_back(step.result_RO)

    def close(self) -> None:
        """Drop everything that holds device memory."""
        self.platform.synchronize()
        for step in self._steps.values():
            step.__dict__.clear()
        self._steps.clear()
        for name in ("params", "compiler", "_memory", "_tables"):
            self.__dict__.pop(name, None)
        self.platform.release()

    def _step(self, num_tokens: int, num_rows: int) -> PoolStep:
        found = self._steps.get(num_tokens)
        if found is not None:
            return found
        made = PoolStep(self, num_tokens, num_rows)
        if self.layout.pad:
            made.capture(self.platform.capture if self._captures else None)
            self._steps[num_tokens] = made
        return made

    # regions ----------------------------------------------------------------------------------

    def run(self, inputs: PoolInputs, layers: Sequence[int] | None = None) -> Tensor:
        """A step, op by op: results [R, O]. `layers` are all unless they are given."""
        cfg, pooler, outer = self.model.config, self.pooler, self.params.outer
        key = (len(inputs.token_T), len(inputs.chosen_R))
        h_TD = self._run("embed", key, partial(pooler.embed, cfg), params=outer, inputs=inputs)
        batch = _batch(inputs)
        programs = self.model.layer_programs(keeps_last=pooler.pooling != "mean")
        chosen = range(len(programs)) if layers is None else layers
        for layer_idx in chosen:
            name, kind = programs[layer_idx]
            keep_R = inputs.chosen_R if name == "last_layer" else None
            h_TD = self._run(
                name,
                (*key, kind.name),
                partial(self.model.layer, cfg, LayerCall(ops.IN_STEP, kind, key[0])),
                w=self.params.layers[layer_idx],
                kv=self._memory_of(layer_idx, key[0]),
                cos_sin_MH=self._table_of(layer_idx),
                batch=batch._replace(keep_R=keep_R),
                h_TD=h_TD,
            )
        region = partial(pool, cfg, pooler.pooling, pooler.norm, pooler.head)
        return self._run("pool", key, region, params=outer, inputs=inputs, h_XD=h_TD)

    def _memory_of(self, layer_idx: int, num_tokens: int) -> LayerCache | None:
        if not self._memory:
            return None
        kept = self.model.kept[layer_idx]
        assert isinstance(kept, PagedKV)
        num_blocks = num_tokens // BLOCK
        whole = self._memory[kept.shapes(1, BLOCK)[0][2:]]
        return LayerCache(whole.k_CBKH[:num_blocks], whole.v_CBKH[:num_blocks])

    def _table_of(self, layer_idx: int) -> Tensor:
        ropes = self.model.layer_ropes
        return self._tables[ropes[layer_idx] if ropes else 0]

    def _run(
        self, name: str, key: tuple[object, ...], function: Callable[..., Any], **inputs: object
    ) -> Any:
        program = self.compiler.program(f"pooling_{name}", key, function, inputs)
        return program(*inputs.values())


def _batch(inputs: PoolInputs) -> Batch:
    """The inputs of layers: token t writes its key and value to slot t. No block table is read."""
    start_S = inputs.start_S
    none_R0 = start_S.new_empty((len(inputs.chosen_R), 0))
    slot_T = torch.arange(len(inputs.token_T), device=start_S.device)
    return Batch(inputs.pos_T, slot_T, none_R0, start_S.diff(), start_S)


class PoolStep:
    """The static inputs and results of a bucket. Initially all padding."""

    def __init__(self, runner: PoolRunner, num_tokens: int, num_rows: int) -> None:
        device = runner.platform.device

        def zeros(size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.inputs = PoolInputs(
            zeros(num_tokens),
            zeros(num_tokens),
            zeros(num_rows + 1, torch.int32),
            zeros(num_rows),
            zeros(num_tokens) if runner.pooler.has_types else None,
        )
        size = (num_rows, runner.pooler.size)
        self.result_RO = torch.zeros(size, dtype=torch.float32, device=device)
        self._runner = runner
        self.replay: Replay = self.launch

    def fill(self, sequences: Sequence[PoolSequence]) -> None:
        """Copy sequences to the static inputs. Does not synchronise."""
        arrays = pool_arrays(self._runner.pooler, self.inputs, sequences)
        for target, values in zip(tensors(self.inputs), arrays):
            self._runner.platform.write(target, values)

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


def pool_arrays(
    pooler: Pooler, inputs: PoolInputs, sequences: Sequence[PoolSequence]
) -> list[np.ndarray]:
    """The fields of inputs on the host, padded to their sizes."""
    token_T, pos_T, start_S, chosen_R = (
        np.zeros(len(one), np.int32 if one is inputs.start_S else np.int64) for one in inputs[:4]
    )
    type_T = np.zeros_like(token_T)
    start = 0
    for row, one in enumerate(sequences):
        end = start + len(one.token_ids)
        token_T[start:end] = one.token_ids
        pos_T[start:end] = np.arange(end - start)
        if one.second_at:
            type_T[start + one.second_at : end] = 1
        start_S[row + 1] = end
        chosen_R[row] = end - 1 if pooler.pooling == "last" else start
        start = end
    start_S[len(sequences) + 1 :] = start
    return [token_T, pos_T, start_S, chosen_R, *([type_T] if pooler.has_types else [])]
