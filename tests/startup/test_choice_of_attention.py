"""The attention an engine was asked for is the one that runs, in eager mode and in graphs, and each engine has its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.compile.lower import eager, inductor
from nanovllm.kernels import ops
from tests.engines import Generate, random_prompts

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = random_prompts([1, 19, 99], seed=5)
GRAPHS: dict[str, Any] = {"enforce_eager": False, "graph_batch_sizes": (1, 4), "max_num_seqs": 4}


def tokens(llm: LLM) -> list[list[int]]:
    return [output["token_ids"] for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


@pytest.fixture(scope="module")
def expected(hf_generate: Generate) -> list[list[int]]:
    return [hf_generate(prompt, GREEDY.max_tokens) for prompt in PROMPTS]


def test_two_engines_each_with_its_own_attention(
    make_llm: Callable[..., LLM], expected: list[list[int]]
) -> None:
    torch_s, own = make_llm(attention_backend="sdpa"), make_llm()
    assert tokens(torch_s) == tokens(own) == expected
    chosen = [llm.engine.runner.spec.attention for llm in (torch_s, own)]
    assert chosen == ["sdpa", ""]


def test_graphs_hold_the_attention_that_was_asked_for_and_stores_keep_them_apart(
    make_llm: Callable[..., LLM],
    expected: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: set[str] = set()

    def lower(graph: Any, fakes: Sequence[torch.Tensor]) -> Callable[..., Sequence[torch.Tensor]]:
        found.update(name for node in graph.graph.nodes if (name := ops.op_name(node.target)))
        return eager.lower(graph, fakes)

    monkeypatch.setattr(inductor, "lower_if_worth_it", lower)
    options = {**GRAPHS, "compile_cache": tmp_path}
    assert tokens(make_llm(**options)) == expected
    assert {name for name in found if "attention" in name} == {"paged_attention"}
    for fuse in (True, False):
        found.clear()
        assert tokens(make_llm(**options, attention_backend="sdpa", fuse=fuse)) == expected
        assert {name for name in found if "attention" in name} == {"paged_attention_sdpa"}


def test_prefill_steps_that_ask_the_host_are_not_captured(
    make_llm: Callable[..., LLM], captured: list[object]
) -> None:
    layout = make_llm(**GRAPHS, attention_backend="sdpa").engine.runner.layout
    assert len(captured) == len(layout.decode_rows)


def test_a_stored_program_is_not_taken_for_another_attention(
    make_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    options = {**GRAPHS, "compile_cache": tmp_path}

    def num_compiled(**more: Any) -> int:
        llm = make_llm(**options, **more)
        return llm.engine.runner.compiler.num_compiled

    first = num_compiled()
    assert first > 0 and num_compiled() == 0
    assert (
        num_compiled(attention_backend="sdpa") > 0 and num_compiled(attention_backend="sdpa") == 0
    )


@pytest.mark.parametrize("name", ["fa2", "", None, "Triton", 2])
def test_an_unknown_backend_is_refused(make_llm: Callable[..., LLM], name: Any) -> None:
    with pytest.raises(
        ValueError,
        match=r"attention_backend is .*: it must be one of auto, triton, flash_attn, sdpa",
    ):
        make_llm(attention_backend=name, device="cpu")


@pytest.mark.parametrize("name", ["triton", "flash_attn"])
def test_a_gpu_s_backend_is_refused_on_a_cpu(make_llm: Callable[..., LLM], name: str) -> None:
    with pytest.raises(
        ValueError,
        match=f"attention_backend '{name}' is not for the device cpu: use 'auto' or 'sdpa'",
    ):
        make_llm(attention_backend=name, device="cpu")
