"""The sizes, in patches, that a tower's programs are compiled for. Letters are in `interface`.

A picture of Qwen3-VL has a patch per 16² pixels, one of Qwen2.5-VL per 14²: 1,024² pixels are 4,096
and 5,476 patches. Each budget costs a start a few small programs. Steps of at most a factor of two
between budgets keep the padding of a lone picture below half of a call; several small pictures
share one.
"""

from __future__ import annotations

from collections.abc import Sequence

from nanovllm.models.vision.interface import TowerConfig

BUDGETS = (256, 512, 1024, 2048, 4096, 6144)


def budgets(cfg: TowerConfig, asked: Sequence[int] | None) -> tuple[int, ...]:
    """The budgets of a tower, ascending: those that the option `vision_patch_budgets` asks for, or
    BUDGETS rounded up to whole tokens. Raises ValueError for numbers that are no whole tokens."""
    unit = cfg.patches_per_group
    if asked is None:
        return tuple(-(-size // unit) * unit for size in BUDGETS)
    wrong = [size for size in asked if size < unit or size % unit]
    if wrong or not asked:
        raise ValueError(
            f"vision_patch_budgets is {list(asked)}: it must hold multiples of {unit}, the patches "
            f"of one token of {cfg.architecture}"
        )
    return tuple(sorted(set(asked)))
