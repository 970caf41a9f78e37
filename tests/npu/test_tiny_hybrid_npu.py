"""The embedded hybrid on device "npu": held-out questions, by GE's graphs and in eager mode."""

from __future__ import annotations

from typing import Any

import pytest

from nanovllm import LLM
from nanovllm.hub import HYBRID
from tests.engine.test_tiny_hybrid import LEAST, ask, questions
from tests.npu.ge import Ge
from tests.npu.host import Host

SIZES: dict[str, Any] = {
    "max_num_seqs": 16, "graph_batch_sizes": (16,), "num_kvcache_blocks": 40, "max_model_len": 256,
    "max_num_batched_tokens": 128,
}  # fmt: skip


@pytest.mark.shows("NPU", architectures=["Qwen3_5ForCausalLM"])
@pytest.mark.parametrize("is_eager", [False, True], ids=["ge", "eager"])
def test_held_out_questions_are_answered(is_eager: bool, ge: Ge, host: Host) -> None:
    asked = questions(HYBRID, 48, 0)
    llm = LLM(HYBRID, device="npu", enforce_eager=is_eager, **SIZES)
    _, share, wrong = ask(llm, asked)
    llm.close()
    assert share >= LEAST, wrong[:10]
