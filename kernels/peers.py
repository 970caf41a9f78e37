"""The memory through which the GPUs of one host add and gather small tensors, and its layout.

Every rank has a region of REGION_BYTES. Every other rank of the host can read and write it. It
begins as zeros, except the words. A launch of a kernel uses at most MAX_PROGRAMS programs; program
b of a rank works with program b of each other rank alone, in these places of a region:

- int32 [MAX_PROGRAMS, MAX_RANKS] from byte 0: flags. Rank r writes column r.
- int32 [MAX_PROGRAMS] from COUNTERS_AT: twice the number of launches so far. Only its rank uses it.
- bytes [2, MAX_PROGRAMS, SLAB_BYTES] from DATA_AT: data that the other ranks read. Launches take
  turns with the two halves.
- int64 [2, MAX_PROGRAMS, MAX_RANKS, PROGRAM_WORDS] from WORDS_AT: words (`triton/peer_words.py`).
  Rank r writes [:, :, r]. Launches take turns with the two halves. They begin as −1, which is no
  launch's number.

A counter only grows, so a captured graph can be replayed. It wraps around after 2³¹ launches, and
differences stay right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

MAX_RANKS = 8
NUM_RANKS = (2, 4, 8)  # numbers of ranks that the kernels are made for
MAX_PROGRAMS = 128  # fewer than an H100 or H200 has multiprocessors, so that all run at once
SLAB_BYTES = 64 << 10
COUNTERS_AT = MAX_PROGRAMS * MAX_RANKS * 4
DATA_AT = COUNTERS_AT + 4096  # counters fill a part of it; data begin at a page
WORDS_AT = DATA_AT + 2 * MAX_PROGRAMS * SLAB_BYTES
PROGRAM_WORDS = 512
REGION_BYTES = WORDS_AT + 2 * MAX_PROGRAMS * MAX_RANKS * PROGRAM_WORDS * 8


class Peers(Protocol):
    """The regions of all ranks, as one rank has mapped them."""

    @property
    def num_ranks(self) -> int: ...

    @property
    def table(self) -> Tensor:
        """int64 [num_ranks + 3] on the device: the addresses of the regions in the order of ranks,
        this rank, the address of its region, and that of `stop`, an int32. While `stop` is not 0,
        kernels do not wait for other ranks, and their results mean nothing."""
        ...


class OwnedPeers(Peers, Protocol):
    """Regions that their owner frees."""

    def stop(self) -> None:
        """Make kernels no longer wait for other ranks, from now on. Any thread may call it."""
        ...

    def close(self) -> None:
        """Give the memory back, once the device has done what was launched."""
        ...


Gather = Callable[[Tensor], Tensor]  # a tensor of each rank to those of all, [num_ranks, …]
Agree = Callable[[bool], bool]  # whether it is True on all ranks
# (rank, number of ranks, gather, agree) to the regions, or to None on all ranks
Connect = Callable[[int, int, Gather, Agree], OwnedPeers | None]
