"""Two GPUs that sleep behind captured graphs, and that each offload their part of the experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import save_tiny
from tests.engine.test_memory_of_ranks import EXPERTS, LARGE
from tests.engine.test_tensor_parallel import make, prompts, tokens
from tests.engines import greedy

pytestmark = pytest.mark.gpus
NUM_BLOCKS = 16_384
GRAPHS = {"device": "cuda", "enforce_eager": False, "graph_batch_sizes": [1, 4]}


def free_bytes() -> list[int]:
    return [torch.cuda.mem_get_info(index)[0] for index in range(2)]


def test_both_gpus_free_their_memory_and_their_graphs_answer_the_same(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", **LARGE)
    llm = make(folder, 2, enable_sleep_mode=True, num_kvcache_blocks=NUM_BLOCKS, **GRAPHS)
    try:
        expected = tokens(llm, prompts(), greedy(16))
        runner = llm.engine.runner
        cache_bytes = NUM_BLOCKS * runner.block_bytes
        for level in (1, 2):
            awake = free_bytes()
            llm.sleep(level)
            for before, after in zip(awake, free_bytes()):
                assert after - before > 0.9 * (cache_bytes + runner.weights_bytes)
            llm.wake_up()
            for before, after in zip(awake, free_bytes()):
                assert abs(after - before) < 0.1 * cache_bytes
            assert tokens(llm, prompts(), greedy(16)) == expected
    finally:
        llm.close()


@pytest.mark.parametrize("architecture", EXPERTS)
def test_two_gpus_offload_and_answer_what_one_answers(architecture: str, tmp_path: Path) -> None:
    changes = {**EXPERTS[architecture], "vocab_size": 101}
    folder = save_tiny(tmp_path / "model", architecture, **changes)
    found = []
    for size, options in ((1, {}), (2, {"expert_offload": 2})):
        llm = make(folder, size, **GRAPHS, **options)
        found.append(tokens(llm, prompts(101), greedy(12)))
        llm.close()
    assert found[0] == found[1]
