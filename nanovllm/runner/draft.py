"""A second, smaller model that drafts tokens: its layers have caches over the same block tables.

R rows | T tokens | K draft tokens a row | M positions
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nanovllm.compile.program import Compiler, Region
from nanovllm.models.config import ModelConfig
from nanovllm.models.model import Model, Params
from nanovllm.models.rope import rotary_table
from nanovllm.platforms.attention import Attention
from nanovllm.runner.allocation import paged_cache
from nanovllm.runner.proposer import Drafting, Fed
from nanovllm.runner.spec import EngineSpec
from nanovllm.runner.state import DeviceState
from nanovllm.runner.step_regions import Table
from nanovllm.runner.steps import Steps

PREFIX = "draft_"  # in the names of programs


@dataclass(frozen=True)
class DraftModel:
    """The proposer that runs the second model. It draws with the rows' temperatures and the noise
    of their seeds, so with equal logits both models choose the same token."""

    num: int
    layers: tuple[int, ...] = field(default=(), init=False)

    def propose(self, state: DeviceState, fed: Fed, steps: Steps) -> Tensor | None:
        """See `DeviceProposer`. K + 1 passes: over the step's own tokens, then token by token.

        A draft token at a position without a block is a poor one: its pass uses the padding block.
        """
        steps.feed(fed)
        own = steps.state._replace(token_S=state.token_S.clone(), pos_S=state.pos_S.clone())
        ahead, last_pos = replace(steps, state=own), steps.cos_sin_MH.shape[0] - 1
        found = []
        for _ in range(self.num):
            own.pos_S.clamp_(max=last_pos)
            found.append(ahead.decode(fed.row_idx_R)[0])
        return torch.stack(found, 1) if found else None


class NamedPrograms(Compiler):
    """Builds the second model's programs with a compiler, under names of their own."""

    def __init__(self, compiler: Compiler) -> None:
        super().__init__(compiler.lowering)
        self._compiler = compiler

    def program(
        self, name: str, key: tuple[object, ...], function: Region, inputs: dict[str, object]
    ) -> Callable[..., Any]:
        return self._compiler.program(PREFIX + name, key, function, inputs)


class DraftParts:
    """What a runner has for its proposer. Its memory is that of the state and of the cache."""

    def __init__(
        self, spec: EngineSpec, params: Params, state: DeviceState, cfg: ModelConfig
    ) -> None:
        """`cfg` is the config of the model whose tokens are drafted."""
        assert spec.draft is not None
        self._draft, self._params, self._layout = spec.draft, params.draft, spec.layout
        self._state, self._attention = state, spec.attention
        device, layers = state.token_S.device, spec.draft.proposer.layers
        self._states_TLD: Tensor | None = None
        if layers:
            num_tokens = max(spec.layout.prefill_tokens[-1], spec.layout.logits_rows[-1])
            shape = (num_tokens, len(layers), cfg.hidden_size)
            self._states_TLD = torch.zeros(shape, dtype=cfg.dtype, device=device)
        self._tables: list[Tensor] = []
        if (model := spec.draft.model) is not None:
            size, head_dim = spec.layout.max_model_len, model.config.head_dim
            ropes = model.config.ropes
            self._tables = [rotary_table(*rope, size, device, head_dim) for rope in ropes]

    def drafting(
        self, num_blocks: int, zeros: Callable[..., Tensor], compiler: Compiler
    ) -> Drafting:
        """The proposer over caches of so many blocks; `zeros(shape, dtype)` allocates them."""
        model = self._draft.model
        steps = None if model is None else self._steps(model, num_blocks, zeros, compiler)
        facts = self._draft.reads_last, self._draft.reads_fed, self._draft.varies
        return Drafting(self._draft.proposer, steps, self._states_TLD, *facts)

    def _steps(
        self, model: Model, num_blocks: int, zeros: Callable[..., Tensor], compiler: Compiler
    ) -> Steps:
        dtype, block_size = model.config.dtype, self._layout.block_size
        kept = model.page_groups.groups[0].kept
        first, *others = self._tables
        attention: Attention = self._attention
        return Steps(
            model=model,
            attention=attention,
            params=self._params,
            caches=tuple(
                paged_cache(
                    kept, [zeros(shape, dtype) for shape in kept.shapes(num_blocks, block_size)]
                )
                for _ in model.layer_kinds
            ),
            cos_sin_MH=first,
            other_tables=tuple(map(Table, others)),
            # the second model proposes nothing itself and has no adapters, and all its layers have
            # the first table
            state=self._state._replace(
                draft_SK=None,
                history_SM=None,
                past_C=None,
                adapter_S=None,
                block_tables=self._state.block_tables[:1],
            ),
            compiler=NamedPrograms(compiler),
        )
