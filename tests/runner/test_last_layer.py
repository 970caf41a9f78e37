"""Warm-up builds both kinds of prefill, for any windows of the layers.

The last layer computes all tokens with prompt_logprobs, else only the last token of each chunk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, EngineConfig, SamplingParams
from nanovllm.startup.compile_farm.builder import small_runner
from nanovllm.startup.resolve import resolve_without_weights
from tests.conftest import save_tiny
from tests.engines import random_prompts

OPTIONS: dict[str, Any] = {
    "max_num_seqs": 4, "graph_batch_sizes": [4], "max_num_batched_tokens": 128,
    "max_model_len": 128, "dtype": "float32", "kvcache_block_size": 16, "num_kvcache_blocks": 40,
}  # fmt: skip
WINDOWS = {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 16}
MODELS: dict[str, dict[str, Any]] = {
    "one layer": {"num_hidden_layers": 1},
    "a window on the last layer alone": {**WINDOWS, "max_window_layers": 2},
    "a window on all but the last": {
        **WINDOWS,
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
    },
    "the last one's window on another": {
        **WINDOWS,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, bool]:
    """A checkpoint, and whether no other layer has the window of the last one."""
    folder = save_tiny(tmp_path / "model", **MODELS[request.param])
    return folder, request.param != "the last one's window on another"


def programs_and_kernels(llm: LLM) -> tuple[set[tuple[object, ...]], list[str]]:
    runner = llm.engine.runner
    return set(runner.compiler._programs), list(runner.platform.kernels_compiled())


def test_prompt_logprobs_are_right_and_compile_nothing(
    model: tuple[Path, bool], device: str
) -> None:
    from transformers import AutoModelForCausalLM

    folder, alone = model
    llm = LLM(str(folder), device=device, **OPTIONS)
    assert llm.engine.runner.model.last_layer_needs_own_program == alone
    before = programs_and_kernels(llm)
    prompts = random_prompts([99, 19, 1, 40], seed=5)
    plain = [SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)] * 4
    asked = [
        SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, prompt_logprobs=0),
        *plain[1:],
    ]
    filtered = [SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=0)] * 4
    answers = [llm.generate(prompts, params, use_tqdm=False) for params in (plain, asked, filtered)]
    (alone_asked,) = llm.generate(prompts[1:2], asked[:1], use_tqdm=False)
    assert programs_and_kernels(llm) == before
    hf = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    def expected(token_ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return hf(torch.tensor([token_ids])).logits[0].log_softmax(-1)

    for prompt, outputs in zip(prompts, zip(*answers, strict=True), strict=True):
        token_ids = outputs[0]["token_ids"]
        greedy = expected(prompt + token_ids).argmax(-1)[len(prompt) - 1 : -1].tolist()
        assert [output["token_ids"] for output in outputs] == [greedy] * 3
    for prompt, output in ((prompts[0], answers[1][0]), (prompts[1], alone_asked)):
        logprobs = expected(prompt)
        for idx in range(1, len(prompt)):
            assert output["prompt_logprobs"][idx] == {
                prompt[idx]: pytest.approx(float(logprobs[idx - 1, prompt[idx]]), abs=1e-3)
            }


def test_the_small_model_leaves_every_program_of_the_whole_one(
    model: tuple[Path, bool], tmp_path: Path
) -> None:
    options = {**OPTIONS, "device": "cpu", "compile_cache": tmp_path / "store"}
    sampling = resolve_without_weights(EngineConfig(str(model[0]), **options))
    small = small_runner(sampling)
    for kind, size in sampling.spec.layout.buckets:
        small.run_bucket(kind, size)
    llm = LLM(str(model[0]), **options, compile_cache_mode="require")
    compiler = llm.engine.runner.compiler
    assert (compiler.num_compiled, compiler.num_loaded) == (0, small.compiler.num_compiled)
