"""Checkpoints with adapters of several kinds, and engines that take requests with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, LoRARequest
from nanovllm.schedule.outputs import FinishedOutput
from tests.engines import assert_all_free, drain, greedy
from tests.models import lora_cases

LENGTHS = (19, 1, 40, 33, 7, 20)
PROMPTS = [[(7 * i + 3 * j * j) % 120 + 5 for j in range(num)] for i, num in enumerate(LENGTHS)]
NAMES = (None, "french", "german", "french", None, "german")
SIZES: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "max_model_len": 128, "kvcache_block_size": 16,
    "max_num_seqs": 6, "max_num_batched_tokens": 64, "num_kvcache_blocks": 60,
    "skip_tokenizer_init": True,
}  # fmt: skip
LORA: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8, "max_cpu_loras": 3}
MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "graph": {"graph_batch_sizes": (1, 6)},
}
NUMBERS = {"french": 7, "german": 2, "dutch": 30, "danish": 4}


@pytest.fixture(scope="module")
def adapters(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoRARequest]:
    """Adapters of several kinds; "danish" has those of "german" on some layers alone."""
    root, found = tmp_path_factory.mktemp("adapters"), {}
    fields: dict[str, dict[str, Any]] = {
        "french": {"use_rslora": True},
        "german": {
            "ranks": {"q_proj": 2, "down_proj": 8}, "target_modules": r".*\.(q|v|o|down)_proj",
            "rank_pattern": {"q_proj": 2, "down_proj": 8}, "alpha_pattern": {"v_proj": 3},
            "named": lambda module: module.endswith(("q_proj", "v_proj", "o_proj", "down_proj")),
        },
        "dutch": {},
        "danish": {
            "target_modules": ["up_proj"], "layers_to_transform": [1],
            "named": lambda module: ".layers.1." in module and module.endswith("up_proj"),
        },
    }  # fmt: skip
    for seed, (name, changes) in enumerate(fields.items()):
        folder = lora_cases.save_adapter(root / name, checkpoint, seed=seed, **changes)
        found[name] = LoRARequest(name, NUMBERS[name], str(folder))
    return found


def make(checkpoint: Path, **options: Any) -> LLM:
    return LLM(str(checkpoint), **{**SIZES, **LORA, **MODES["eager"], **options})


@pytest.fixture(scope="module")
def eager(checkpoint: Path) -> Iterator[LLM]:
    llm = make(checkpoint, draft_lengths=(2,))
    yield llm
    llm.close()


class Asked:
    """Runs prompts with adapters, by their names."""

    def __init__(self, adapters: dict[str, LoRARequest]) -> None:
        self.adapters = adapters

    def __call__(
        self, llm: LLM, prompts: Sequence[list[int]], names: Sequence[str | None], num: int = 12
    ) -> list[FinishedOutput]:
        """Answers to prompts in one batch."""
        engine, params = llm.engine, greedy(num, logprobs=2)
        ids = [
            engine.add_request(prompt, params, incremental=False, lora_request=self.of(name))
            for prompt, name in zip(prompts, names)
        ]
        done = drain(llm)
        assert_all_free(llm)
        return [done[one] for one in ids]

    def of(self, name: str | None) -> LoRARequest | None:
        return None if name is None else self.adapters[name]

    def tokens(self, *args: Any) -> list[list[int]]:
        return [one.token_ids for one in self(*args)]


@pytest.fixture(scope="module")
def asked(adapters: dict[str, LoRARequest]) -> Asked:
    return Asked(adapters)


@pytest.fixture(scope="module")
def alone(eager: LLM, asked: Asked) -> list[list[int]]:
    """The answer to each prompt with its adapter, without company."""
    found = []
    for prompt, name in zip(PROMPTS, NAMES):
        eager.engine.forget_prefixes()
        found += asked.tokens(eager, [prompt], [name])
    return found
