"""Proposers of tests, and engines that have one on their device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanovllm import SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.engine.engine import Engine
from nanovllm.runner.draft import DraftModel
from nanovllm.runner.proposer import DeviceProposer, Fed
from nanovllm.runner.state import DeviceState
from nanovllm.schedule.outputs import FinishedOutput
from nanovllm.schedule.plan import DRAFT, StepPlan
from nanovllm.startup.draft import Draft
from nanovllm.startup.load import load

SIZES: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "max_num_seqs": 6, "max_num_batched_tokens": 64,
    "max_model_len": 256, "kvcache_block_size": 16, "num_kvcache_blocks": 100,
}  # fmt: skip
MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "unpadded": {"enforce_eager": True, "tuning": {"pad_batches": False}},
    "graph": {"graph_batch_sizes": (2, 6)},
}


@dataclass(frozen=True)
class Repeat:
    """Drafts that the newest token repeats."""

    num: int
    layers: tuple[int, ...] = ()

    def propose(self, state: DeviceState, fed: Fed, steps: Any) -> Tensor:
        token_R = state.token_S.index_select(0, fed.row_idx_R)
        return token_R.unsqueeze(1).expand(-1, self.num)


@dataclass(frozen=True)
class Spoiled:
    """A draft model with a wrong token at every third position."""

    num: int
    layers: tuple[int, ...] = ()

    def propose(self, state: DeviceState, fed: Fed, steps: Any) -> Tensor:
        token_RK = DraftModel(self.num).propose(state, fed, steps)
        pos_R = state.pos_S.index_select(0, fed.row_idx_R)
        pos_RK = pos_R.unsqueeze(1) + torch.arange(self.num, device=pos_R.device)
        return torch.where(pos_RK % 3 == 0, (token_RK + 1) % 512, token_RK)


@dataclass(frozen=True)
class Reading:
    """Reads the hidden states after two layers, and drafts as `Repeat` does."""

    num: int
    layers: tuple[int, ...] = (1, 0)
    seen: list[Fed] = field(default_factory=list, repr=False, compare=False)

    def propose(self, state: DeviceState, fed: Fed, steps: Any) -> Tensor:
        assert fed.states_TJ is not None
        self.seen.append(fed._replace(states_TJ=fed.states_TJ.clone()))
        return Repeat(self.num).propose(state, fed, steps)


def make(
    folder: Path, proposer: DeviceProposer, model: Path | None = None, **options: Any
) -> Engine:
    """An engine with a proposer on its device, and with run-ahead."""
    config = config_of(folder, {"draft_lengths": (proposer.num,), **options})
    draft = Draft(proposer, None if model is None else str(model))
    return Engine(load(config, show_progress=False, draft=draft))


def config_of(folder: Path, options: dict[str, Any]) -> EngineConfig:
    """Small sizes, with run-ahead."""
    tuning = {"run_ahead": 1, **options.pop("tuning", {})}
    return EngineConfig.from_options(str(folder), {**SIZES, "tuning": tuning, **options})


@dataclass
class Watched:
    """The plans that a runner got: with the number of steps whose results were unknown then, and
    with the tokens that verifying steps gave."""

    plans: list[tuple[StepPlan, int]] = field(default_factory=list)

    def watch(self, engine: Engine, monkeypatch: Any) -> None:
        launch = engine.runner.launch

        def noting(plan: StepPlan) -> Any:
            self.plans.append((plan, len(engine._in_flight)))
            return launch(plan)

        monkeypatch.setattr(engine.runner, "launch", noting)

    @property
    def verifying(self) -> list[tuple[StepPlan, int]]:
        """Those with draft tokens of the device."""
        return [one for one in self.plans if DRAFT in one[0].token_T]


def run(
    engine: Engine, prompts: Sequence[list[int]], params: SamplingParams | list[SamplingParams]
) -> list[FinishedOutput]:
    """Answers to prompts in one batch."""
    each = params if isinstance(params, list) else [params] * len(prompts)
    ids = [engine.add_request(*one, incremental=False) for one in zip(prompts, each)]
    done: dict[int, FinishedOutput] = {}
    while engine.has_unfinished:
        for output in engine.step():
            if output.completion is not None:
                done[output.request_id] = output.completion
    pool = engine.scheduler.cache.pool
    assert pool.num_free == pool.num_blocks - 1 and not any(pool._num_refs)
    return [done[one] for one in ids]


def tokens(*args: Any) -> list[list[int]]:
    return [one.token_ids for one in run(*args)]
