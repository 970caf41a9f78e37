"""The device memory of what layers keep between steps, made from their declarations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanovllm.models.layer_state import Paged, PagedLatent, Recurrent
from nanovllm.models.model import Kept, LatentCache, LayerCache, Model, PagedCache
from nanovllm.platforms.regions import Region
from nanovllm.runner.snapshots import RowStates, Snapshots
from nanovllm.runner.spec import EngineSpec


def allocate(
    model: Model,
    num_blocks: int,
    spec: EngineSpec,
    region: Region,
    scales: Sequence[tuple[Tensor, ...]],
) -> tuple[tuple[Kept, ...], Snapshots]:
    """What all layers keep, zeroed, and the snapshots of rows' states; `scales` are those of each
    layer's fp8 cache.

    Layers of different groups share tensors (`PageGroups`). Within a program, each tensor has
    memory of its own: programs take them as inputs, and inputs must not alias.
    """
    groups, layout = model.page_groups, spec.layout
    shapes = groups.groups[0].kept.shapes(num_blocks, layout.block_size)
    num_states = (layout.max_num_seqs + 1) * layout.num_places
    pages: dict[int, list[Tensor]] = {}
    states: list[RowStates] = []
    made: list[Kept] = []
    places = groups.places(len(model.layer_kinds))
    for kept, place, layer_scales in zip(model.kept, places, scales, strict=True):
        if isinstance(kept, Recurrent):
            of_rows, of_slots = (
                _states(kept, num, model.config.dtype, region)
                for num in (num_states, spec.snapshot_slots)
            )
            states += map(RowStates, of_rows, of_slots)
            made.append(of_rows)
            continue
        assert place is not None
        _, tensor_idx = place
        if tensor_idx not in pages:
            pages[tensor_idx] = [region.zeros(shape, spec.cache_dtype) for shape in shapes]
        made.append(paged_cache(kept, pages[tensor_idx], layer_scales))
    return tuple(made), Snapshots(tuple(states), layout.num_places)


def paged_cache(
    kept: Paged, tensors: Sequence[Tensor], scales: tuple[Tensor, ...] = ()
) -> PagedCache:
    """A layer's cache of these tensors, and of the scales if it is in fp8."""
    if isinstance(kept, PagedLatent):
        return LatentCache(*tensors)
    return LayerCache(*tensors, *scales)


def _states(
    kept: Recurrent, num: int, model_dtype: torch.dtype, region: Region
) -> tuple[Tensor, ...]:
    return tuple(region.zeros((num, *one.shape), one.dtype or model_dtype) for one in kept.tensors)
