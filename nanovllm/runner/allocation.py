"""The device memory of what layers keep between steps, made from their declarations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nanovllm.models.interface import LayerCache, Model
from nanovllm.platforms.regions import Region
from nanovllm.runner.spec import EngineSpec


def allocate(
    model: Model,
    num_blocks: int,
    spec: EngineSpec,
    region: Region,
    scales: Sequence[tuple[Tensor, ...]],
) -> tuple[LayerCache, ...]:
    """Zeroed caches of all layers; `scales` are those of each layer's fp8 cache.

    Layers of different groups share tensors (`PageGroups`). Within a program, each tensor has
    memory of its own: programs take them as inputs, and inputs must not alias.
    """
    groups = model.page_groups
    shapes = groups.groups[0].kept.shapes(num_blocks, spec.layout.block_size)
    made: dict[int, list[Tensor]] = {}
    caches = []
    for place, layer_scales in zip(groups.places(len(model.layer_kinds)), scales, strict=True):
        assert place is not None
        _, tensor_idx = place
        if tensor_idx not in made:
            made[tensor_idx] = [region.zeros(shape, spec.cache_dtype) for shape in shapes]
        caches.append(LayerCache(*made[tensor_idx], *layer_scales))
    return tuple(caches)
