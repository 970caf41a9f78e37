"""The towers of published vision models, their work, and pictures that fill a call."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from nanovllm.models.model import Param
from nanovllm.models.vision import layout as layouts
from nanovllm.models.vision.layout import TowerCall
from nanovllm.models.vision.registry import tower
from nanovllm.models.vision.vision_encoder import Tower, TowerConfig

# the vision parts of their config.json
_BOTH: dict[str, Any] = {
    "in_channels": 3,
    "num_heads": 16,
    "out_hidden_size": 2048,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen3-VL-2B": {
        **_BOTH,
        "model_type": "qwen3_vl_vision",
        "depth": 24,
        "hidden_size": 1024,
        "hidden_act": "gelu_pytorch_tanh",
        "intermediate_size": 4096,
        "patch_size": 16,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [5, 11, 17],
    },
    "Qwen2.5-VL-3B": {
        **_BOTH,
        "model_type": "qwen2_5_vl_vision",
        "depth": 32,
        "hidden_size": 1280,
        "hidden_act": "silu",
        "intermediate_size": 3420,
        "patch_size": 14,
        "window_size": 112,
        "tokens_per_second": 2,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}


class Work(NamedTuple):
    """Floating-point operations of a call, without its padding."""

    products: float
    attention: float

    @property
    def total(self) -> float:
        return self.products + self.attention


def make_tower(name: str, dtype: torch.dtype, depth: int | None = None) -> Tower:
    """The tower of a model in CONFIGS, with its first `depth` blocks if that is given."""
    fields = dict(CONFIGS[name])
    if depth is not None:
        fields["depth"] = depth
        for blocks in ("deepstack_visual_indexes", "fullatt_block_indexes"):
            if blocks in fields:
                fields[blocks] = [i for i in fields[blocks] if i < depth]
    return tower(SimpleNamespace(**fields), dtype)


def picture_side(cfg: TowerConfig, pixels: int) -> int:
    """Patches along a side of a square picture, which the processor resizes to whole tokens."""
    token_side = cfg.patch_shape[2] * cfg.merge_size
    return max(1, round(pixels / token_side)) * cfg.merge_size


def full_call(cfg: TowerConfig, budget: int, pixels: int) -> TowerCall:
    """As many square pictures of `pixels` a side as fit; a smaller one if none fits."""
    side = picture_side(cfg, pixels)
    if side**2 > budget:
        side = math.isqrt(budget) // cfg.merge_size * cfg.merge_size
    frames_F2 = np.full((min(layouts.MAX_FRAMES, budget // side**2), 2), side)
    return TowerCall(frames_F2, len(frames_F2) * side**2, budget)


def work(tower: Tower, call: TowerCall) -> Work:
    """The work of a call's own patches."""
    cfg = tower.config
    num_groups = call.num_patches // cfg.patches_per_group
    assert call.budget is not None
    layout = layouts.layout(cfg, call.frames_F2, call.budget)
    pairs_of_windows = 0 if layout.windows is None else _pairs(layout.windows.start_S)
    num_full = len(cfg.full_blocks)
    pairs = num_full * _pairs(layout.frame_start_S) + (cfg.depth - num_full) * pairs_of_windows
    of_patches = [tower.outer_params(cfg), *(tower.block_params(cfg, i) for i in range(cfg.depth))]
    of_groups = [tower.merger_params(cfg, level) for level in range(cfg.num_levels)]
    products = 2.0 * call.num_patches * sum(map(_num_weights, of_patches))
    products += 2.0 * num_groups * sum(map(_num_weights, of_groups))
    return Work(products, 4.0 * cfg.hidden_size * pairs)


def _num_weights(declared: dict[str, Param]) -> int:
    """Numbers in the matrices of products."""
    return sum(
        math.prod(param.shape) for param in declared.values() if param.kind in ("linear", "conv")
    )


def _pairs(start_S: np.ndarray) -> int:
    """Pairs of a query and a key."""
    return sum((end - start) ** 2 for start, end in pairwise(start_S.tolist()))
