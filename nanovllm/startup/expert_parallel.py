"""Chooses between whole experts per rank and a part of every expert on each rank."""

from __future__ import annotations

import logging
from dataclasses import replace

from nanovllm.models.config import MoeConfig
from nanovllm.models.model import Model

logger = logging.getLogger(__name__)

# The requirements of the expert kernels on an expert's width per rank, the length of a row of the
# down matrix. A warp reads 256 numbers of a row at a time: at 128 half of its threads have work.
# Loads have 16 bytes: 8 numbers of 16 bits.
MIN_WIDTH, WIDTH_STEP = 128, 8
QUANTIZED_STEP = 32  # of quantized experts: kernels read whole blocks of columns


def places_whole_experts(moe: MoeConfig, num_ranks: int, step: int = WIDTH_STEP) -> bool:
    """The rule of expert_parallel="auto". See docs/parallel.md.

    Parts of every expert give all ranks the same work for any routing. So whole experts are placed
    only where a part would be too narrow, and the ranks can share the experts evenly.
    """
    width, rest = divmod(moe.expert_size, num_ranks)
    is_wide = not rest and width >= MIN_WIDTH and width % step == 0
    return not is_wide and moe.num_experts % num_ranks == 0


def with_experts_on_ranks(asked: bool | str, model: Model, num_ranks: int) -> Model:
    """The model with `is_expert_parallel` of its experts chosen, for several ranks.

    `asked` is the option expert_parallel. Raises ValueError if it does not go with the model.
    """
    cfg, moe = model.config, model.config.moe
    if moe is None:
        if asked is True:
            raise ValueError(f"expert_parallel is True, but {cfg.architecture} has no experts")
        return model
    if asked is True and moe.num_experts % num_ranks:
        raise ValueError(
            f"expert_parallel is True and tensor_parallel_size {num_ranks}, which must divide the "
            f"{moe.num_experts} experts of a layer"
        )
    is_plain = all(stored_as.is_plain for stored_as in model.expert_formats)
    step = WIDTH_STEP if is_plain else QUANTIZED_STEP
    is_expert_parallel = (
        places_whole_experts(moe, num_ranks, step) if isinstance(asked, str) else asked
    )
    logger.info(
        "each of %d ranks has %s",
        num_ranks,
        f"{moe.num_experts // num_ranks} whole experts of a layer"
        if is_expert_parallel
        else f"1/{num_ranks} of every expert",
    )
    return replace(
        model, config=replace(cfg, moe=replace(moe, is_expert_parallel=is_expert_parallel))
    )
