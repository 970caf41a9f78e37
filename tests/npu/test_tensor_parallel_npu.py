"""Engines on two NPUs: a process each, with gloo in the place of HCCL and the interpreter in that
of GE."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.platforms.npu import NpuPlatform
from tests.npu import conftest, ir_rules
from tests.npu.conftest import QUESTIONS, answers
from tests.npu.ge import Ge, Graph

SIZES: dict[str, Any] = {**conftest.SIZES, "graph_batch_sizes": (4,)}
NUM_LAYERS = 6
NUM_TOKENS = 12
VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"


@pytest.fixture(scope="module", autouse=True)
def _two_devices() -> Iterator[None]:
    """The stub has one device, which all processes use. Ranks and replicas have the patches of this
    process."""
    with pytest.MonkeyPatch.context() as patch:
        npu: Any = torch
        patch.setattr(npu.npu, "device_count", lambda: 2)
        paths = [str(Path(__file__).parent / "at_start"), os.environ["PYTHONPATH"]]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        yield


def answers_of(model: str = "tiny-qwen3", **options: Any) -> list[list[int]]:
    llm = LLM(model, device="npu", **{**SIZES, **options})
    try:
        return answers(llm, max_tokens=NUM_TOKENS)
    finally:
        llm.close()


class Run(NamedTuple):
    """A cold start on two ranks in mode ascend_ir."""

    answers: list[list[int]]
    graphs: list[Graph]  # of rank 0
    store: Path


@pytest.fixture(scope="module")
def cold(ge: Ge, tmp_path_factory: pytest.TempPathFactory) -> Run:
    store, first = tmp_path_factory.mktemp("store"), len(ge.graphs)
    found = answers_of(tensor_parallel_size=2, compile_cache=store)
    return Run(found, ge.graphs[first:], store)


def test_answers_of_graphs_are_those_of_one_rank(
    cold: Run, cpu_answers: Callable[..., list[list[int]]]
) -> None:
    assert cold.answers == cpu_answers(max_tokens=NUM_TOKENS)


@pytest.mark.parametrize("mode", ["aclgraph", "npugraph_ex", "eager"])
def test_answers_of_other_modes_are_those_of_one_rank(
    mode: str, cpu_answers: Callable[..., list[list[int]]]
) -> None:
    options = {"enforce_eager": True} if mode == "eager" else {"npu_graph_mode": mode}
    assert answers_of(tensor_parallel_size=2, **options) == cpu_answers(max_tokens=NUM_TOKENS)


def test_graphs_hold_one_sum_for_each_split_product(cold: Run) -> None:
    """And one for the embedding; logits are gathered once."""
    counts = [
        tuple(graph.count(kind) for kind in ("HcomAllReduce", "HcomAllGather", "TensorMove"))
        for graph in cold.graphs
    ]
    num_sums = 2 * NUM_LAYERS + 1
    decode, prefill, head, sample = (num_sums, 1, 0), (num_sums, 0, 0), (0, 1, 0), (0, 0, 0)
    assert sorted(counts) == sorted([decode, prefill, head, sample])


def test_sums_add_the_residual_in_the_norm(cold: Run) -> None:
    norms = {graph.count("AddRmsNorm") for graph in cold.graphs if graph.count("HcomAllReduce")}
    assert norms == {2 * NUM_LAYERS - 1, 2 * NUM_LAYERS}  # decode graphs end with the head's


def test_collectives_name_the_engines_group(cold: Run) -> None:
    groups = {
        op.attr["group"].s
        for graph in cold.graphs
        for op in graph.proto.op
        if op.type.startswith("Hcom")
    }
    (name,) = groups
    assert name.startswith(b"nanovllm-")
    # GE keeps what it compiles for each rank by itself
    folders = {Path(graph.options["ge.graph_compiler_cache_dir"]).name for graph in cold.graphs}
    assert folders == {f"{name.decode()}-0"}
    assert {path.name for path in (cold.store / "ge").glob("*/*")} == {
        f"{name.decode()}-{rank}" for rank in (0, 1)
    }


def test_dtypes_are_declared_except_bf16_in_collectives(cold: Run) -> None:
    """The wheel declares HCCL's ops without bf16, and torchair converts it all the same."""
    found = {
        (op.type, str(violation).partition(":")[0])
        for graph in cold.graphs
        for op, dtypes in graph.dtypes
        for violation in ir_rules.violations(op.type, dtypes)
    }
    assert found == {
        (kind, f"{kind}.x is {torch.bfloat16}") for kind in ("HcomAllReduce", "HcomAllGather")
    }


def test_stored_graphs_serve_all_ranks_of_another_group(cold: Run) -> None:
    """No rank lowers anything: it would raise CompileRequired."""
    found = answers_of(
        tensor_parallel_size=2, compile_cache=cold.store, compile_cache_mode="require"
    )
    assert found == cold.answers
    names = {path.name.rpartition("-")[0] for path in (cold.store / "ge").glob("*/*")}
    assert len(names) == 2  # the second engine's group has another name


@pytest.fixture(scope="module")
def of_mixtral() -> list[list[int]]:
    return answers_of("tiny-mixtral", enforce_eager=True)


@pytest.mark.parametrize("whole", [False, True])
def test_experts_are_shared(whole: bool, of_mixtral: list[list[int]]) -> None:
    found = answers_of("tiny-mixtral", tensor_parallel_size=2, expert_parallel=whole)
    assert found == of_mixtral


def test_replicas_answer_as_one_engine(cpu_answers: Callable[..., list[list[int]]]) -> None:
    expected = cpu_answers(max_tokens=NUM_TOKENS)
    llm = LLM("tiny-qwen3", device="npu", data_parallel_size=2, enforce_eager=True, **SIZES)
    try:
        chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
        outputs = llm.chat(chats, SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS))
    finally:
        llm.close()
    assert [output["token_ids"] for output in outputs] == expected


def test_more_ranks_than_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"is 4, but this machine has 2 npu device\(s\)"):
        answers_of(tensor_parallel_size=4)


def test_each_rank_and_replica_sees_its_devices() -> None:
    platform = NpuPlatform()
    assert platform.rank_environment(1, {}) == {VISIBLE: "1"}
    assert platform.rank_environment(1, {VISIBLE: "4, 6"}) == {VISIBLE: "6"}
    assert platform.part_environment(1, 2, 2, {}) == {VISIBLE: "2,3"}
