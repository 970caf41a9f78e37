"""Deterministic engines on a GPU, in bf16: many random schedules of one request."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from tests.conftest import save_tiny
from tests.engine.test_determinism import PROMPT, alone, among_others, bits
from tests.engines import VOCAB_SIZE

pytestmark = pytest.mark.gpu

# heads and widths as in Qwen3-0.6B and 30B-A3B, with fewer layers and experts
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("qwen3", {
        "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 3,
    }),
    "experts": ("qwen3_moe", {
        "hidden_size": 2048, "moe_intermediate_size": 768, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": 2, "num_experts": 16,
        "num_experts_per_tok": 8,
    }),
    "window": ("mistral", {
        "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
        "sliding_window": 70,
    }),
}  # fmt: skip
# schedules and options; few buckets, since their kernels are compiled here
ENGINES: tuple[tuple[int, dict[str, Any]], ...] = (
    (40, {}),
    (10, {"max_num_batched_tokens": 32}),
    (10, {"num_kvcache_blocks": 14, "max_model_len": 256}),
    (3, {"enforce_eager": True}),
)


@pytest.mark.parametrize(
    ("shape", "more"),
    [*((shape, {}) for shape in SHAPES), ("dense", {"kv_cache_dtype": "fp8"})],
    ids=[*SHAPES, "fp8 cache"],
)
def test_random_schedules(tmp_path: Path, shape: str, more: dict[str, Any]) -> None:
    architecture, changes = SHAPES[shape]
    folder = save_tiny(
        tmp_path / "model", architecture, dtype="bfloat16", vocab_size=VOCAB_SIZE, **changes
    )
    expected, rng = None, random.Random(12)
    for num_schedules, options in ENGINES:
        defaults: dict[str, Any] = {
            "max_num_seqs": 32, "max_model_len": 512, "num_kvcache_blocks": 400,
            "kvcache_block_size": 64, "skip_tokenizer_init": True, "deterministic": True,
            "graph_batch_sizes": (1, 32), "max_num_batched_tokens": 64,
        }  # fmt: skip
        llm = LLM(str(folder), **{**defaults, **options, **more})
        expected = expected or alone(llm)
        assert alone(llm) == expected
        for number in range(num_schedules):
            assert among_others(llm, rng) == expected, f"schedule {number} with {options}"
        answer = list(expected[0])
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1)
        (output,) = llm.generate([PROMPT + answer], params, use_tqdm=False)
        assert bits(answer, output["prompt_logprobs"][len(PROMPT) :]) == expected
        llm.close()
