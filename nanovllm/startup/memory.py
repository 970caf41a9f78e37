"""The use of device memory, for the log and for benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm.platforms.base import MemoryBudget

GIB = 1 << 30


@dataclass(frozen=True)
class MemoryReport:
    """Bytes after warm-up.

    graphs_bytes: taken by captured steps; 0 if none are captured or the device does not count.
    budget: the measurement that determines the cache's size; None if the options set the size.
    limited: True if the cache holds all that requests can use and memory is left over.
    host_bytes: experts in host memory; those also on the device count as weights too.
    """

    weights_bytes: int
    cache_bytes: int
    cache_tokens: int
    graphs_bytes: int
    budget: MemoryBudget | None
    limited: bool
    host_bytes: int = 0

    @property
    def cache_share(self) -> float | None:
        """The cache's share of the allowance: `gpu_memory_utilization` less weights and others."""
        return self.cache_bytes / self.budget.allowance_bytes if self.budget else None

    def __str__(self) -> str:
        share = "as requested"
        if self.budget is not None:
            share = f"{self.cache_share:.1%} of the allowance"
            if self.limited:
                share += ", all that max_num_seqs requests of max_model_len can use"
            share += f"; scratch {_gib(self.budget.scratch_bytes)}"
        host = f", experts on the host {_gib(self.host_bytes)}" if self.host_bytes else ""
        return (
            f"weights {_gib(self.weights_bytes)}{host}, KV cache {_gib(self.cache_bytes)} for "
            f"{self.cache_tokens} tokens ({share}), graphs {_gib(self.graphs_bytes)}"
        )

    def as_dict(self) -> dict[str, float | int | bool | None]:
        """For a line of JSON; sizes in GiB."""
        budget, share = self.budget, self.cache_share
        room = budget.cache_bytes / budget.allowance_bytes if budget else None
        return {
            "weights_gib": round(self.weights_bytes / GIB, 3),
            "host_gib": round(self.host_bytes / GIB, 3),
            "kv_cache_gib": round(self.cache_bytes / GIB, 3),
            "kv_cache_tokens": self.cache_tokens,
            "kv_allowance_gib": round(budget.allowance_bytes / GIB, 3) if budget else None,
            "kv_share_of_allowance": round(share, 4) if share is not None else None,
            "kv_room_share": round(room, 4) if room is not None else None,
            "kv_limited_by_requests": self.limited,
            "scratch_gib": round(budget.scratch_bytes / GIB, 3) if budget else None,
            "graphs_gib": round(self.graphs_bytes / GIB, 3),
        }


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
