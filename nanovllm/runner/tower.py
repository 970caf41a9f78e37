"""Runs a vision tower: images and video frames are packed into calls of static sizes.

T patches of a call's budget | C numbers in a patch | G tokens | O text model's hidden size
L levels of features. The other letters are in `models/vision/vision_encoder`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.compile.program import Compiler
from nanovllm.models.vision import layout as layouts
from nanovllm.models.vision.layout import Grid, TowerCall
from nanovllm.models.vision.vision_encoder import (
    BlockCall,
    FrameLayout,
    Taps,
    Tower,
    TowerWeights,
    Windows,
)
from nanovllm.platforms.base import Platform
from nanovllm.runner.encoder_steps import EncoderCall, EncoderSteps


class TowerSteps(EncoderSteps):
    """The calls of a vision tower.

    Budgets are patches T, multiples of the tower's patches per token (`vision.budgets`). A frame
    with more patches than the largest runs op by op, in a call of the frame's size.
    """

    name = "vision"
    tower: Tower
    weights: TowerWeights

    def num_tokens(self, grid: Sequence[int]) -> int:
        """The tokens of an image or video of (frames, rows, columns) patches."""
        return math.prod(grid) // self.tower.config.patches_per_group

    def calls(self, values: Tensor, grids: Sequence[Grid]) -> Iterator[EncoderCall]:
        cfg = self.tower.config
        frames_F2 = layouts.frames_of(grids, cfg.merge_size)
        num_patches = int(frames_F2.prod(axis=1).sum())
        if cfg.frame_side and (frames_F2 != cfg.frame_side).any():
            raise ValueError(
                f"an image has {frames_F2.max()} patches on a side: images of {cfg.architecture} "
                f"have {cfg.frame_side}"
            )
        if tuple(values.shape) != (num_patches, cfg.patch_size):
            raise ValueError(
                f"the patches of {len(grids)} images or videos have shape {list(values.shape)}, "
                f"but their grids require {[num_patches, cfg.patch_size]}"
            )
        if 0 < cfg.max_side < frames_F2.max(initial=0):
            raise ValueError(
                f"an image has {frames_F2.max()} patches on a side: images of {cfg.architecture} "
                f"have at most {cfg.max_side}"
            )
        done = 0
        for call in layouts.calls(frames_F2, self.budgets):
            patches = values[done : done + call.num_patches]
            num_tokens = call.num_patches // cfg.patches_per_group
            yield EncoderCall(call.budget, self.inputs(call, patches), num_tokens)
            done += call.num_patches

    def inputs(self, call: TowerCall, patches: Tensor) -> tuple[Tensor, FrameLayout]:
        """A call's inputs on the device, padded to its budget: pixel_TC and the layout."""
        cfg = self.tower.config
        budget = call.num_patches if call.budget is None else call.budget
        padded_TC = torch.zeros((budget, cfg.patch_size), dtype=cfg.dtype)
        padded_TC[: call.num_patches] = patches
        arrays = layouts.layout(cfg, call.frames_F2, budget)
        return self.platform.upload(padded_TC, cfg.dtype), _uploaded(self.platform, arrays)

    def run(  # type: ignore[override]
        self, pixel_TC: Tensor, layout: FrameLayout, compiler: Compiler, *, few: bool = False
    ) -> Tensor:
        calls, weights = self.tower.config.calls, self.weights
        if self.whole and compiler.lowering is not None:
            function = partial(_inlined, self.tower, calls)
            inputs: dict[str, object] = {
                "tower_weights": weights,
                "layout": layout,
                "pixel_TC": pixel_TC,
            }
            program = compiler.program("tower", (len(pixel_TC),), function, inputs)
            return program(*inputs.values())
        if few:
            chosen = sorted({calls.index(call) for call in set(calls)})
            calls = tuple(calls[block_idx] for block_idx in chosen)
            weights = weights._replace(blocks=tuple(weights.blocks[i] for i in chosen))
        return run_call(self.tower, calls, weights, layout, pixel_TC, compiler)

    def padding(self, budget: int) -> tuple[Tensor, FrameLayout]:
        """The patches are one frame."""
        cfg = self.tower.config
        frames_F2 = np.array([[cfg.merge_size, budget // cfg.merge_size]])
        patches = torch.zeros(budget, cfg.patch_size)
        return self.inputs(TowerCall(frames_F2, budget, budget), patches)


def _inlined(
    tower: Tower,
    calls: Sequence[BlockCall],
    weights: TowerWeights,
    layout: FrameLayout,
    pixel_TC: Tensor,
) -> Tensor:
    """A call as one region."""
    return run_call(tower, calls, weights, layout, pixel_TC, Compiler(None))


def run_call(
    tower: Tower,
    calls: Sequence[BlockCall],
    weights: TowerWeights,
    layout: FrameLayout,
    pixel_TC: Tensor,
    compiler: Compiler,
) -> Tensor:
    """See `EncoderSteps.run`: a call by the programs of its regions, for these blocks."""
    cfg, windows, num_patches = tower.config, layout.windows, len(pixel_TC)
    place_G = None if windows is None else windows.place_G

    def program(name: str, kind: str, function: Callable[..., Any], **inputs: object) -> Any:
        made = compiler.program(f"tower_{name}", (num_patches, kind), function, inputs)
        return made(*inputs.values())

    def merged(level: int, h_TD: Tensor) -> Tensor:
        w, kind = weights.mergers[level], "level" if level else "embedding"
        return program("merge", kind, partial(tower.merge, cfg), w=w, place_G=place_G, h_TD=h_TD)

    h_TD, rope_TH = program(
        "embed", "all", partial(tower.embed, cfg),
        w=weights.outer, layout=layout, pixel_TC=pixel_TC,
    )  # fmt: skip
    levels: list[Tensor] = []
    for w, call in zip(weights.blocks, calls, strict=True):
        kind, max_len, start_S = "frames", num_patches, layout.frame_start_S
        if call.window_patches:
            assert windows is not None
            kind, max_len, start_S = "windows", call.window_patches, windows.start_S
        h_TD = program(
            "block", kind, partial(tower.block, cfg, max_len),
            w=w, rope_TH=rope_TH, start_S=start_S, h_TD=h_TD,
        )  # fmt: skip
        if call.makes_level:
            levels.append(merged(1 + len(levels), h_TD))
    return torch.stack((merged(0, h_TD), *levels))


def _uploaded(platform: Platform, layout: FrameLayout) -> FrameLayout:
    """A layout's arrays on the device."""

    def up(array: np.ndarray) -> Tensor:
        return platform.upload(array, getattr(torch, str(array.dtype)))

    windows, taps = layout.windows, layout.taps
    return FrameLayout(
        up(layout.row_col_T2),
        up(layout.frame_start_S),
        None if windows is None else Windows(*map(up, windows)),
        None if taps is None else Taps(*map(up, taps)),
    )
