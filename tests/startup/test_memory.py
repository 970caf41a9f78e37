"""The memory allowance of the cache and its report, on simulated devices."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from nanovllm import LLM, platforms
from nanovllm.platforms.accelerator import Accelerator
from nanovllm.platforms.base import MemoryBudget
from nanovllm.startup.memory import GIB, MemoryReport

BLOCK_BYTES = 2 * 2 * 2 * 32 * 4 * 16  # keys and values, layers, heads, head size, fp32, tokens


def budget(
    utilization: float,
    *,
    total_bytes: int,
    free_bytes: int,
    reserved_bytes: int,
    allocated_bytes: int,
    peak_bytes: int,
) -> MemoryBudget:
    """The budget of an accelerator whose torch reports these sizes."""
    stats = {
        "reserved_bytes.all.current": reserved_bytes,
        "allocated_bytes.all.current": allocated_bytes,
        "allocated_bytes.all.peak": peak_bytes,
    }
    runtime = SimpleNamespace(
        mem_get_info=lambda device: (free_bytes, total_bytes), memory_stats=lambda device: stats
    )
    simulated: Any = SimpleNamespace(runtime=runtime, device=None)
    return Accelerator.memory_budget(simulated, utilization)


def test_the_allowance_is_what_the_share_leaves_beside_weights_and_others() -> None:
    """100 of memory: 7 of other processes, 33 weights, 12 unused in torch; the step's peak is 5."""
    found = budget(
        0.9, total_bytes=100, free_bytes=48, reserved_bytes=45, allocated_bytes=33, peak_bytes=38
    )
    assert found == MemoryBudget(allowance_bytes=90 - 33 - 7, scratch_bytes=5)
    assert found.cache_bytes == 45


def test_the_unused_share_stays_free_and_nothing_is_negative() -> None:
    small = budget(
        0.2, total_bytes=100, free_bytes=40, reserved_bytes=60, allocated_bytes=60, peak_bytes=60
    )
    assert small.allowance_bytes < 0 and small.cache_bytes == 0


def test_an_h200_gives_the_cache_nearly_all_of_its_allowance() -> None:
    """A model of 1.2 GiB and a largest step of 0.6 GiB on a device with 140 GiB."""
    total, weights, context = 140 * GIB, int(1.2 * GIB), GIB // 2
    found = budget(
        0.9,
        total_bytes=total,
        free_bytes=total - context - 2 * GIB,
        reserved_bytes=2 * GIB,
        allocated_bytes=weights,
        peak_bytes=weights + int(0.6 * GIB),
    )
    assert found.allowance_bytes == int(0.9 * total) - weights - context
    assert found.cache_bytes / found.allowance_bytes > 0.99


def make(**options: Any) -> dict[str, Any]:
    return {"num_kvcache_blocks": None, "max_num_seqs": 2, "max_model_len": 64, **options}


@pytest.mark.parametrize(
    ("num_fit", "num_used", "limited"), [(6, 6, False), (9, 9, False), (10, 9, True)]
)
def test_the_cache_takes_its_allowance_or_all_it_can_use(
    make_llm: Callable[..., LLM],
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    num_fit: int,
    num_used: int,
    limited: bool,
) -> None:
    given = MemoryBudget(num_fit * BLOCK_BYTES + 700, scratch_bytes=600)
    monkeypatch.setattr(type(platforms.select(device)), "memory_budget", lambda *_: given)
    memory = make_llm(**make()).engine.memory
    assert (
        memory.cache_bytes == num_used * BLOCK_BYTES and memory.cache_tokens == (num_used - 1) * 16
    )
    assert memory.limited == limited and memory.budget == given
    assert memory.cache_share == num_used * BLOCK_BYTES / given.allowance_bytes
    assert ("all that max_num_seqs" in str(memory)) == limited


def test_the_report_counts_tied_weights_once_and_says_when_the_size_was_given(
    make_llm: Callable[..., LLM],
) -> None:
    engine = make_llm(**make(num_kvcache_blocks=7)).engine
    params = engine.runner.params
    assert params.head_VD is params.embed_VD
    layers = sum(tensor.nbytes for layer in params.layers for tensor in layer if tensor is not None)
    assert (
        engine.memory.weights_bytes == params.embed_VD.nbytes + layers + params.final_norm_D.nbytes
    )
    assert engine.memory.budget is None and "as requested" in str(engine.memory)
    assert engine.memory.as_dict()["kv_share_of_allowance"] is None


def test_the_graphs_memory_is_what_recording_took(
    make_llm: Callable[..., LLM], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest graph takes 500 bytes, the others take 10 each from the same pool."""
    platform = type(platforms.select(device))
    used = [1000]
    capture = platform.capture

    def counted(self: Any, step: Callable[[], None]) -> Any:
        used[0] += 500 if used[0] == 1000 else 10
        return capture(self, step)

    monkeypatch.setattr(platform, "capture", counted)
    monkeypatch.setattr(platform, "used_bytes", lambda *_: used[0])
    options = make(num_kvcache_blocks=7, graph_batch_sizes=(1, 2), enforce_eager=False)
    llm = make_llm(**options)
    num_others = (
        len(llm.engine.runner.layout.decode_rows) + len(llm.engine.runner.layout.prefill_tokens) - 1
    )
    assert llm.engine.memory.graphs_bytes == 500 + 10 * num_others
    assert make_llm(**options, capture=False).engine.memory.graphs_bytes == 0


def test_the_line_names_every_share() -> None:
    memory = MemoryReport(
        3 * GIB // 2, 90 * GIB, 823_456, GIB // 4, MemoryBudget(91 * GIB, GIB // 2), limited=False
    )
    assert str(memory) == (
        "weights 1.50 GiB, KV cache 90.00 GiB for 823456 tokens "
        "(98.9% of the allowance; scratch 0.50 GiB), graphs 0.25 GiB"
    )
    assert memory.as_dict()["kv_cache_gib"] == 90.0
