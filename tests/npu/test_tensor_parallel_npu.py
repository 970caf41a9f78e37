"""An engine on two NPUs: two processes, gloo in the place of HCCL, the interpreter in that of GE."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM
from tests.npu.conftest import SIZES, answers
from tests.npu.ge import Ge, Graph

NUM_LAYERS = 6


@pytest.fixture(autouse=True)
def _patched_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank's process has the patches of this one."""
    paths = [str(Path(__file__).parent / "at_start"), os.environ["PYTHONPATH"]]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


MODES: dict[str, dict[str, Any]] = {
    "ascend_ir": {},
    "aclgraph": {"npu_graph_mode": "aclgraph"},
    "npugraph_ex": {"npu_graph_mode": "npugraph_ex"},
    "eager": {"enforce_eager": True},
}


@pytest.mark.parametrize("mode", MODES)
def test_answers_are_those_of_one_rank(
    mode: str, cpu_answers: Callable[..., list[list[int]]]
) -> None:
    llm = LLM("tiny-qwen3", device="npu", tensor_parallel_size=2, **SIZES, **MODES[mode])
    try:
        assert answers(llm, max_tokens=12) == cpu_answers(max_tokens=12)
    finally:
        llm.close()
