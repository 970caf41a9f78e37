"""Architectures with experts give transformers' logits, and their tokens go to the same experts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.compile.trace import tensors
from nanovllm.runner.runner import Runner
from nanovllm.schedule.request import Request
from tests.architectures import of_types
from tests.models.harness import (
    BF16,
    Known,
    assert_bf16,
    check_bf16,
    engine_logits,
    load,
    max_difference,
    sequences,
    transformers_logits,
)
from tests.models.moe_cases import (
    ARCHITECTURES,
    CASES,
    FEW_ROWS,
    GRAPH_CASES,
    GRAPH_SIZES,
    LENGTHS,
    NORMALIZED,
    NUM_ROWS,
    TOLERANCE,
    VOCAB_SIZE,
    Case,
    assert_same,
    towards,
)
from tests.models.routes import edit, engine_routes, transformers_routes


def test_cases_cover_every_pair_that_matters() -> None:
    for architecture in ARCHITECTURES:
        own = [case for case in CASES if case.architecture == architecture]
        assert {case.top_k for case in own} == {1, 2, 8}
        assert {case.stacked for case in own} == {False, True}
        assert any("sliding_window" in case.changes for case in own)
        if architecture != "mixtral":
            assert {case.changes.get("norm_topk_prob", False) for case in own} == {False, True}
            for name in ("decoder_sparse_step", "mlp_only_layers"):
                assert {name in case.changes for case in own} == {False, True}


@pytest.mark.shows("eager", architectures=of_types(*ARCHITECTURES))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_eager_logits_and_routes_are_those_of_transformers(
    case: Case, device: str, tmp_path: Path
) -> None:
    folder, known = case.save(tmp_path), sequences(VOCAB_SIZE, *LENGTHS)
    runner = load(folder, device, enforce_eager=True)
    expected = transformers_routes(folder, known, device)
    assert_same(engine_routes(runner, known), expected)
    num_sparse = sum(kind.sparse for kind in runner.model.layer_kinds)
    assert len(expected[1]) == num_sparse * sum(total for _, total in LENGTHS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_changes_no_logits_and_no_routes(
    architecture: str, device: str, tmp_path: Path
) -> None:
    """Batches without padding, with other splits of prompts and another block size."""
    case = next(case for case in CASES if case.architecture == architecture)
    folder, known = case.save(tmp_path), sequences(VOCAB_SIZE, *LENGTHS)
    sizes = {"max_num_batched_tokens": 48, "kvcache_block_size": 32, "pad_batches": False}
    runner = load(folder, device, enforce_eager=True, **sizes)
    assert_same(engine_routes(runner, known), transformers_routes(folder, known, device))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def graphs(
    request: pytest.FixtureRequest, device: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Runner]:
    """The checkpoint and the runner of a case."""
    folder = GRAPH_CASES[request.param].save(tmp_path_factory.mktemp("graphs"))
    runner = load(folder, device, **GRAPH_SIZES)
    if runner.compiler.lowering is None:
        pytest.skip("no lowering for graph mode on this machine")
    assert runner.compiler.num_compiled + runner.compiler.num_loaded >= 6
    return folder, runner


@pytest.mark.shows("graph", "GPU", architectures=of_types(*ARCHITECTURES))
def test_graph_logits_are_those_of_transformers(graphs: tuple[Path, Runner], device: str) -> None:
    folder, runner = graphs
    known = sequences(VOCAB_SIZE, *LENGTHS)
    expected = transformers_logits(folder, known, device)
    assert max_difference(engine_logits(runner, known), expected) <= TOLERANCE


def rows(num: int = NUM_ROWS) -> list[Known]:
    return sequences(VOCAB_SIZE, *((1 + idx % 3, 5) for idx in range(num)))


def test_graphs_of_1_to_64_rows_give_the_same_logits(
    graphs: tuple[Path, Runner], device: str
) -> None:
    folder, runner = graphs
    known = rows()
    expected = transformers_logits(folder, known, device)
    for num in (1, 2, 17, NUM_ROWS):
        found = engine_logits(runner, known[:num])
        assert max_difference(found, expected[:num]) <= TOLERANCE


def test_graphs_of_tokens_that_all_choose_one_expert(
    graphs: tuple[Path, Runner], device: str, tmp_path: Path
) -> None:
    """The weights of the running engine become those of the other checkpoint."""
    folder, runner = graphs
    other = edit(shutil.copytree(folder, tmp_path / "towards"), towards(4, 1))
    known = sequences(VOCAB_SIZE, (1, 5), (70, 73))
    replaced = tensors(load(other, device, enforce_eager=True).params)
    kept = [weight.clone() for weight in tensors(runner.params)]
    for weight, values in zip(tensors(runner.params), replaced, strict=True):
        weight.copy_(values)
    found = engine_logits(runner, known)
    for weight, values in zip(tensors(runner.params), kept, strict=True):
        weight.copy_(values)
    assert max_difference(found, transformers_logits(other, known, device)) <= TOLERANCE


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_eager_batches_of_1_to_64_rows_give_the_same_logits_and_routes(
    architecture: str, device: str, tmp_path: Path
) -> None:
    folder, known = GRAPH_CASES[architecture].save(tmp_path), rows()
    expected, routes = transformers_routes(folder, known, device)
    runner = load(folder, device, enforce_eager=True, **GRAPH_SIZES)
    for num in (1, 2, 8, 17, NUM_ROWS):
        found = engine_routes(runner, known[:num])
        of_these = {place: route for place, route in routes.items() if place[1] < num}
        assert_same(found, (expected[:num], of_these))


# Other forms of numbers and starts ----------------------------------------------------------------


@pytest.mark.parametrize("case", GRAPH_CASES.values(), ids=str)
def test_bf16_agrees_up_to_rounding(case: Case, device: str, tmp_path: Path) -> None:
    """Rounding may change a token's experts where two have almost the same score."""
    folder = replace(case, changes={**case.changes, **BF16}).save(tmp_path)
    known = sequences(VOCAB_SIZE, *LENGTHS)
    runner = load(folder, device, dtype="bfloat16", enforce_eager=True)
    ours, our_routes = engine_routes(runner, known)
    theirs, their_routes = transformers_routes(folder, known, device, torch.bfloat16)
    exact = transformers_logits(folder, known, device)
    other = {(row, pos) for (layer, row, pos), route in our_routes.items()
             if set(route) != set(their_routes[layer, row, pos])}  # fmt: skip
    places = [(row, pos) for row, (ids, _) in enumerate(known) for pos in range(len(ids))]
    assert len(other) <= 0.05 * len(places)
    is_same_T = torch.tensor([place not in other for place in places])
    logits = [torch.cat(one) for one in (ours, theirs, exact)]
    assert_bf16(*(one[is_same_T] for one in logits))
    errors = [(one - logits[2]).abs().mean() for one in logits]
    assert errors[0] <= 1.2 * errors[1]


def test_bf16_graphs_agree_up_to_rounding(device: str, tmp_path: Path) -> None:
    case = Case("mixtral", 8, 2, {"num_hidden_layers": 2, **BF16})
    known = sequences(VOCAB_SIZE, (1, 6), (70, 73))
    check_bf16(case.save(tmp_path), device, known, **FEW_ROWS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_fp8_cache_changes_logits_by_its_rounding(
    architecture: str, device: str, tmp_path: Path
) -> None:
    folder = Case(architecture, 6, 2, {"num_hidden_layers": 2}).save(tmp_path)
    known = sequences(VOCAB_SIZE, (1, 6), (70, 73))
    options = {"kv_cache_dtype": "fp8", **FEW_ROWS}
    eager = engine_logits(load(folder, device, enforce_eager=True, **options), known)
    expected = transformers_logits(folder, known, device)
    error = (torch.cat(eager) - torch.cat(expected)).abs().mean()
    assert 0.001 < error / torch.cat(expected).std() < 0.15
    if architecture == "mixtral":
        # a key that differs in its last bit may round to another number of fp8, but few do
        graph = engine_logits(load(folder, device, **options), known)
        assert (torch.cat(graph) - torch.cat(eager)).abs().mean() <= 0.01 * error


def test_a_second_start_loads_the_programs_of_its_own_config(device: str, tmp_path: Path) -> None:
    """Programs that differ in how tokens are routed have keys of their own."""
    case = Case("qwen3_moe", 6, 2, {"mlp_only_layers": [0]})
    folder, known = case.save(tmp_path / "model"), sequences(VOCAB_SIZE, (1, 5), (33, 35))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    options = {"compile_cache": str(tmp_path / "store"), **FEW_ROWS}
    num_compiled = []
    for changes in ({}, {}, NORMALIZED, {"num_experts_per_tok": 3}, NORMALIZED, {}):
        path.write_text(json.dumps({**config, **changes}))
        runner = load(folder, device, **options)
        num_compiled.append(runner.compiler.num_compiled)
        expected = transformers_logits(folder, known, device)
        assert max_difference(engine_logits(runner, known), expected) <= TOLERANCE
    assert [num > 0 for num in num_compiled] == [True, False, True, True, False, False]


# Whole engines -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose last layer alone is sparse: prompt_logprobs needs a program for it."""
    case = Case("qwen3_moe", 6, 2, {"num_hidden_layers": 2, "decoder_sparse_step": 2})
    return case.save(tmp_path_factory.mktemp("last_sparse"))


@pytest.fixture(scope="module")
def llm(folder: Path, device: str) -> Iterator[LLM]:
    options = {"max_num_batched_tokens": 64, "max_model_len": 128, "kvcache_block_size": 16}
    rows = {"max_num_seqs": 2, "graph_batch_sizes": (2,), "draft_lengths": (3,), "run_ahead": 0}
    sizes = {"num_kvcache_blocks": 20, "dtype": "float32"}
    llm = LLM(str(folder), device=device, **options, **rows, **sizes)
    yield llm
    llm.close()


def test_prompt_logprobs_are_those_of_transformers(llm: LLM, folder: Path, device: str) -> None:
    known = sequences(VOCAB_SIZE, (70, 70), (5, 5))
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([one.token_ids for one in known], params, use_tqdm=False)
    for output, logits, (ids, _) in zip(outputs, transformers_logits(folder, known, device), known):
        logprobs = logits.log_softmax(-1)
        for pos in range(1, len(ids)):
            found = float(output.prompt_logprobs[pos][ids[pos]])
            assert abs(found - logprobs[pos - 1, ids[pos]]) <= TOLERANCE
        assert output["token_ids"] == [int(logprobs[-1].argmax())]


def test_verified_tokens_are_those_of_transformers(llm: LLM, folder: Path, device: str) -> None:
    """Steps of up to four tokens a row keep the right proposals and no others."""
    prompts = [one.token_ids for one in sequences(VOCAB_SIZE, (19, 19), (3, 3))]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    single = [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]

    def propose(request: Request) -> list[int]:
        start = len(request.output_ids)
        answer = single[prompts.index(request.prompt_ids)]
        return [*answer[start : start + start % 3], 1, 2]

    llm.engine.propose = propose
    num_before = llm.engine.metrics.num_steps
    outputs = llm.generate(prompts, params, use_tqdm=False)
    llm.engine.propose = None
    assert [output["token_ids"] for output in outputs] == single
    assert llm.engine.metrics.num_steps - num_before < 12
    known = [Known(prompt + answer, 1) for prompt, answer in zip(prompts, single)]
    for logits, prompt, answer in zip(transformers_logits(folder, known, device), prompts, single):
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
