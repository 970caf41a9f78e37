"""Two and four processes give one's tokens for models with recurrent layers, latents and sinks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM
from tests.engines import greedy, random_prompts, tokens
from tests.models import gpt_oss_cases, hybrid_cases, latent_cases, mamba_cases

SIZES: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "enforce_eager": True, "max_num_seqs": 2,
    "max_num_batched_tokens": 128, "max_model_len": 128, "kvcache_block_size": 16,
    "num_kvcache_blocks": 33, "skip_tokenizer_init": True,
}  # fmt: skip
# what four ranks can share: a group of a mixer for each
FALCON = {"mamba_n_groups": 4, "mamba_n_heads": 8, "mamba_d_ssm": 96}
NEMOTRON = {"n_groups": 4, "mamba_num_heads": 8}
FAMILIES = {case.name: case for case in (*hybrid_cases.CASES, *mamba_cases.CASES)}


def family(name: str, **changes: Any) -> Callable[[Path], Path]:
    return lambda folder: FAMILIES[name].save(folder, **changes)


SAVE: dict[str, Callable[[Path], Path]] = {
    "deepseek_v3": latent_cases.BY_NAME["v3"].save,
    "gpt_oss": gpt_oss_cases.save,
    "qwen3_next": family("qwen3_next"),
    "falcon_h1": family("falcon_h1", **FALCON),
    "nemotron_h": family("nemotron_h", **NEMOTRON),
}


@pytest.mark.parametrize("name", SAVE)
def test_two_and_four_ranks_answer_what_one_answers(name: str, tmp_path: Path) -> None:
    """The second call's prompt begins with one of the first call's: its blocks, and in recurrent
    layers the states at their end, are taken again."""
    folder = SAVE[name](tmp_path / "model")
    first = [[token % 96 for token in prompt] for prompt in random_prompts([19, 70], seed=4)]
    again = [first[1] + [5, 6, 7]]
    found = []
    for size in (1, 2, 4):
        llm = LLM(str(folder), tensor_parallel_size=size, **SIZES)
        try:
            answers = tokens(llm, first, greedy(8))
            (output,) = llm.generate(again, greedy(8), use_tqdm=False)
            assert output.num_cached_tokens == 64
            found.append([*answers, output.outputs[0].token_ids])
        finally:
            llm.close()
    assert found[0] == found[1] == found[2]
    assert len({*found[0][0], *found[0][1]}) > 3, "one token again and again shows nothing"
