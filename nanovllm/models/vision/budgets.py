"""The sizes, in patches, for which a tower's programs are compiled. Letters are in `interface`.

Qwen3-VL has a patch per 16² pixels, Qwen2.5-VL per 14²: 1,024² pixels are 4,096 and 5,476 patches.
Each budget adds a few small programs to a start. With at most a factor of two between budgets, the
padding of a single image is below half of a call; several small images share a call.
"""

from __future__ import annotations

from collections.abc import Sequence

from nanovllm.models.vision.vision_encoder import TowerConfig

BUDGETS = (256, 512, 1024, 2048, 4096, 6144)


def budgets(cfg: TowerConfig, asked: Sequence[int] | None) -> tuple[int, ...]:
    """The budgets of a tower, ascending: those of the option `vision_patch_budgets`, or BUDGETS
    rounded up to whole tokens, or one frame where all are alike.

    Raises ValueError for numbers that are not whole tokens.
    """
    unit = cfg.patches_per_group
    if asked is None and cfg.frame_side:
        return (cfg.frame_side**2,)
    if asked is None:
        return tuple(-(-size // unit) * unit for size in BUDGETS)
    wrong = [size for size in asked if size < unit or size % unit]
    if wrong or not asked:
        raise ValueError(
            f"vision_patch_budgets is {list(asked)}: it must hold multiples of {unit}, the patches "
            f"of one token of {cfg.architecture}"
        )
    return tuple(sorted(set(asked)))
