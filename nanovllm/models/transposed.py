"""Reads the experts of a layer from one tensor in which each matrix is transposed.

E experts | O outputs | D inputs. The tensor is [E, D, O], the parameter [E, O, D].
"""

from __future__ import annotations

from torch import Tensor

from nanovllm.models.checkpoint import Checkpoint, CheckpointError, Cut
from nanovllm.models.model import Param
from nanovllm.models.shards import ALL, Shard, taken

STAGED_BYTES = 1 << 27  # of experts read at a time, in addition to the parameter's memory


class Orientations:
    """Checks the orientation of a checkpoint's expert tensors: all are transposed, or none."""

    def __init__(self) -> None:
        self._known: dict[bool, str] = {}  # an example of each
        self._square: str | None = None

    def is_transposed(self, checkpoint: Checkpoint, name: str, param: Param) -> bool:
        """Whether the tensor `name` is transposed, by its shape; a square one counts as not
        transposed.

        Raises CheckpointError if others show that it is not, or must be the other way round.
        """
        num, rows, columns = param.shape
        is_it = checkpoint.shape(name) == (num, columns, rows)
        if rows == columns:
            self._square, is_it = name, False
        else:
            self._known[is_it] = name
        if True in self._known and (False in self._known or self._square is not None):
            other = self._known.get(False) or self._square
            raise CheckpointError(
                f"{checkpoint.folder}: the matrices of {self._known[True]} are transposed, and "
                f"those of {other} are not, or do not show it"
            )
        return is_it


def read(checkpoint: Checkpoint, shard: Shard, param: Param, out_EOD: Tensor) -> None:
    """Read a rank's part of the tensor `param.other_name`, which is transposed, to `out_EOD`.

    Whole matrices are read: parts of their rows would be many short runs of the file.
    """
    assert param.other_name is not None
    num, rows, columns = param.shape
    stored, per_expert = (num, columns, rows), len(param.parts) // num
    own, part = range(num), shard
    if param.is_expert_parallel:
        own, part = shard.experts(num), ALL
    step = max(1, STAGED_BYTES // (rows * columns * out_EOD.element_size()))
    for first in range(0, len(own), step):
        count = min(step, len(own) - first)
        staged_EDO = out_EOD.new_empty(count, columns, rows)
        cut = Cut(stored, stored, 0, own.start + first, own.start + first + count)
        checkpoint.read_parts([(param.other_name, staged_EDO, cut)])
        some = param._replace(
            shape=(count, rows, columns),
            sources=param.sources[: count * per_expert],
            parts=param.parts[: count * per_expert],
        )
        whole_EOD = staged_EDO.mT
        if param.is_interleaved:
            whole_EOD = whole_EOD.unflatten(1, (-1, per_expert)).transpose(1, 2).flatten(1, 2)
        out_EOD[first : first + count] = taken(part, some, whole_EOD)
