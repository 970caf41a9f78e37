"""Vision towers give transformers' features for all sizes and mixes, eager and compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanovllm.compile.passes.replace_ops import replace_ops
from nanovllm.compile.program import Compiler
from nanovllm.compile.store import Store
from nanovllm.models.checkpoint import CheckpointError
from nanovllm.models.loader import Target
from nanovllm.models.vision import layout as layouts
from nanovllm.models.vision import weights
from nanovllm.models.vision.budgets import BUDGETS as BUDGETS_OF_ENGINES
from nanovllm.models.vision.budgets import budgets
from nanovllm.models.vision.registry import tower
from nanovllm.platforms import cpu
from nanovllm.platforms.base import Platform
from nanovllm.runner.step_regions import FROZEN
from nanovllm.runner.tower import TowerSteps
from tests.models import tower_cases
from tests.models.tower_cases import BUDGETS

TOLERANCE = 1e-4
NAMES = tuple(tower_cases.TOWERS)
Grids = list[tuple[int, int, int]]
CASES: dict[str, Grids] = {
    "one token": [(1, 2, 2)],
    "thin": [(1, 2, 62)],
    "full budget": [(1, 16, 16)],
    "one more than a budget": [(1, 2, 34)],
    "odd": [(1, 14, 10)],
    "two": [(1, 6, 10), (1, 10, 6)],
    "three": [(1, 2, 2), (1, 18, 10), (1, 4, 2)],
    "several calls": [(1, 12, 14), (1, 10, 10), (1, 2, 18)],
    "video of two frames": [(1, 8, 6)],
    "video of 16 frames": [(8, 6, 10)],
    "video over several calls": [(7, 8, 10), (1, 2, 2)],
    "larger than all budgets": [(1, 2, 2), (1, 20, 18), (1, 4, 4)],
    "as a picture of 1,024 by 1,024": [(1, 64, 64)],
}


@pytest.fixture(scope="module")
def platform() -> Platform:
    made = cpu.create(0, {})
    made.prepare()
    return made


@pytest.fixture(scope="module", params=NAMES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint's folder, and transformers' model of it."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, tower_cases.save(folder, request.param)


@pytest.fixture(scope="module")
def eager(saved: Any, platform: Platform) -> TowerSteps:
    return steps(*saved, platform, Compiler(lowering=None))


@pytest.fixture(scope="module")
def compiled(
    saved: Any, platform: Platform, tmp_path_factory: pytest.TempPathFactory
) -> TowerSteps:
    """Programs for all budgets; a later compile is an error."""
    store = Store(tmp_path_factory.mktemp("store"))
    return warm(steps(*saved, platform, compiler(platform, store)))


def compiler(platform: Platform, store: Store) -> Compiler:
    lowering, why = platform.lowering()
    assert lowering is not None, why
    return Compiler(lowering, platform.passes(fuse=True), strict=True, frozen=FROZEN, store=store)


def warm(made: TowerSteps) -> TowerSteps:
    for budget in made.budgets:
        made.run_budget(budget, few=True)
    made.compiler.seal()
    return made


def steps(
    folder: Path,
    model: Any,
    platform: Platform,
    compiler: Compiler,
    dtype: torch.dtype = torch.float32,
) -> TowerSteps:
    made = tower(model.config.vision_config, dtype)
    loaded = weights.load(made, folder, Target(platform.device))
    return TowerSteps(made, loaded, platform, compiler, BUDGETS)


def difference(left: Tensor, right: Tensor) -> float:
    """The largest absolute difference; infinite if there is a NaN."""
    assert left.shape == right.shape
    return (left.float() - right.float()).abs().nan_to_num(torch.inf).max().item()


@pytest.mark.parametrize("case", CASES)
def test_features_are_those_of_transformers(case: str, saved: Any, eager: TowerSteps) -> None:
    grids = CASES[case]
    pixels = tower_cases.patches(grids)
    expected = tower_cases.expected(saved[1], pixels, grids)
    assert difference(eager.features(pixels, grids), expected) <= TOLERANCE
    assert expected.std() > 0.1  # not features in which any mistake is small


def test_programs_of_each_budget_serve_all_sizes(saved: Any, compiled: TowerSteps) -> None:
    for grids in CASES.values():
        pixels = tower_cases.patches(grids)
        expected = tower_cases.expected(saved[1], pixels, grids)
        assert difference(compiled.features(pixels, grids), expected) <= TOLERANCE


def test_each_budget_has_few_programs(compiled: TowerSteps) -> None:
    """One of each region, and one for each kind of block and of merger."""
    assert compiled.compiler.num_compiled == len(BUDGETS) * 4


def test_a_second_start_compiles_nothing(
    saved: Any, platform: Platform, compiled: TowerSteps
) -> None:
    assert compiled.compiler.store is not None
    again = warm(steps(*saved, platform, compiler(platform, compiled.compiler.store)))
    assert again.compiler.num_compiled == 0
    grids = CASES["three"]
    pixels = tower_cases.patches(grids)
    assert difference(again.features(pixels, grids), compiled.features(pixels, grids)) == 0


def test_padding_is_never_read(eager: TowerSteps) -> None:
    cfg, grids = eager.tower.config, [(1, 6, 4), (1, 2, 6)]
    pixels = tower_cases.patches(grids)
    (call,) = layouts.calls(layouts.frames_of(grids, cfg.merge_size), BUDGETS)
    pixel_TC, layout = eager.inputs(call, pixels)
    pixel_TC[len(pixels) :] = torch.nan
    features = eager.run(pixel_TC, layout, eager.compiler)[:, : len(pixels) // 4]
    assert difference(features, eager.features(pixels, grids)) == 0


def test_images_do_not_see_each_other(eager: TowerSteps) -> None:
    grids: Grids = [(1, 6, 4), (1, 2, 6), (2, 4, 4)]
    pixels = tower_cases.patches(grids)
    together = eager.features(pixels, grids)
    sizes = [frames * rows * columns for frames, rows, columns in grids]
    alone = [eager.features(part, [grid]) for part, grid in zip(pixels.split(sizes), grids)]
    assert difference(together, torch.cat(alone, dim=1)) <= TOLERANCE


def test_bf16_features_are_as_close_as_those_of_transformers(
    saved: Any, platform: Platform
) -> None:
    folder, model = saved
    grids: Grids = [(1, 6, 10), (2, 8, 6)]
    pixels = tower_cases.patches(grids)
    exact = tower_cases.expected(model, pixels, grids)
    made = steps(folder, model, platform, Compiler(lowering=None), torch.bfloat16)
    ours = made.features(pixels, grids)
    assert ours.dtype == torch.bfloat16
    again = type(model).from_pretrained(folder, dtype=torch.bfloat16)
    theirs = tower_cases.expected(again, pixels, grids)
    error = (ours.float() - exact).abs().mean()
    assert error <= 1.2 * (theirs.float() - exact).abs().mean()


def test_features_of_the_processors_patches_are_those_of_transformers(
    saved: Any, eager: TowerSteps
) -> None:
    import numpy as np
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 2048}
    )
    generator = np.random.default_rng(0)
    sizes = [(1, 1), (3, 100), (31, 47)]
    images = [Image.fromarray(generator.integers(256, size=(*s, 3), dtype=np.uint8)) for s in sizes]
    made = processor(images, return_tensors="pt")
    grids = [tuple(grid) for grid in made["image_grid_thw"].tolist()]
    expected = tower_cases.expected(saved[1], made["pixel_values"], grids)
    assert difference(eager.features(made["pixel_values"], grids), expected) <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_both_spellings_of_checkpoints_give_the_same_weights(
    name: str, tmp_path: Path, platform: Platform
) -> None:
    grids: Grids = [(1, 6, 10)]
    pixels = tower_cases.patches(grids)
    features = []
    for original in (True, False):
        folder = tmp_path / str(original)
        model = tower_cases.save(folder, name, original=original)
        made = steps(folder, model, platform, Compiler(lowering=None))
        features.append(made.features(pixels, grids))
    assert difference(*features) == 0


def test_mlps_of_odd_widths_are_padded(tmp_path: Path, platform: Platform) -> None:
    model = tower_cases.save(tmp_path, "qwen2_5_vl", intermediate_size=51)
    made = steps(tmp_path, model, platform, Compiler(lowering=None))
    block = made.weights.blocks[0]
    assert block.down_DF.shape == (48, 56) and block.gate_up_VD.shape == (112, 48)
    grids: Grids = [(1, 6, 10)]
    pixels = tower_cases.patches(grids)
    expected = tower_cases.expected(model, pixels, grids)
    assert difference(made.features(pixels, grids), expected) <= TOLERANCE


def test_the_meaning_of_attention_can_be_part_of_a_graph(saved: Any, platform: Platform) -> None:
    """As on devices without a kernel for it."""
    plain = (("replace_ops", partial(replace_ops)),)

    def run_graph(graph: Any, fakes: Sequence[Tensor]) -> Any:
        assert not any("nanovllm" in str(node.target) for node in graph.graph.nodes)
        return graph

    made = steps(*saved, platform, Compiler(run_graph, plain))
    grids: Grids = [(1, 6, 4), (2, 2, 6)]
    pixels = tower_cases.patches(grids)
    expected = tower_cases.expected(saved[1], pixels, grids)
    assert difference(made.features(pixels, grids), expected) <= TOLERANCE


def test_patches_that_do_not_fit_the_grids_are_refused(eager: TowerSteps) -> None:
    with pytest.raises(ValueError, match=r"shape \[20, 96\], but their grids require \[24, 96\]"):
        eager.features(torch.zeros(20, 96), [(1, 6, 4)])


@pytest.mark.parametrize("asked", [(), (6,), (64, 2), (0, 64)])
def test_budgets_that_no_tower_can_have_are_refused(
    asked: tuple[int, ...], eager: TowerSteps
) -> None:
    with pytest.raises(
        ValueError, match=r"vision_patch_budgets is \[.*multiples of 4, the patches"
    ):
        budgets(eager.tower.config, asked)


def test_budgets_ascend_and_are_whole_tokens(eager: TowerSteps) -> None:
    cfg = eager.tower.config
    assert budgets(cfg, [256, 64, 64]) == (64, 256)
    of_nine = budgets(dataclasses.replace(cfg, merge_size=3), None)
    assert of_nine[:2] == (261, 513) and not any(size % 9 for size in of_nine)


def test_a_picture_wastes_less_than_half_of_its_call() -> None:
    for side in range(16, 80, 2):
        (call,) = layouts.calls(np.array([[side, side]]), BUDGETS_OF_ENGINES)
        assert call.budget is None or side**2 <= call.budget < max(257, 2 * side**2)
        assert (call.budget is None) == (side**2 > 6144)


def test_a_checkpoint_without_a_tower_is_refused(
    tiny_qwen3: Path, eager: TowerSteps, platform: Platform
) -> None:
    with pytest.raises(CheckpointError, match=r"has no tensors of a tower"):
        weights.load(eager.tower, tiny_qwen3, Target(platform.device))


def test_a_tower_with_more_blocks_than_its_config_says_is_refused(
    saved: Any, platform: Platform
) -> None:
    folder, model = saved
    fewer = tower_cases.config(model.config.model_type, depth=4)
    for name in ("fullatt_block_indexes", "deepstack_visual_indexes"):
        if hasattr(fewer.vision_config, name):
            setattr(fewer.vision_config, name, [0, 2, 3])
    made = tower(fewer.vision_config, torch.float32)
    with pytest.raises(CheckpointError, match=r"does not have, e\.g\. .*visual\.blocks\.4\."):
        weights.load(made, folder, Target(platform.device))
