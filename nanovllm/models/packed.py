"""Reads parameters that a checkpoint stores in its own format: several tensors for a matrix.

Only this rank's part is read. It is copied to the device as stored, and the format arranges it for
its product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nanovllm.models.checkpoint import Checkpoint, CheckpointError, Cut
from nanovllm.models.formats import Weight
from nanovllm.models.formats.format import (
    Axis,
    Companion,
    Extent,
    Format,
    Piece,
    fill,
    mapped,
    num_bytes,
    tensors_of,
)
from nanovllm.models.param import Param, RowOrder, Times
from nanovllm.models.shards import Shard

STAGED_BYTES = 1 << 27  # of experts that are read at a time: memory beside the parameter's


def read(
    checkpoint: Checkpoint,
    shard: Shard,
    param: Param,
    stored_as: Format,
    extent: Extent,
    device: torch.device,
    *,
    is_joined: bool,
) -> Weight:
    """A rank's part of a parameter as it is stored; with `is_joined` from the one module
    `param.other_name`.

    Raises CheckpointError for a tensor that is missing, misshapen or of another dtype, for numbers
    that the format refuses, and for an `adapt` that it cannot take.
    """
    pieces, part_rows = shard.pieces(param, is_joined=is_joined), param.local(shard.size).parts
    # a device without products of the stored numbers may not have their dtypes either
    reads_on = torch.device("cpu") if stored_as.is_plain else device
    _check(checkpoint, stored_as, pieces)
    try:
        if len(extent.shape) < 3:
            (raws,) = _raws(checkpoint, stored_as, [pieces], reads_on)
            weight = _matrix(stored_as, pieces, raws, extent)
            return mapped(lambda one: one.to(device), _adapted(stored_as, param, weight, part_rows))
        if param.adapt is not None:
            raise ValueError(f"{param.sources[0]}: the numbers of experts cannot be changed")
        stored, num = stored_as.empty(extent, device), extent.shape[0]
        of_experts = _split(pieces, len(pieces) // num)
        step = max(1, STAGED_BYTES * num // num_bytes(stored_as, extent))
        for first in range(0, num, step):
            some = of_experts[first : first + step]
            for i, raws in enumerate(_raws(checkpoint, stored_as, some, reads_on)):
                fill(stored, first + i, _matrix(stored_as, some[i], raws, extent.matrix))
        return stored
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.folder}: {error}") from error


def names(stored_as: Format, param: Param, *, is_joined: bool) -> Iterator[str]:
    """The tensors that a checkpoint may have for a parameter on all ranks."""
    rows, columns = param.shape[-2:]
    ends = stored_as.companions((rows, columns))
    for source in (param.other_name,) if is_joined else param.sources:
        assert source is not None
        yield from (stored_as.companion_name(source, end) for end in ends)
        others = (one.other_end for one in ends.values() if one.other_end is not None)
        yield from (stored_as.companion_name(source, end) for end in others)


def first_name(stored_as: Format, shape: tuple[int, ...], source: str) -> str:
    """The name of a tensor that shows that a checkpoint has the matrix `source`."""
    rows, columns = shape[-2:]
    companions = stored_as.companions((rows, columns))
    end = next(end for end, companion in companions.items() if not companion.is_optional)
    return stored_as.companion_name(source, end)


def _check(checkpoint: Checkpoint, stored_as: Format, pieces: Sequence[Piece]) -> None:
    """Refuse missing tensors and other shapes before allocating the sizes of the config."""
    for piece in pieces:
        for name, companion in _named(checkpoint, stored_as, piece):
            if name not in checkpoint:
                if companion.is_optional:
                    continue
                has_plain = piece.source in checkpoint
                also = f", and {piece.source} is there: it is not quantized" if has_plain else ""
                raise CheckpointError(f"{checkpoint.folder}: tensor {name} is missing{also}")
            found = checkpoint.shape(name)
            if companion.whole is not None:
                _check_whole(checkpoint, name, companion.whole)
                continue
            wanted = _shape(companion, piece)
            # a number for each matrix may have axes of 1
            is_number = math.prod(wanted) == math.prod(found)
            is_number = is_number and (not companion.axes or math.prod(found) == 1)
            if found != wanted and not is_number and not companion.is_unread:
                raise CheckpointError(
                    f"{checkpoint.folder}: tensor {name} has shape {list(found)}, but the config "
                    f"asks for {list(wanted)}"
                )


def _check_whole(checkpoint: Checkpoint, name: str, limits: tuple[int, int]) -> None:
    found, (least, most) = checkpoint.shape(name), limits
    if len(found) != 1 or not least <= found[0] <= most:
        asked = str(least) if least == most else f"{least} to {most}"
        raise CheckpointError(
            f"{checkpoint.folder}: tensor {name} has shape {list(found)}, but its format asks for "
            f"one axis of {asked}"
        )


def _named(checkpoint: Checkpoint, stored_as: Format, piece: Piece) -> list[tuple[str, Companion]]:
    found = stored_as.companions(piece.shape).items()
    return [(_name(checkpoint, stored_as, piece, *one), one[1]) for one in found]


def _name(
    checkpoint: Checkpoint, stored_as: Format, piece: Piece, end: str, companion: Companion
) -> str:
    """The name of a companion in this checkpoint."""
    name = stored_as.companion_name(piece.source, end)
    if companion.other_end is None or name in checkpoint:
        return name
    other = stored_as.companion_name(piece.source, companion.other_end)
    return other if other in checkpoint else name


def _shape(companion: Companion, piece: Piece) -> tuple[int, ...]:
    """The shape of a companion in the checkpoint."""
    seen = companion.shape
    if seen is None:
        seen = tuple(axis.size(piece.shape) for axis in companion.axes)
    return (piece.num_experts, *seen) if piece.num_experts else seen


def _raws(
    checkpoint: Checkpoint,
    stored_as: Format,
    groups: Sequence[Sequence[Piece]],
    device: torch.device,
) -> list[list[dict[str, Tensor]]]:
    """For each piece of each group its parts of the companions. All are read at the same time."""
    wanted: list[tuple[str, Tensor, Cut]] = []
    found = [[_raw(checkpoint, stored_as, p, device, wanted) for p in pieces] for pieces in groups]
    checkpoint.read_parts(wanted)
    return found


def _raw(
    checkpoint: Checkpoint,
    stored_as: Format,
    piece: Piece,
    device: torch.device,
    wanted: list[tuple[str, Tensor, Cut]],
) -> dict[str, Tensor]:
    """Memory for a piece's parts of the companions; adds what is to be read there."""
    raw: dict[str, Tensor] = {}
    for end, companion in stored_as.companions(piece.shape).items():
        name = _name(checkpoint, stored_as, piece, end, companion)
        if companion.is_unread or name not in checkpoint:
            continue
        shape = checkpoint.shape(name)
        cut, narrowed = Cut.whole(shape), None
        if companion.whole is None:
            cut, narrowed = _cut(companion.axes, piece, shape)
        out = torch.empty(_shape_of(cut), dtype=companion.dtype, device=device)
        wanted.append((name, out.view(-1), cut))
        raw[end] = out if narrowed is None else out.narrow(*narrowed)
    return raw


def _cut(
    axes: Sequence[Axis], piece: Piece, shape: tuple[int, ...]
) -> tuple[Cut, tuple[int, int, int] | None]:
    """The part of a companion to read, and the part of that which the piece needs, if it is less.

    Of the matrices of all experts in one tensor, an expert's is read whole if its columns are cut.
    """
    sizes = [axis.size(piece.shape) for axis in axes]
    ranges = [axis.range(piece) for axis in axes]
    partial = [i for i, (size, part) in enumerate(zip(sizes, ranges)) if len(part) < size]
    assert len(partial) < 2, "a rank's part is cut along one axis"
    if not sizes:  # one number for the matrix
        num = max(1, piece.num_experts)
        return Cut(shape, (num,), 0, piece.expert, piece.expert + 1), None
    axis = partial[0] if partial else 0
    start, stop = ranges[axis].start, ranges[axis].stop
    if not piece.num_experts:
        return Cut(shape, tuple(sizes), axis, start, stop), None
    first = piece.expert * sizes[0]
    seen = (piece.num_experts * sizes[0], *sizes[1:])
    if axis == 0:
        return Cut(shape, seen, 0, first + start, first + stop), None
    return Cut(shape, seen, 0, first, first + sizes[0]), (axis, start, stop - start)


def _shape_of(cut: Cut) -> tuple[int, ...]:
    return (*cut.seen[: cut.axis], cut.stop - cut.start, *cut.seen[cut.axis + 1 :])


def _matrix(
    stored_as: Format, pieces: Sequence[Piece], raws: Sequence[Mapping[str, Tensor]], extent: Extent
) -> Any:
    """The pieces of a matrix, one below the other. Rows for which there is nothing are zero."""
    parts = []
    for raw, piece in zip(raws, pieces, strict=True):
        try:
            parts.append(stored_as.read(raw, piece, extent))
        except ValueError as error:
            raise ValueError(f"{piece.source}: {error}") from error
    weight: Any = stored_as.joined(parts)
    declared: Any = stored_as.empty(extent, "meta")
    if isinstance(weight, Tensor):
        return _padded(weight, declared)
    return type(weight)(*map(_padded, weight, declared))


def _padded(found: Any, declared: Any) -> Any:
    if not isinstance(found, Tensor) or found.shape == declared.shape:
        return found
    padded = found.new_zeros(declared.shape)
    padded[: len(found)] = found
    return padded


def _adapted(stored_as: Format, param: Param, weight: Any, parts: tuple[int, ...]) -> Weight:
    """Apply `Param.adapt` to a weight. Raises ValueError if the format cannot take it."""
    adapt, found = param.adapt, weight
    try:
        if isinstance(adapt, RowOrder):
            device = tensors_of(weight)[0].device
            found = stored_as.reordered(weight, adapt.order(parts).to(device))
        elif isinstance(adapt, Times):
            found = stored_as.scaled(weight, adapt.factor)
        elif adapt is not None:
            raise ValueError(f"the format {stored_as.name} cannot take {adapt!r}")
    except ValueError as error:
        raise ValueError(f"{param.sources[0]}: {error}") from error
    return found  # type: ignore[no-any-return]


def _split(pieces: Sequence[Piece], num: int) -> list[Sequence[Piece]]:
    return [pieces[i : i + num] for i in range(0, len(pieces), num)]
