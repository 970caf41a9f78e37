"""Where the device's memory went, for the log and for benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm.platforms.base import MemoryBudget

GIB = 1 << 30


@dataclass(frozen=True)
class MemoryReport:
    """Bytes after warm-up.

    graphs_bytes: what recording the decode steps took; 0 where nothing is recorded or the device does not count.
    budget: what the cache was sized by; None where its size was given.
    limited: whether the cache holds all that its requests can use, and more was to be had.
    """

    weights_bytes: int
    cache_bytes: int
    cache_tokens: int
    graphs_bytes: int
    budget: MemoryBudget | None
    limited: bool

    @property
    def cache_share(self) -> float | None:
        """The cache's share of what `gpu_memory_utilization` leaves beside weights and other users of the device."""
        return self.cache_bytes / self.budget.allowance_bytes if self.budget else None

    def __str__(self) -> str:
        if self.budget is None:
            share = "as asked for"
        else:
            limited = (
                ", all that max_num_seqs requests of max_model_len can use" if self.limited else ""
            )
            share = f"{self.cache_share:.1%} of the allowance{limited}; scratch {_gib(self.budget.scratch_bytes)}"
        return (
            f"weights {_gib(self.weights_bytes)}, KV cache {_gib(self.cache_bytes)} for {self.cache_tokens} tokens "
            f"({share}), graphs {_gib(self.graphs_bytes)}"
        )

    def as_dict(self) -> dict[str, float | int | bool | None]:
        """For a line of JSON; sizes in GiB."""
        return {
            "weights_gib": round(self.weights_bytes / GIB, 3),
            "kv_cache_gib": round(self.cache_bytes / GIB, 3),
            "kv_cache_tokens": self.cache_tokens,
            "kv_allowance_gib": round(self.budget.allowance_bytes / GIB, 3)
            if self.budget
            else None,
            "kv_share_of_allowance": round(self.cache_share, 4)
            if self.cache_share is not None
            else None,
            "kv_room_share": round(self.budget.cache_bytes / self.budget.allowance_bytes, 4)
            if self.budget
            else None,
            "kv_limited_by_requests": self.limited,
            "scratch_gib": round(self.budget.scratch_bytes / GIB, 3) if self.budget else None,
            "graphs_gib": round(self.graphs_bytes / GIB, 3),
        }


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
