"""What layers keep between steps: keys and values in pages, or tensors of each row.

A `LayerKind` declares what its layers keep. The size of the cache, its tensors, the groups of
layers that share block tables, and the parts of ranks all follow from these declarations.

C cache blocks | B block size | K kv heads
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

LARGEST_LATENT = 512  # the attention of a tile of heads holds results of this size
# The memory of a long sequence in fewer groups, relative to the least
MAX_WASTE = 1.05


@dataclass(frozen=True)
class PagedKV:
    """Keys and values of each token, in blocks: [C, B, K, size] each, in the cache's dtype.

    `window` is the number of newest positions that a query sees, itself included; 0 means all
    positions. Blocks whose positions no query will see are freed. A layer with a `source` has no
    cache of its own: it reads that of the layer with this number, which keeps the same.
    """

    num_kv_heads: int
    key_size: int
    value_size: int
    window: int = 0
    source: int | None = None

    def shapes(self, num_blocks: int, block_size: int) -> tuple[tuple[int, ...], ...]:
        """The shapes of the cache's tensors."""
        heads = (num_blocks, block_size, self.num_kv_heads)
        return (*heads, self.key_size), (*heads, self.value_size)

    def on_ranks(self, num_ranks: int) -> PagedKV:
        """What each of `num_ranks` ranks keeps; with more ranks than heads, some keep the same."""
        return replace(self, num_kv_heads=-(-self.num_kv_heads // num_ranks))

    def check(self) -> None:
        """Raise ValueError for sizes that no attention op takes."""
        if self.key_size != self.value_size:
            raise ValueError(
                f"keys of size {self.key_size} with values of size {self.value_size} are not "
                "supported: attention takes equal sizes"
            )


@dataclass(frozen=True)
class PagedLatent:
    """One latent vector and one rotated key of each token, in blocks: [C, B, size + rope_size].

    Every rank keeps all of it. Source: DeepSeek-AI 2024, https://arxiv.org/abs/2405.04434.
    """

    size: int
    rope_size: int
    window: int = 0

    def shapes(self, num_blocks: int, block_size: int) -> tuple[tuple[int, ...], ...]:
        """The shapes of the cache's tensors."""
        return ((num_blocks, block_size, self.size + self.rope_size),)

    def on_ranks(self, num_ranks: int) -> PagedLatent:
        """What each of `num_ranks` ranks keeps."""
        return self

    def check(self) -> None:
        """Raise ValueError for sizes that no attention op takes."""
        if self.size % 8 or not 0 < self.size <= LARGEST_LATENT:
            raise ValueError(
                f"kv_lora_rank {self.size} is not supported: it must be a multiple of 8, up to "
                f"{LARGEST_LATENT}"
            )


class StateTensor(NamedTuple):
    """A tensor that a layer keeps for each row. Without `dtype` it has the model's.

    Several ranks share it evenly along `shard_axis`; with None each keeps all of it. It has
    `num_parts` there, or as many as the axis is long.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    shard_axis: int | None = None
    num_parts: int | None = None

    def on_ranks(self, num_ranks: int) -> StateTensor:
        if self.shard_axis is None:
            return self
        shape = list(self.shape)
        num_parts = self.num_parts or shape[self.shard_axis]
        if num_parts % num_ranks:
            raise ValueError(
                f"tensor_parallel_size is {num_ranks}: it must divide the {num_parts} parts of "
                f"the state {self.name!r}"
            )
        shape[self.shard_axis] //= num_ranks
        small = self._replace(shape=tuple(shape))
        return small if self.num_parts is None else small._replace(num_parts=num_parts // num_ranks)

    def num_bytes(self, model_dtype: torch.dtype) -> int:
        return math.prod(self.shape) * (self.dtype or model_dtype).itemsize


@dataclass(frozen=True)
class Recurrent:
    """A state of each row, which every token of the row changes."""

    tensors: tuple[StateTensor, ...]

    def on_ranks(self, num_ranks: int) -> Recurrent:
        """What each of `num_ranks` ranks keeps. Raises ValueError for parts that are not even."""
        return Recurrent(tuple(one.on_ranks(num_ranks) for one in self.tensors))

    def with_dtype(self, dtype: torch.dtype) -> Recurrent:
        """The same with another dtype of the tensors that have one of their own."""
        return Recurrent(
            tuple(one if one.dtype is None else one._replace(dtype=dtype) for one in self.tensors)
        )

    def num_bytes(self, model_dtype: torch.dtype) -> int:
        """Bytes of one row's state."""
        return sum(one.num_bytes(model_dtype) for one in self.tensors)


@dataclass(frozen=True)
class KVAndState:
    """Keys and values of each token, and a state of each row: attention beside a recurrence."""

    pages: PagedKV
    state: Recurrent

    def on_ranks(self, num_ranks: int) -> KVAndState:
        """What each of `num_ranks` ranks keeps."""
        return KVAndState(self.pages.on_ranks(num_ranks), self.state.on_ranks(num_ranks))


Paged = PagedKV | PagedLatent
LayerState = Paged | Recurrent | KVAndState


def pages_of(kept: LayerState) -> Paged | None:
    """The pages of a layer; None if it has none."""
    if isinstance(kept, KVAndState):
        return kept.pages
    return None if isinstance(kept, Recurrent) else kept


def state_of(kept: LayerState) -> Recurrent | None:
    """The state that a layer keeps of each row; None if it keeps none."""
    if isinstance(kept, KVAndState):
        return kept.state
    return kept if isinstance(kept, Recurrent) else None


def with_state(kept: LayerState, state: Recurrent) -> LayerState:
    """What a layer with a state keeps, with another one."""
    return replace(kept, state=state) if isinstance(kept, KVAndState) else state


def page_bytes(kept: Paged, block_size: int, cache_dtype: torch.dtype) -> int:
    """Bytes of one block of one layer."""
    return sum(map(math.prod, kept.shapes(1, block_size))) * cache_dtype.itemsize


class PageGroup(NamedTuple):
    """Layers with one block table, since they keep the same of every token.

    Their pages are so small that a tensor has those of `per_tensor` layers. `readers` are the
    layers that read the cache of one of these, as (layer, its number among `layers`).
    """

    kept: Paged
    layers: tuple[int, ...]
    per_tensor: int = 1
    readers: tuple[tuple[int, int], ...] = ()

    @property
    def numbered(self) -> list[tuple[int, int]]:
        """All layers that read this group's caches, as (layer, the number of the cache)."""
        return [*((layer_idx, number) for number, layer_idx in enumerate(self.layers)),
                *self.readers]  # fmt: skip


@dataclass(frozen=True)
class PageGroups:
    """The layers of a model that keep pages, in groups that share the cache's tensors.

    There are `num_tensors` tensors, of pages as large as those of any group. Layer number i of
    every group uses tensor i, or a part of tensor i / `per_tensor`, so a block's number is valid
    for every group: the block belongs to the group that was given it. Groups of fewer layers leave
    a part of their blocks unused.

    Source: the hybrid cache of vLLM, https://docs.vllm.ai/en/latest/design/hybrid_kv_cache_manager.
    """

    groups: tuple[PageGroup, ...]
    num_tensors: int

    def check(self) -> None:
        """Raise ValueError for a cache that no attention op reads."""
        for group in self.groups:
            group.kept.check()

    @property
    def windows(self) -> tuple[int, ...]:
        """The window of each group; 0 for all positions."""
        return tuple(group.kept.window for group in self.groups)

    def places(self, num_layers: int) -> list[tuple[int, int] | None]:
        """Each layer's group and tensor; None for layers without pages."""
        found: list[tuple[int, int] | None] = [None] * num_layers
        for group_idx, group in enumerate(self.groups):
            for layer_idx, number in group.numbered:
                found[layer_idx] = group_idx, number // group.per_tensor
        return found

    def parts(self, num_layers: int) -> list[tuple[int, int]]:
        """Which of how many equal parts of its tensor each layer has."""
        found = [(0, 1)] * num_layers
        for group in self.groups:
            for layer_idx, number in group.numbered:
                found[layer_idx] = number % group.per_tensor, group.per_tensor
        return found

    @property
    def largest(self) -> Paged:
        """What a layer keeps whose page fills a tensor's."""
        return next(group.kept for group in self.groups if group.per_tensor == 1)

    def of_layers(self, chosen: Sequence[int]) -> PageGroups:
        """The same groups in a model with the `chosen` layers alone. Some may be empty."""
        groups = (
            group._replace(
                layers=tuple(map(chosen.index, sorted(set(chosen) & set(group.layers)))),
                readers=tuple(
                    (chosen.index(one), at) for one, at in group.readers if one in chosen
                ),
            )
            for group in self.groups
        )
        return replace(self, groups=tuple(groups))

    def block_bytes(self, block_size: int, cache_dtype: torch.dtype) -> int:
        """Bytes of one block in all tensors."""
        return self.num_tensors * page_bytes(self.largest, block_size, cache_dtype)

    def window_bytes(self, cache_dtype: torch.dtype) -> dict[int, int]:
        """Bytes that one token takes in all layers with a window, by the window."""
        found: dict[int, int] = {}
        for kept, layers, *_ in self.groups:
            num_bytes = len(layers) * page_bytes(kept, 1, cache_dtype)
            found[kept.window] = found.get(kept.window, 0) + num_bytes
        return found

    def token_bytes(self, cache_dtype: torch.dtype) -> int:
        """Bytes that one token takes in the caches of all layers while every layer sees it."""
        return sum(self.window_bytes(cache_dtype).values())


def page_groups(kept: Sequence[LayerState], max_len: int) -> PageGroups:
    """The groups of a model whose layers keep this, for sequences of up to `max_len` tokens.

    Raises ValueError for pages whose sizes do not divide the largest, and if no layer has pages.
    """
    alike: dict[Paged, list[int]] = {}
    readers: dict[int, list[int]] = {}  # by the layer whose cache they read
    for layer_idx, one in enumerate(map(pages_of, kept)):
        if isinstance(one, PagedKV) and one.source is not None:
            assert replace(one, source=None) == kept[one.source] and one.source < layer_idx
            readers.setdefault(one.source, []).append(layer_idx)
        elif one is not None:
            sees_all = one.window >= max_len
            alike.setdefault(replace(one, window=0) if sees_all else one, []).append(layer_idx)
    if not alike:
        raise ValueError("no layer has a paged cache: at least one must")
    per_tensor = _per_tensor(alike)
    size = _group_size(alike, per_tensor, max_len)
    groups = [
        PageGroup(one, tuple(layers[first : first + size * per_tensor[one]]), per_tensor[one])
        for one, layers in sorted(alike.items(), key=lambda item: item[0].window)
        for first in range(0, len(layers), size * per_tensor[one])
    ]
    return PageGroups(tuple(_with_readers(group, readers) for group in groups), size)


def _with_readers(group: PageGroup, readers: Mapping[int, Sequence[int]]) -> PageGroup:
    found = [(one, at) for at, own in enumerate(group.layers) for one in readers.get(own, ())]
    return group._replace(readers=tuple(found))


def _per_tensor(alike: Iterable[Paged]) -> dict[Paged, int]:
    """How many layers that keep this have one tensor together."""
    sizes = {one: list(map(math.prod, one.shapes(1, 1))) for one in alike}
    largest = max(sizes.values())
    found: dict[Paged, int] = {}
    for one, own in sizes.items():
        ratios = {whole // size for whole, size in zip(largest, own) if whole % size == 0}
        if len(own) != len(largest) or len(ratios) != 1 or own[0] * min(ratios) != largest[0]:
            geometries = {replace(one, window=0) for one in sizes}
            raise ValueError(
                f"layers keep pages of different sizes, which is not supported unless one is a "
                f"multiple of the other: {', '.join(sorted(map(str, geometries)))}"
            )
        found[one] = ratios.pop()
    return found


def _group_size(
    alike: Mapping[Paged, Sequence[int]], per_tensor: Mapping[Paged, int], max_len: int
) -> int:
    """Tensors of a group: as many as take little more memory for one long sequence than the best
    number does. Larger groups are fewer tables; groups that are not full waste memory."""

    num_tensors = {one: -(-len(layers) // per_tensor[one]) for one, layers in alike.items()}

    def cost(size: int) -> int:
        return size * sum(
            -(-num // size) * (one.window or max_len) for one, num in num_tensors.items()
        )

    most = max(num_tensors.values())
    best = min(map(cost, range(1, most + 1)))
    return max(size for size in range(1, most + 1) if cost(size) <= best * MAX_WASTE)


def recurrent_bytes(kept: Iterable[LayerState], model_dtype: torch.dtype) -> int:
    """Bytes of one row's recurrent states in all layers."""
    states = filter(None, map(state_of, kept))
    return sum(one.num_bytes(model_dtype) for one in states)
