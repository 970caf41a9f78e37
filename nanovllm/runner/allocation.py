"""The device memory of what layers keep between steps, made from their declarations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanovllm.models.layer_state import (
    Paged,
    PagedLatent,
    Recurrent,
    pages_of,
    recurrent_bytes,
    state_of,
)
from nanovllm.models.model import CacheAndStates, Kept, LatentCache, LayerCache, Model, PagedCache
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

    Layers of different groups share tensors, and small pages lie beside each other in one
    (`PageGroups`). Within a program, each tensor has memory of its own: programs take them as
    inputs, and inputs must not alias. Raises ValueError if rows' states do not fit.
    """
    groups, layout = model.page_groups, spec.layout
    shapes = groups.largest.shapes(num_blocks, layout.block_size)
    num_states = (layout.max_num_seqs + 1) * layout.num_places
    pages: dict[int, list[Tensor]] = {}
    states: list[RowStates] = []
    made: list[Kept] = []
    num_layers = len(model.layer_kinds)
    places, parts = groups.places(num_layers), groups.parts(num_layers)
    for kept, place, part, layer_scales in zip(model.kept, places, parts, scales, strict=True):
        of_rows: tuple[Tensor, ...] = ()
        if (state := state_of(kept)) is not None:
            try:
                of_rows, of_slots = (
                    _states(state, num, model.config.dtype, region)
                    for num in (num_states, spec.snapshot_slots)
                )
            except torch.OutOfMemoryError as error:
                raise ValueError(_too_large(model, num_states, spec)) from error
            states += map(RowStates, of_rows, of_slots)
        if (paged := pages_of(kept)) is None:
            made.append(of_rows)
            continue
        assert place is not None
        _, tensor_idx = place
        if tensor_idx not in pages:
            pages[tensor_idx] = [region.zeros(shape, spec.cache_dtype) for shape in shapes]
        own = paged.shapes(num_blocks, layout.block_size)
        parts_of = [_part(*one, *part) for one in zip(pages[tensor_idx], own)]
        cache = paged_cache(paged, parts_of, layer_scales)
        if state is None:
            made.append(cache)
        else:
            assert isinstance(cache, LayerCache)
            made.append(CacheAndStates(cache, of_rows))
    return tuple(made), Snapshots(tuple(states), layout.num_places)


def paged_cache(
    kept: Paged, tensors: Sequence[Tensor], scales: tuple[Tensor, ...] = ()
) -> PagedCache:
    """A layer's cache of these tensors, and of the scales if it is in fp8."""
    if isinstance(kept, PagedLatent):
        return LatentCache(*tensors)
    return LayerCache(*tensors, *scales)


def _part(tensor: Tensor, shape: tuple[int, ...], number: int, num_parts: int) -> Tensor:
    """One of equal parts of each block, as a cache of this shape."""
    if tensor.shape == shape:
        return tensor
    return tensor.flatten(1).chunk(num_parts, dim=1)[number].unflatten(1, shape[1:])


def _states(
    kept: Recurrent, num: int, model_dtype: torch.dtype, region: Region
) -> tuple[Tensor, ...]:
    return tuple(region.zeros((num, *one.shape), one.dtype or model_dtype) for one in kept.tensors)


def _too_large(model: Model, num_states: int, spec: EngineSpec) -> str:
    each = recurrent_bytes(model.kept, model.config.dtype)
    all_gib, slots_gib = (num * each / 2**30 for num in (num_states, spec.snapshot_slots))
    return (
        f"the recurrent states of {spec.layout.max_num_seqs} rows (max_num_seqs) take "
        f"{all_gib:.2f} GiB and their snapshots {slots_gib:.2f}, more than is free beside the "
        "weights: lower max_num_seqs"
    )
