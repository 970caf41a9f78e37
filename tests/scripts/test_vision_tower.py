"""The benchmark of vision towers: what it counts as work, what it runs, and what it compares."""

from __future__ import annotations

import torch

from nanovllm import platforms
from nanovllm.models.vision.layout import MAX_FRAMES
from scripts.bench import vision_shapes, vision_tower

DTYPE = torch.bfloat16


def test_work_is_that_of_the_formulas() -> None:
    """Those of `models/vision/vision_encoder`, and the products outside blocks."""
    for name, levels in (("Qwen3-VL-2B", 2), ("Qwen2.5-VL-3B", 1)):
        tower = vision_shapes.make_tower(name, DTYPE, depth=9)
        cfg, merged = tower.config, 4 * tower.config.hidden_size
        call = vision_shapes.full_call(cfg, 6000, 1024)
        patches, hidden = call.num_patches, cfg.hidden_size
        work = vision_shapes.work(tower, call)
        gated = cfg.ffn_size == 3420
        mlp = 6 * hidden * 3424 if gated else 4 * hidden * cfg.ffn_size  # with its padding
        products = patches * 9 * (8 * hidden**2 + mlp)
        products += patches * 2 * hidden * cfg.patch_size
        products += levels * patches // 4 * 2 * merged * (merged + 2048)
        assert work.products == products
        pairs = 9 * patches**2
        if gated:  # 74 patches a side: 9 windows of 8 and one of 2
            pairs = patches**2 + 8 * (9 * 64 + 4) ** 2
        assert work.attention == 4 * hidden * pairs


def test_pictures_fill_a_call() -> None:
    for name, side in (("Qwen3-VL-2B", 64), ("Qwen2.5-VL-3B", 74)):
        cfg = vision_shapes.make_tower(name, DTYPE).config
        for budget, frames in (
            (1024, [[32, 32]]),
            (side**2, [[side, side]]),
            (3 * side**2 + 4, [[side, side]] * 3),
        ):
            call = vision_shapes.full_call(cfg, budget, 1024)
            assert call.frames_F2.tolist() == frames
            assert call.num_patches == len(frames) * frames[0][0] ** 2 <= budget
        assert len(vision_shapes.full_call(cfg, 10**6, 1024).frames_F2) == MAX_FRAMES


def test_attention_is_compared_before_it_is_timed() -> None:
    platform = platforms.select("cpu")
    platform.prepare()
    cfg = vision_shapes.make_tower("Qwen2.5-VL-3B", DTYPE).config
    cases = vision_tower.cases(cfg, 300)
    assert [case.num_patches for case in cases] == [484, 484, 256, 256]
    rows = [row for case in cases for row in vision_tower.time_attention(cfg, case, platform, True)]
    assert {row["way"] for row in rows} == {"ours", "torch, by segment"}
    assert all(row["error"] <= vision_tower.MAX_ERROR and row["us"] > 0 for row in rows)
