"""A published GGUF file answers as transformers does with the same numbers, dequantized."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nanovllm import LLM, SamplingParams
from tests.gguf_model import smollm2

NUM_TOKENS = 20
PROMPTS = ("The capital of France is", "def fibonacci(n):\n", "Once upon a time, 123 dogs")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def path() -> Path:
    return smollm2()


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    llm = LLM(
        str(path), device="cpu", dtype="float32", enforce_eager=True, max_model_len=128,
        max_num_seqs=4, max_num_batched_tokens=256,
    )  # fmt: skip
    yield llm
    llm.engine.close()


@torch.no_grad()
def test_greedy_tokens_are_those_of_transformers(path: Path, llm: LLM) -> None:
    """Each token of transformers' answers is the engine's choice after the tokens before it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    folder = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    # from_pretrained would need accelerate
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**folder)).float().eval()
    stored = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(stored, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(**folder)
    known = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        assert llm.get_tokenizer().encode(prompt) == ids[0].tolist()
        answer = model.generate(
            ids, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, do_sample=False
        )
        known.append((len(ids[0]), answer[0].tolist()))
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    outputs = llm.generate([ids for _, ids in known], params, use_tqdm=False)
    for (num_prompt, ids), output in zip(known, outputs, strict=True):
        assert len(ids) == num_prompt + NUM_TOKENS
        for place in range(num_prompt, len(ids)):
            found = output["prompt_logprobs"][place]
            assert max(found, key=lambda token: found[token].logprob) == ids[place], place


def test_a_chat_through_the_file_s_template(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=8)
    (output,) = llm.chat(QUESTION, params, use_tqdm=False)
    assert output["text"] == "The capital of France is Paris."
    assert output["finish_reason"] == "stop"
