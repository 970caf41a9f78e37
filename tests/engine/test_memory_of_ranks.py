"""Memory of several ranks: all free it for sleep, and each has its part of offloaded experts."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM
from tests.conftest import save_tiny
from tests.engine.test_tensor_parallel import make, pids, prompts, tokens
from tests.engines import greedy

# Weights of some 60 MB, so that a rank's half is seen in the memory of its process.
LARGE = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 2, "vocab_size": 499}
NUM_BLOCKS = 4096
EXPERTS = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    # too narrow to be split without offload
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
}


def used_bytes(pid: int) -> int:
    gc.collect()
    pages = Path(f"/proc/{pid}/statm").read_text().split()
    return 4096 * (int(pages[1]) - int(pages[2]))  # without files


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("large"), **LARGE)


@pytest.fixture(scope="module")
def two(large: Path) -> Iterator[LLM]:
    llm = make(large, 2, num_kvcache_blocks=NUM_BLOCKS, enable_sleep_mode=True)
    yield llm
    llm.close()


def test_all_ranks_free_their_memory_and_answer_the_same_afterwards(two: LLM) -> None:
    runner = two.engine.runner
    expected = tokens(two, prompts(), greedy(8))
    (other,) = pids(two)
    cache_bytes = NUM_BLOCKS * runner.block_bytes
    two.sleep(1)
    two.wake_up()  # all blocks have been written now
    for level, freed in ((1, cache_bytes), (2, cache_bytes + runner.weights_bytes)):
        awake = used_bytes(other)
        two.sleep(level)
        assert awake - used_bytes(other) > 0.8 * freed
        with pytest.raises(RuntimeError, match=r"the engine sleeps: call wake_up\(\)"):
            tokens(two, prompts(), greedy(1))
        two.wake_up(["weights"])
        assert two.engine.is_sleeping
        two.wake_up(["kv_cache"])
        assert awake - used_bytes(other) < 0.2 * freed
        assert tokens(two, prompts(), greedy(8)) == expected


def test_what_one_rank_refuses_leaves_all_ranks_usable(two: LLM, large: Path) -> None:
    expected = tokens(two, prompts(), greedy(8))
    for level in (0, "1", None):
        with pytest.raises(ValueError, match=f"level is {level!r}: it must be 1"):
            two.sleep(level)  # type: ignore[arg-type]
    two.sleep(2)
    with pytest.raises(ValueError, match="tags holds 'x'"):
        two.wake_up(["x"])
    (large / "model.safetensors").rename(large / "away")
    with pytest.raises(ValueError, match=r"no .safetensors file"):
        two.wake_up()
    assert two.engine.is_sleeping
    (large / "away").rename(large / "model.safetensors")
    two.wake_up()
    assert tokens(two, prompts(), greedy(8)) == expected


@pytest.mark.parametrize("options", [{}, {"random_weights": True}], ids=["read", "random"])
def test_graphs_answer_the_same_after_sleep(
    options: dict[str, Any], tmp_path: Path, bare_store: Path
) -> None:
    folder = save_tiny(tmp_path / "model", vocab_size=499)
    graphs = {"enforce_eager": False, "graph_batch_sizes": [4], "compile_cache": str(bare_store)}
    llm = make(folder, 2, enable_sleep_mode=True, **graphs, **options)
    try:
        expected = tokens(llm, prompts(), greedy(8))
        llm.sleep(2)
        llm.wake_up()
        assert tokens(llm, prompts(), greedy(8)) == expected
    finally:
        llm.close()


@pytest.mark.parametrize("architecture", EXPERTS)
def test_each_rank_offloads_its_part_of_the_experts(architecture: str, tmp_path: Path) -> None:
    """Slots for two of eight experts, so that others are fetched or streamed all the time."""
    changes = EXPERTS[architecture]
    folder = save_tiny(tmp_path / "model", architecture, vocab_size=101, **changes)
    for options in ({}, {"random_weights": True}):
        alone = make(folder, 1, expert_offload=2, **options)
        whole = alone.engine.runner.offloaded[0].expert_bytes
        alone.close()
        resident, two = make(folder, 1, **options), make(folder, 2, expert_offload=2, **options)
        try:
            stored = two.engine.runner.offloaded[0]
            assert 2 * stored.expert_bytes == whole and len(stored.residents.owner_S) == 2
            assert tokens(two, prompts(101), greedy(12)) == tokens(
                resident, prompts(101), greedy(12)
            )
            assert any(two.engine.runner.expert_counts())
        finally:
            resident.close()
            two.close()


def test_offloaded_experts_of_ranks_in_graphs(tmp_path: Path, bare_store: Path) -> None:
    """With slots that all layers share, and experts that are predicted."""
    folder = save_tiny(tmp_path / "model", "mixtral", vocab_size=101, **EXPERTS["mixtral"])
    graphs = {"enforce_eager": False, "graph_batch_sizes": [4], "compile_cache": str(bare_store)}
    alone = make(folder, 1)
    expected = tokens(alone, prompts(101), greedy(12))
    expert_bytes = 3 * 64 * alone.engine.runner.cfg.moe.expert_size * 4 // 2
    alone.close()
    prefetch = {"tuning": {"expert_prefetch": True}}
    two = make(folder, 2, expert_offload=f"{3 * expert_bytes}B", **graphs, **prefetch)
    try:
        plan = two.engine.runner.spec.offload
        assert plan is not None and plan.is_shared and plan.num_slots == 3
        assert tokens(two, prompts(101), greedy(12)) == expected
    finally:
        two.close()


def test_a_budget_of_bytes_is_that_of_each_rank(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "mixtral", vocab_size=101, **EXPERTS["mixtral"])
    slots = []
    for size in (1, 2):
        llm = make(folder, size, expert_offload="400KB")
        slots.append(len(llm.engine.runner.offloaded[0].residents.owner_S))
        llm.close()
    assert slots[1] in (2 * slots[0], 2 * slots[0] + 1)


def test_whole_experts_on_ranks_are_not_offloaded(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "mixtral", vocab_size=101, **EXPERTS["mixtral"])
    with pytest.raises(ValueError, match="does not go with expert_offload and expert_parallel"):
        make(folder, 2, expert_offload=2, expert_parallel=True)
