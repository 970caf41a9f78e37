"""The embedded model that sees on device "npu": transformers' answers, and its accuracy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from nanovllm import LLM, SamplingParams
from nanovllm.hub import SEEING
from tests.engine.test_tiny_seeing import (
    FOLDER,
    KINDS,
    NUM_TOKENS,
    ask,
    generated,
    held_out,
    questions,
)
from tests.npu.ge import Ge
from tests.npu.host import Host
from tests.npu.test_vision_npu import _fp32

__all__ = ["_fp32"]
SIZES: dict[str, Any] = {
    "max_num_seqs": 8, "graph_batch_sizes": (8,), "num_kvcache_blocks": 40, "max_model_len": 256,
    "max_num_batched_tokens": 256, "vision_patch_budgets": (256,),
}  # fmt: skip


def test_greedy_answers_through_ges_graphs_are_those_of_transformers(ge: Ge, host: Host) -> None:
    hf = Qwen3VLForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tasks = list(held_out(len(KINDS), 19))
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    llm = LLM(SEEING, device="npu", dtype="float32", **SIZES)
    outputs = llm.chat([one.messages for one in tasks], params, use_tqdm=False)
    llm.close()
    assert [output["text"] for output in outputs] == [generated(hf, one) for one in tasks]


@pytest.mark.shows("NPU", architectures=["Qwen3VLForConditionalGeneration"])
def test_held_out_questions_are_answered_through_ges_graphs(ge: Ge, host: Host) -> None:
    llm = LLM(SEEING, device="npu", **SIZES)
    by_kind, total, wrong = ask(llm, questions(SEEING, 10 * len(KINDS), 0))
    llm.close()
    assert total >= 0.95, (by_kind, wrong[:10])
