"""Two and four ranks give one's tokens for models with recurrent layers, latents and sinks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# scripts are run as files, and import each other as such
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from accuracy import ask, questions

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


GRAPHS = {"enforce_eager": False, "graph_batch_sizes": [2]}
# captured where a program has the most kinds of state
ON_GPUS: dict[str, dict[str, Any]] = {
    **{name: {} for name in SAVE}, "deepseek_v3": GRAPHS, "qwen3_next": GRAPHS
}  # fmt: skip


@pytest.mark.parametrize("name", SAVE)
def test_two_and_four_ranks_answer_what_one_answers(name: str, tmp_path: Path) -> None:
    compare_ranks(SAVE[name](tmp_path / "model"), (1, 2, 4))


@pytest.mark.gpus
@pytest.mark.parametrize("name", ON_GPUS)
def test_gpus_answer_what_one_answers(name: str, tmp_path: Path) -> None:
    """Two, and four where there are so many."""
    sizes = tuple(num for num in (1, 2, 4) if num <= torch.cuda.device_count())
    compare_ranks(SAVE[name](tmp_path / "model"), sizes, device="cuda", **ON_GPUS[name])


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"device": "cuda", "enforce_eager": False, **rounded}, marks=pytest.mark.gpus)
        for rounded in ({"quantization": "int4"}, {"quantization": "fp8", "kv_cache_dtype": "fp8"})
    ],
    ids=["int4", "fp8"],
)
def test_two_gpus_answer_held_out_questions_with_rounded_weights(options: dict[str, Any]) -> None:
    """Parts of a depth are summed in another order than whole ones, and activations are rounded by
    each rank: so it is answers that count."""
    sizes = {"max_num_seqs": 16, "graph_batch_sizes": [16], "max_model_len": 1024}
    llm = LLM("tiny-qwen3", tensor_parallel_size=2, **sizes, **options)
    try:
        _, share, wrong = ask(llm, questions("tiny-qwen3", 64, 0))
    finally:
        llm.close()
    assert share >= 0.95, wrong[:10]


def compare_ranks(folder: Path, sizes: tuple[int, ...], **options: Any) -> None:
    """The second call's prompt begins with one of the first call's: its blocks, and in recurrent
    layers the states at their end, are taken again."""
    first = [[token % 96 for token in prompt] for prompt in random_prompts([19, 70], seed=4)]
    again = [first[1] + [5, 6, 7]]
    found = []
    for size in sizes:
        llm = LLM(str(folder), tensor_parallel_size=size, **{**SIZES, **options})
        try:
            answers = tokens(llm, first, greedy(8))
            (output,) = llm.generate(again, greedy(8), use_tqdm=False)
            assert output.num_cached_tokens == 64
            found.append([*answers, output.outputs[0].token_ids])
        finally:
            llm.close()
    assert all(answers == found[0] for answers in found)
    assert len({*found[0][0], *found[0][1]}) > 3, "one token again and again shows nothing"
