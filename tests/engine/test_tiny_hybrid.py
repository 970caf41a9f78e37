"""The embedded hybrid, whose layers are a gated delta rule and attention: it answers held-out
questions, as transformers does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# scripts are run as files, and import each other as such
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from accuracy import ask, questions

from nanovllm import LLM, SamplingParams
from nanovllm.hub import HYBRID, resolve

SIZES: dict[str, Any] = {
    "max_num_seqs": 16, "graph_batch_sizes": [16], "max_model_len": 256,
    "max_num_batched_tokens": 128,
}  # fmt: skip
NUM_QUESTIONS, LEAST = 64, 0.95  # its card has 0.998, of 3,200


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("cpu", True), id="eager"),
        pytest.param(("cpu", False), id="graph"),
        pytest.param(("cuda", True), id="cuda-eager", marks=pytest.mark.gpu),
        pytest.param(("cuda", False), id="cuda-graph", marks=pytest.mark.gpu),
    ],
)
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    device, is_eager = request.param
    llm = LLM(HYBRID, device=device, dtype="float32", enforce_eager=is_eager, **SIZES)
    yield llm
    llm.close()


def test_held_out_questions_are_answered(llm: LLM) -> None:
    by_kind, total, wrong = ask(llm, questions(HYBRID, NUM_QUESTIONS, 0))
    assert total >= LEAST, (by_kind, wrong[:10])


def test_greedy_answers_are_those_of_transformers(llm: LLM) -> None:
    hf = AutoModelForCausalLM.from_pretrained(resolve(HYBRID), dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(resolve(HYBRID))
    asked = [one.messages for one in questions(HYBRID, 4, 7)]
    params = SamplingParams(temperature=0, max_tokens=24)
    found = [one["text"] for one in llm.chat(asked, params, use_tqdm=False)]
    for messages, text in zip(asked, found):
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = hf.generate(input_ids=ids, max_new_tokens=24, do_sample=False)
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == text
