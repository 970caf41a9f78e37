"""Configs of vision towers: which ones there are, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.models.loader import Target
from nanovllm.models.model import Param
from nanovllm.models.vision import weights
from nanovllm.models.vision.registry import tower
from tests.models import tower_cases

TARGET = Target(torch.device("cpu"))


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("qwen2_5_vl", {"hidden_act": "gelu"}, "hidden_act 'gelu' .* only 'silu' is"),
        ("qwen3_vl", {"hidden_act": "silu"}, "hidden_act 'silu' .* only 'gelu_pytorch_tanh' is"),
        ("qwen3_vl", {"num_position_embeddings": 50}, "num_position_embeddings 50 .* a square"),
        ("qwen3_vl", {"deepstack_visual_indexes": [2, 0]}, r"\[2, 0\] must ascend"),
        ("qwen3_vl", {"deepstack_visual_indexes": [5]}, "block 5 .* it has 5"),
        ("qwen2_5_vl", {"fullatt_block_indexes": [7]}, "block 7 .* it has 5"),
        ("qwen2_5_vl", {"window_size": 7}, "window_size is smaller than the patches"),
        ("qwen2_5_vl", {"patch_size": [4, 4]}, r"patch_size .* is \[4, 4\]: it must be one number"),
        ("qwen3_vl", {"num_heads": 5}, "hidden_size 48 must be its 5 heads"),
        ("qwen3_vl", {"out_hidden_size": 0}, "out_hidden_size .* is 0: it must be at least 1"),
    ],
)
def test_settings_that_no_region_computes_are_refused(
    name: str, changes: dict[str, Any], message: str
) -> None:
    vision = tower_cases.config(name).vision_config
    for field, value in changes.items():
        setattr(vision, field, value)
    with pytest.raises(ValueError, match=message):
        tower(vision, torch.float32)


def test_an_unknown_tower_is_refused_and_the_known_ones_are_listed() -> None:
    from transformers import Qwen2VLConfig

    vision = Qwen2VLConfig().vision_config
    with pytest.raises(ValueError, match=r"'qwen2_vl_vision' is not supported: only .*qwen3_vl_vi"):
        tower(vision, torch.float32)


def test_the_tower_of_the_moe_form_is_that_of_the_dense_form() -> None:
    from transformers import Qwen3VLConfig, Qwen3VLMoeConfig

    sizes = {**tower_cases.VISION, **tower_cases.TOWERS["qwen3_vl"]}
    dense, moe = (
        tower(made(vision_config=sizes).vision_config, torch.float32)
        for made in (Qwen3VLConfig, Qwen3VLMoeConfig)
    )
    assert dense == moe


@pytest.mark.parametrize("name", tower_cases.TOWERS)
def test_random_weights_have_the_shapes_of_a_checkpoints(name: str) -> None:
    made = tower(tower_cases.config(name).vision_config, torch.bfloat16)
    names = dict(tower_cases.model(name).model.visual.named_parameters())
    declared: list[str] = []

    def declare(param: Param) -> Tensor:
        declared.extend(param.sources)
        return torch.empty(0)

    drawn = weights.random(made, TARGET, seed=1)
    made.build(declare)
    assert sorted(declared) == sorted(names)
    leaves = [leaf for group in (drawn.outer, *drawn.blocks, *drawn.mergers) for leaf in group]
    sizes = [leaf.numel() for leaf in leaves if leaf is not None]
    assert sum(sizes) == sum(parameter.numel() for parameter in names.values())
    assert all(leaf.dtype == torch.bfloat16 for leaf in leaves if leaf is not None)


def test_random_weights_follow_their_seed() -> None:
    made = tower(tower_cases.config("qwen3_vl").vision_config, torch.float32)
    one, same, other = (weights.random(made, TARGET, seed).outer for seed in (1, 1, 2))
    assert torch.equal(one.patch_DCTPP, same.patch_DCTPP)
    assert not torch.equal(one.patch_DCTPP, other.patch_DCTPP)
