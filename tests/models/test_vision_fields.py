"""Every field of the configs of checkpoints with towers is honoured, refused by name, or unread.

What is compared are logits of texts and features of images, each with transformers'.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from nanovllm.runner.runner import Runner
from nanovllm.runner.tower import TowerSteps
from tests.models import test_vision_text, tower_cases
from tests.models.harness import engine_logits, load, max_difference, sequences
from tests.models.test_config_fields import HONOURED, LENGTH, OTHERS, TOLERANCE, UNREAD
from tests.models.test_vision_text import MODELS, saved

QWEN2_5, QWEN3, MOE = "qwen2_5", "qwen3", "qwen3_moe"
ALL = (QWEN2_5, QWEN3, MOE)
# the vision tower with experts is the one of Qwen3-VL
TOWERS = (QWEN2_5, QWEN3)
DEEP = (QWEN3,)
TEXT, VISION, WHOLE = "text_config", "vision_config", ""
KNOWN = sequences(77, (LENGTH - 2, LENGTH))
GRIDS = [(1, 12, 10), (2, 4, 6)]
# No logits depend on these: see `test_config_fields.OTHERS`.
NOT_READ: dict[str, Any] = {
    case.field: case.value for case in OTHERS if case.outcome == UNREAD and not case.beside
}
NOT_READ.pop("return_dict")  # transformers' own classes cannot read each other's results then
IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


@dataclass(frozen=True)
class Case:
    """Fields of one part of a config and what becomes of them: see `test_config_fields.Case`."""

    part: str
    values: dict[str, Any]
    outcome: str
    families: tuple[str, ...] = ALL
    beside: dict[str, Any] = field(default_factory=dict)
    draws: bool = False

    def __str__(self) -> str:
        shown = ",".join(f"{name}={str(value)[:20]}" for name, value in self.values.items())
        return f"{self.part}-{shown[:50]}"


def rope(**changes: Any) -> dict[str, Any]:
    base = {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [4, 2, 2]}
    return {"rope_parameters": {**base, **changes}}


WINDOW = {"sliding_window": 9, "layer_types": None, "max_window_layers": 1}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
TEXT_SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 4,
    "num_attention_heads": 3, "num_key_value_heads": 1,
}  # fmt: skip
SPARSE = {"num_experts": 3, "moe_intermediate_size": 16, "mlp_only_layers": [0, 3]}
VISION_SIZES = {
    "depth": 4, "hidden_size": 48, "intermediate_size": 40, "in_channels": 1, "patch_size": 6,
    "temporal_patch_size": 3, "out_hidden_size": 64,
}  # fmt: skip
AXIAL = {"rope_type": "axial", "rope_theta": 100.0}
CASES = (
    Case(TEXT, {"rms_norm_eps": 0.5}, HONOURED),
    Case(TEXT, {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    Case(TEXT, rope(), HONOURED),
    Case(TEXT, rope(**YARN), HONOURED, TOWERS),
    Case(TEXT, rope(mrope_interleaved=True), HONOURED, (QWEN3,)),
    Case(TEXT, rope(mrope_interleaved=False), "mrope_interleaved False", (QWEN3, MOE)),
    Case(TEXT, rope(mrope_interleaved=True), HONOURED, (QWEN2_5,)),  # the theta
    Case(TEXT, rope(mrope_section=[2, 3]), r"mrope_section is \[2, 3\]: it must be three"),
    Case(TEXT, rope(mrope_section=[2, 3, 4]), "mrope_section has 9 freq", (QWEN2_5,)),
    Case(TEXT, rope(mrope_section=[6, 2, 2]), "mrope_section has 10 freq", (QWEN3, MOE)),
    Case(TEXT, rope(mrope_section=[2, 3, 3]), HONOURED, (QWEN3, MOE)),  # the last place is 7
    Case(TEXT, rope(mrope_section=None), "mrope_section is None"),
    Case(TEXT, {"attention_bias": True}, HONOURED, (QWEN3, MOE), draws=True),
    Case(TEXT, {"attention_bias": True}, UNREAD, (QWEN2_5,)),
    Case(TEXT, {"use_sliding_window": True}, HONOURED, (QWEN2_5,), WINDOW),
    Case(TEXT, {**WINDOW, "max_window_layers": 0}, UNREAD, (QWEN2_5,), {"layer_types": None}),
    Case(TEXT, {"sliding_window": 9, "use_sliding_window": True}, UNREAD, (QWEN3, MOE)),
    Case(TEXT, TEXT_SIZES, HONOURED, (QWEN2_5,), {"out_hidden_size": 48}, draws=True),
    Case(TEXT, {**TEXT_SIZES, "head_dim": 16}, HONOURED, (QWEN3,), {"out_hidden_size": 48}, True),
    Case(
        TEXT,
        {**TEXT_SIZES, **SPARSE, "head_dim": 16},
        HONOURED,
        (MOE,),
        {"out_hidden_size": 48},
        True,
    ),
    Case(TEXT, {"num_experts_per_tok": 3}, HONOURED, (MOE,)),
    Case(TEXT, {"num_experts_per_tok": 6}, "num_experts_per_tok is 6", (MOE,)),
    Case(TEXT, {"decoder_sparse_step": 2, "mlp_only_layers": []}, HONOURED, (MOE,), draws=True),
    Case(TEXT, {"norm_topk_prob": False}, UNREAD, (MOE,)),
    Case(TEXT, {"output_router_logits": True, "router_aux_loss_coef": 0.5}, UNREAD, (MOE,)),
    Case(TEXT, {"tie_word_embeddings": False}, UNREAD, (MOE,)),  # the whole config's counts
    Case(TEXT, {**NOT_READ, "max_position_embeddings": 77}, UNREAD),
    Case(VISION, VISION_SIZES, HONOURED, TOWERS, draws=True),
    Case(VISION, {"num_heads": 4}, HONOURED, TOWERS),
    Case(VISION, {"num_heads": 3}, "hidden_size 32 must be its 3 heads", TOWERS),
    Case(VISION, {"hidden_act": "relu"}, "hidden_act 'relu' of the vision tower", TOWERS),
    Case(VISION, {"spatial_merge_size": 1}, HONOURED, TOWERS, draws=True),
    Case(VISION, {"rope_parameters": AXIAL}, HONOURED, TOWERS),
    Case(VISION, {"rope_theta": 100.0}, HONOURED, TOWERS, {"rope_parameters": None}),
    Case(VISION, {"rope_parameters": {**AXIAL, "rope_type": "linear", "factor": 2.0}},
         "rope_type 'linear'", TOWERS),
    Case(VISION, {"patch_size": [4, 4]}, r"patch_size of the vision tower is \[4, 4\]", TOWERS),
    Case(VISION, {"fullatt_block_indexes": [0]}, HONOURED, (QWEN2_5,)),
    Case(VISION, {"fullatt_block_indexes": [7]}, "block 7 of the vision tower", (QWEN2_5,)),
    Case(VISION, {"window_size": 24}, HONOURED, (QWEN2_5,)),
    Case(VISION, {"tokens_per_second": 9}, UNREAD, (QWEN2_5,)),  # positions of videos
    Case(VISION, {"num_position_embeddings": 49}, HONOURED, DEEP, draws=True),
    Case(VISION, {"num_position_embeddings": 50}, "num_position_embeddings 50", DEEP),
    Case(VISION, {"deepstack_visual_indexes": [1]}, HONOURED, DEEP, draws=True),
    Case(VISION, NOT_READ, UNREAD, TOWERS),
    Case(WHOLE, {"tie_word_embeddings": True}, HONOURED, draws=True),
    # `nanovllm/media` reads which tokens stand for images; the engine's `dtype` counts
    Case(WHOLE, {**NOT_READ, **dict(zip(IDS, (80, 81, 82, 83))), "dtype": "float32"}, UNREAD),
)  # fmt: skip
PAIRS = [pytest.param(name, case, id=f"{name}-{case}") for case in CASES for name in case.families]


@pytest.mark.parametrize("family", ALL)
def test_every_field_of_configs_with_towers_has_a_case(family: str) -> None:
    whole = MODELS[family]().config
    parts = {WHOLE: whole, TEXT: whole.text_config}
    if family in TOWERS:
        parts[VISION] = whole.vision_config
    for part, config in parts.items():
        decided = {
            name
            for case in CASES
            if case.part == part and family in case.families
            for name in case.values
        }
        known = {"text_config", "vision_config", "architectures", "return_dict", *decided}
        assert {field.name for field in fields(config)} - known == set(), part


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("plain")
    for family in ALL:
        saved(family, folder / family)
    return {family: folder / family for family in ALL}


def drawn(family: str, case: Case, folder: Path) -> Path:
    """A checkpoint whose config has the case's fields."""
    made = MODELS[family]()
    config = json.loads(made.config.to_json_string(use_diff=False))
    for part in (TEXT, VISION):
        config[part].pop("layer_types", None)
    if "out_hidden_size" in case.beside:
        config[VISION].update(case.beside)
    (config[case.part] if case.part else config).update(case.values)
    changed = type(made.config)(**config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(test_vision_text.MODELS, "drawn", lambda: type(made)(changed))
        saved("drawn", folder)
    return folder


def edited(plain: Path, folder: Path, part: str, changes: dict[str, Any]) -> Path:
    shutil.copytree(plain, folder, dirs_exist_ok=True)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (config[part] if part else config).update(changes)
    path.write_text(json.dumps(config))
    return folder


@torch.no_grad()
def expected(folder: Path) -> list[Tensor]:
    """transformers' logits of a text, and features of images."""
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", return_dict=True
    ).eval()
    logits = model(torch.tensor([KNOWN[0].token_ids])).logits[0]
    return [logits, tower_cases.expected(model, pixels(model.config.vision_config), GRIDS)]


def pixels(vision: Any) -> Tensor:
    numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return tower_cases.patches(GRIDS, numbers)


def found(runner: Runner) -> list[Tensor]:
    steps = runner.towers.by_name["vision"]
    assert isinstance(steps, TowerSteps)
    shape = steps.tower.config.patch_size
    with torch.no_grad():
        features = steps.features(tower_cases.patches(GRIDS, shape), GRIDS)
    return [*engine_logits(runner, KNOWN), features]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(left, right))


@cache
def usual(folder: Path) -> list[Tensor]:
    return expected(folder)


@pytest.mark.parametrize(("family", "case"), PAIRS)
def test_a_field_of_a_config_with_a_tower_is_honoured_or_refused(
    family: str, case: Case, plain: dict[str, Path], tmp_path: Path
) -> None:
    options = {"enforce_eager": True, "max_model_len": LENGTH, "num_kvcache_blocks": 17}
    if case.draws:
        folder = drawn(family, case, tmp_path)
    else:
        folder = edited(plain[family], tmp_path, case.part, {**case.beside, **case.values})
    if case.outcome not in (HONOURED, UNREAD):
        with pytest.raises(ValueError, match=case.outcome):
            load(folder, "cpu", **options)
        return
    wanted, before = expected(folder), usual(plain[family])
    if case.beside and not case.draws:
        before = expected(edited(plain[family], tmp_path / "usual", case.part, case.beside))
    assert same(wanted, before) == (case.outcome == UNREAD)
    assert max_difference(found(load(folder, "cpu", **options)), wanted) <= TOLERANCE
