"""Engines whose ranks, each a process, have whole experts: answers, refusals, programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM
from tests.conftest import save_tiny
from tests.engine.test_tensor_parallel import SIZES, make, prompts
from tests.engines import greedy, tokens

EIGHT = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EIGHT, "shared_expert_intermediate_size": 64, "mlp_only_layers": [1]},
    "qwen3_moe": {**EIGHT, "norm_topk_prob": True},
}


@pytest.mark.parametrize(
    ("architecture", "size"), [("mixtral", 2), ("qwen2_moe", 4), ("qwen3_moe", 2)]
)
def test_answers_are_those_of_one_rank(architecture: str, size: int, tmp_path: Path) -> None:
    folder = save_tiny(
        tmp_path / "model", architecture, vocab_size=101, **ARCHITECTURES[architecture]
    )
    found = []
    for options in ({"size": 1}, {"size": size, "expert_parallel": True}):
        llm = make(folder, **options)
        found.append(tokens(llm, prompts(101), greedy(8)))
        llm.close()
    assert found[0] == found[1]


def test_graphs_of_a_cold_and_a_warm_start(bare_store: Path) -> None:
    """The embedded model, whose experts are narrow: "auto" places whole ones."""
    sizes: dict[str, Any] = {**SIZES, "skip_tokenizer_init": False, "max_num_seqs": 2}
    question = ["What is 12 plus 30?", "What is the capital of France?"]

    def answers(**options: Any) -> tuple[int, bool, list[str]]:
        llm = LLM("tiny-mixtral", **sizes, **options)
        try:
            outputs = llm.generate(question, greedy(8), use_tqdm=False)
            runner: Any = llm.engine.runner
            moe = runner.cfg.moe
            return (
                runner.compiler.num_compiled,
                moe.is_expert_parallel,
                [one["text"] for one in outputs],
            )
        finally:
            llm.close()

    graphs = {"graph_batch_sizes": [2], "compile_cache": str(bare_store), "tensor_parallel_size": 2}
    _, is_expert_parallel, expected = answers(enforce_eager=True)
    assert not is_expert_parallel
    cold, warm = answers(**graphs), answers(**graphs)
    assert cold[0] > 0 and warm[0] == 0
    assert cold[1:] == warm[1:] == (True, expected)


def test_experts_that_ranks_cannot_share_leave_nothing_behind(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "mixtral", num_local_experts=5, num_experts_per_tok=2)
    with pytest.raises(ValueError, match="tensor_parallel_size 2, which must divide the 5 experts"):
        make(folder, 2, expert_parallel=True)
