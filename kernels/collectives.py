"""Sums and gathers over the ranks of a tensor-parallel engine.

Graphs name neither a group nor a rank: an op takes the group that is in use in the calling thread.
So ranks share compiled programs. A captured step keeps the group that was in use at its capture.

R rows | D hidden | V vocabulary | W vocabulary rows of one rank, the last of which may be padding
T tokens
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.peers import Peers

# Names of the ops that communicate, which no graph can contain in parts.
COLLECTIVES = (
    "all_reduce", "all_reduce_", "all_reduce_norm", "gather_columns", "sample_columns",
    "shard_embedding",
)  # fmt: skip
LAST = 2**31 - 1  # no token has a larger id


class Communicator(Protocol):
    """The ranks of one engine, and this process's place among them."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def name(self) -> str:
        """What a device's library calls the group: the same on every rank."""
        ...

    @property
    def peers(self) -> Peers | None:
        """Memory of all ranks that kernels can read; None if there is none."""
        ...

    def all_reduce(self, x: Tensor) -> object:
        """Replace x by its sum over the ranks: the same bits on every rank."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape]: the tensors of all ranks."""
        ...

    def min_int(self, value: int) -> int:
        """The smallest of the ranks' numbers. Waits for all of them."""
        ...


_in_use = threading.local()


@contextmanager
def using(group: Communicator | None) -> Iterator[None]:
    """Ops in this block, in this thread, communicate in `group`."""
    before = in_use()
    _in_use.group = group
    try:
        yield
    finally:
        _in_use.group = before


def in_use() -> Communicator | None:
    """The group of the calling thread; None if one rank has the whole model."""
    group: Communicator | None = getattr(_in_use, "group", None)
    return group


def current() -> Communicator:
    group = in_use()
    assert group is not None, "a collective runs outside `using`"
    return group


def all_reduce(x: Tensor, residual: Tensor | None = None) -> Tensor:
    """The sum of x over the ranks, plus the residual, which is the same on all of them."""
    out = x.clone(memory_format=torch.contiguous_format)
    all_reduce_(out, residual)
    return out


def all_reduce_(x: Tensor, residual: Tensor | None = None) -> None:
    """`all_reduce` in place; x is contiguous."""
    current().all_reduce(x)
    if residual is not None:
        x += residual


def all_reduce_norm(
    x: Tensor, residual: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(rms_norm(sum), sum) of the sum over the ranks plus the residual."""
    return reference.norm_act.add_rms_norm(all_reduce(x), residual, weight_D, eps)


def gather_columns(x_RW: Tensor, num_columns: int) -> Tensor:
    """The columns of all ranks side by side: the first `num_columns` of them, [R, num_columns]."""
    ranks_NRW = current().all_gather(x_RW.contiguous())
    return ranks_NRW.transpose(0, 1).flatten(1)[:, :num_columns].contiguous()


def sample_columns(
    logits_RW: Tensor, temperature_R: Tensor, seed_R: Tensor, pos_R: Tensor, num_columns: int
) -> Tensor:
    """`reference.sample.sample` of `gather_columns`: the same tokens [R], without the gather.

    Each rank finds the best of its own columns, and one number of each rank and row is gathered.
    """
    first, num = own_columns(logits_RW.shape[1], num_columns)
    is_padding_W = torch.arange(logits_RW.shape[1], device=logits_RW.device) >= num
    mine_RW = logits_RW.masked_fill(is_padding_W, float("-inf"))
    best_R, token_R = reference.sample.best_column(mine_RW, temperature_R, seed_R, pos_R, first)
    return best_of_ranks(ordered(best_R, token_R))


def own_columns(width: int, num_columns: int) -> tuple[int, int]:
    """The token of this rank's first column, and how many of its `width` columns have tokens.

    `num_columns` is the number of tokens.
    """
    first = current().rank * width
    return first, min(max(num_columns - first, 0), width)


def ordered(best: Tensor, token: Tensor) -> Tensor:
    """(fp32 score, id) as int64: it grows with the score, and falls with the id where scores are
    equal. The bits of a float from its second on grow with its magnitude. −0 equals 0."""
    bits = best.view(torch.int32)
    score = torch.where(bits < 0, -(bits & LAST), bits)
    return (score.long() << 32) + (LAST - token.long())


def best_of_ranks(ordered_R: Tensor) -> Tensor:
    """The token of the largest of all ranks' numbers, which `ordered` made: int64 [R]."""
    return LAST - (current().all_gather(ordered_R).amax(0) & 0xFFFFFFFF)


def shard_embedding(token_T: Tensor, table_WD: Tensor) -> Tensor:
    """The rows of tokens that are in this rank's part of the table, and zeros for others: [T, D].

    Rank r has the rows of tokens r · W … (r + 1) · W − 1.
    """
    return rows_of_rank(token_T, table_WD, current().rank)


def rows_of_rank(token_T: Tensor, table_WD: Tensor, rank: int | Tensor) -> Tensor:
    """`shard_embedding` for a rank that is a number or a tensor [1]."""
    index_T = token_T - rank * table_WD.shape[0]
    is_mine_T = (index_T >= 0) & (index_T < table_WD.shape[0])
    row_TD = torch.nn.functional.embedding(index_T.where(is_mine_T, 0), table_WD)
    return row_TD * is_mine_T.unsqueeze(1)


# Primitives of the ops above, for compilers that lower collectives themselves --------------------


def all_gather(x: Tensor, num_ranks: int) -> Tensor:
    """The tensors of all ranks, one after the other: [num_ranks, *x.shape]."""
    group = current()
    assert group.size == num_ranks, (group.size, num_ranks)
    return group.all_gather(x)


def own_rank(like: Tensor) -> Tensor:
    """This process's rank, [1] int64, on the device of `like`."""
    return torch.tensor([current().rank], device=like.device)
