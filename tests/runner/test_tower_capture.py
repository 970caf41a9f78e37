"""Captured calls of vision towers give the features of calls that are launched op by op."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm import platforms
from nanovllm.compile.program import Compiler
from nanovllm.models.loader import Target
from nanovllm.models.vision import weights
from nanovllm.models.vision.registry import tower
from nanovllm.platforms.base import Platform, Replay
from nanovllm.runner.step_regions import FROZEN
from nanovllm.runner.tower import TowerSteps
from tests.models import tower_cases

BUDGETS = (64, 256)
# one call of each budget, several calls, and frames that are larger than all budgets
CASES = [
    [(1, 2, 2)],
    [(1, 14, 10)],
    [(1, 2, 62), (3, 6, 10)],
    [(1, 12, 14), (1, 10, 10), (1, 2, 18)],
    [(1, 2, 2), (1, 20, 18), (1, 4, 4)],
]


def steps(folder: Path, model: Any, platform: Platform, compiler: Compiler) -> TowerSteps:
    made = tower(model.config.vision_config, torch.float32)
    loaded = weights.load(made, folder, Target(platform.device))
    return TowerSteps(made, loaded, platform, compiler, BUDGETS)


@pytest.fixture(params=tower_cases.TOWERS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any]:
    """A checkpoint's folder, and transformers' model of it."""
    return tmp_path, tower_cases.save(tmp_path, request.param)


def difference(left: Tensor, right: Tensor) -> float:
    assert left.shape == right.shape
    return (left.cpu() - right.cpu()).abs().nan_to_num(torch.inf).max().item()


@torch.no_grad()
def test_captured_calls_replay_with_the_inputs_of_each_call(saved: tuple[Path, Any]) -> None:
    platform = platforms.select("cpu")
    platform.prepare()
    made = steps(*saved, platform, Compiler(lowering=None))
    replays: list[Callable[[], None]] = []

    def capture(step: Callable[[], None]) -> Replay:
        def replay() -> None:
            replays.append(step)
            step()

        return replay

    pixels = [tower_cases.patches(grids) for grids in CASES]
    expected = [made.features(one, grids) for one, grids in zip(pixels, CASES)]
    made.capture(capture)
    for one, grids, features in zip(pixels, CASES, expected):
        assert difference(made.features(one, grids), features) == 0
    assert len(replays) == 1 + 1 + 2 + 2 + 2  # calls of the cases; not those beyond the budgets


@pytest.mark.gpu
@torch.no_grad()
def test_a_gpu_gives_transformers_features_compiled_and_captured(saved: tuple[Path, Any]) -> None:
    platform = platforms.select("cuda")
    platform.prepare()
    lowering, why = platform.lowering()
    assert lowering is not None, why
    compiler = Compiler(lowering, platform.passes(fuse=True), strict=True, frozen=FROZEN)
    made = steps(*saved, platform, compiler)
    eager = steps(*saved, platform, Compiler(lowering=None))
    for grids in CASES:  # builds all programs
        made.features(tower_cases.patches(grids), grids)
    compiler.seal()
    made.capture(platform.capture)
    for grids in CASES:
        pixels = tower_cases.patches(grids)
        expected = tower_cases.expected(saved[1], pixels, grids)
        for one in (eager, made):
            assert difference(one.features(pixels, grids), expected) <= 1e-4
