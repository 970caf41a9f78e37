"""Two processes give one's tokens for models with latent attention and sinks.

`test_heads_on_ranks.py` compares a hybrid model, Qwen3.5 with experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM
from tests.engines import greedy, random_prompts, tokens
from tests.models import gpt_oss_cases, latent_cases

SIZES: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "enforce_eager": True, "max_num_seqs": 2,
    "max_num_batched_tokens": 64, "max_model_len": 128, "kvcache_block_size": 16,
    "num_kvcache_blocks": 33, "skip_tokenizer_init": True,
}  # fmt: skip
SAVE = {"deepseek_v3": latent_cases.BY_NAME["v3"].save, "gpt_oss": gpt_oss_cases.save}


@pytest.mark.parametrize("name", SAVE)
def test_two_ranks_answer_what_one_answers(name: str, tmp_path: Path) -> None:
    folder = SAVE[name](tmp_path / "model")
    prompts = [[token % 96 for token in prompt] for prompt in random_prompts([19, 70], seed=4)]
    found = []
    for size in (1, 2):
        llm = LLM(str(folder), tensor_parallel_size=size, **SIZES)
        try:
            found.append(tokens(llm, prompts, greedy(8)))
        finally:
            llm.close()
    assert found[0] == found[1]
    assert len({*found[0][0], *found[0][1]}) > 3, "one token again and again shows nothing"
