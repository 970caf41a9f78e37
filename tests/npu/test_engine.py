"""Device "npu" gives the CPU's tokens with GE graphs, captured graphs and eager ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch

from nanovllm import LLM, SamplingParams, platforms
from nanovllm.schedule.plan import LogitEdits
from nanovllm.schedule.request import Request
from tests.npu.conftest import QUESTIONS, SIZES, answers
from tests.npu.ge import Ge
from tests.npu.host import Host, host_view

# two engines can also take steps of several tokens, which one test gives them
DRAFTS: dict[str, Any] = {"draft_lengths": (2,), "run_ahead": 0}
# of one decode bucket; `npu_llm` has two
FEW: dict[str, Any] = {**SIZES, "graph_batch_sizes": (4,)}
MODES: dict[str, dict[str, Any]] = {
    "captured": {"npu_graph_mode": "aclgraph", **DRAFTS},
    "captured-unfused": {"npu_graph_mode": "aclgraph", "fuse": False},
    "npugraph_ex": {"npu_graph_mode": "npugraph_ex", **DRAFTS},
    "eager": {"enforce_eager": True},
    "eager-unpadded": {"enforce_eager": True, "pad_batches": False},
}


def test_greedy_tokens_are_the_cpus(npu_llm: LLM, cpu_answers: Callable[..., Any]) -> None:
    assert npu_llm.engine.runner.platform.traits.name == "npu"
    assert answers(npu_llm) == cpu_answers()


def test_drawn_tokens_are_the_cpus(npu_llm: LLM, cpu_answers: Callable[..., Any]) -> None:
    """The temperature is high enough to draw other tokens; both sides use exact integer noise."""
    params = {"temperature": 3.0, "seed": 3, "max_tokens": 12}
    drawn = cpu_answers(**params)
    assert answers(npu_llm, **params) == drawn != cpu_answers(max_tokens=12)


FILTERED = {
    "temperature": 1.2,
    "seed": 5,
    "top_k": 5,
    "top_p": 0.9,
    "repetition_penalty": 1.3,
    "max_tokens": 10,
}


def test_filters_and_penalties_run_between_graphs(
    npu_llm: LLM, cpu_answers: Callable[..., Any]
) -> None:
    assert answers(npu_llm, **FILTERED) == cpu_answers(**FILTERED)


@pytest.fixture(scope="module")
def edits(cpu_answers: Callable[..., Any]) -> LogitEdits:
    """Edits that change the answers and leave them wide margins."""
    plain = cpu_answers()
    changed = LogitEdits({7: 1.5}, None, [plain[1][:3], plain[1][4:6], [plain[3][2]]])
    found = cpu_answers(changed)
    assert [one == other for one, other in zip(found, plain)] == [True, False] * 2 + [True]
    return changed


def test_edits_run_between_graphs(
    npu_llm: LLM, edits: LogitEdits, cpu_answers: Callable[..., Any]
) -> None:
    assert answers(npu_llm, edits) == cpu_answers(edits)
    assert answers(npu_llm, edits, **FILTERED) == cpu_answers(edits, **FILTERED)


class Started(NamedTuple):
    llm: LLM
    seen: set[str]  # ops of the start
    num_graphs: int  # that the start gave to GE


@pytest.fixture(scope="module")
def started(ge: Ge, host: Host) -> Iterator[Callable[[str], Started]]:
    """Starts an engine in a mode, or gives the one that another test has started."""
    engines: list[LLM] = []

    @cache
    def start(mode: str) -> Started:
        num_graphs = len(ge.graphs)
        host.seen.clear()
        engines.append(LLM("tiny-qwen3", device="npu", **FEW, **MODES[mode]))
        return Started(engines[-1], set(host.seen), len(ge.graphs) - num_graphs)

    yield start
    for llm in engines:
        llm.close()


@pytest.mark.shows("NPU", architectures=["Qwen3ForCausalLM"])
@pytest.mark.parametrize("mode", MODES)
def test_other_modes_give_the_same_tokens(
    mode: str,
    edits: LogitEdits,
    cpu_answers: Callable[..., Any],
    started: Callable[[str], Started],
    ge: Ge,
    host: Host,
) -> None:
    llm, seen, num_graphs = started(mode)
    num_graphs_before = len(ge.graphs)
    host.seen.clear()
    assert answers(llm) == cpu_answers()
    params = {"temperature": 3.0, "seed": 3, "max_tokens": 12}
    assert answers(llm, **params) == cpu_answers(**params)
    assert answers(llm, **FILTERED) == cpu_answers(**FILTERED)
    for _ in range(2):  # recorded, and replayed
        assert answers(llm, edits, max_tokens=14) == cpu_answers(edits, max_tokens=14)
    assert num_graphs == 0 and len(ge.graphs) == num_graphs_before, (
        "no graph goes to GE in this mode"
    )
    always = {"npu::npu_scatter_nd_update_", "npu::npu_fused_infer_attention_score"}
    fused = {"npu::npu_rms_norm", "npu::npu_rotary_mul", "npu::npu_swiglu"}
    assert (seen | host.seen) & (always | fused) == (
        always if mode == "captured-unfused" else always | fused
    )


@pytest.mark.parametrize("mode", ["ge", "captured", "npugraph_ex", "eager"])
def test_steps_of_several_tokens_give_the_tokens_of_single_steps(
    mode: str,
    cpu_answers: Callable[..., Any],
    started: Callable[[str], Started],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Proposals are two right tokens, or one and a wrong one; filters choose outside the graph."""
    params = {"temperature": 1.2, "seed": 5, "top_k": 5, "max_tokens": 10}
    greedy, filtered = cpu_answers(), cpu_answers(**params)
    is_shared = MODES.get(mode, {}).items() >= DRAFTS.items()
    if is_shared:
        llm = started(mode).llm
    else:
        llm = LLM("tiny-qwen3", device="npu", **FEW, **MODES.get(mode, {}), **DRAFTS)
    fed: list[int] = []

    def proposer(known: list[list[int]]) -> Callable[[Request], list[int]]:
        first = llm.engine._num_added

        def propose(request: Request) -> list[int]:
            answer, start = known[request.request_id - first], len(request.output_ids)
            fed.append(start)
            wrong = start % 3 == 0
            return [token + wrong * (i == 1) for i, token in enumerate(answer[start : start + 2])]

        return propose

    monkeypatch.setattr(llm.engine, "propose", proposer(greedy))
    assert answers(llm) == greedy
    assert len(fed) < sum(map(len, greedy)) * 0.7, "a step brings more than one token"
    monkeypatch.setattr(llm.engine, "propose", proposer(filtered))
    assert answers(llm, **params) == filtered
    if not is_shared:
        llm.close()


@pytest.mark.parametrize("mode", ["captured", "npugraph_ex"])
def test_a_captured_step_takes_its_lengths_from_the_host(
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
    cpu_answers: Callable[..., Any],
    started: Callable[[str], Started],
) -> None:
    """Without lengths every row sees one token, and the answers differ: replays use the lengths."""
    llm = started(mode).llm
    announced: list[list[int]] = []
    original = llm.engine.runner.platform.announce

    def announce(seq_lens: list[int]) -> None:
        announced.append(seq_lens)
        original(seq_lens)

    monkeypatch.setattr(llm.engine.runner.platform, "announce", announce)
    assert answers(llm) == cpu_answers()
    assert {len(seq_lens) for seq_lens in announced} == {4}
    assert len({tuple(lens) for lens in announced}) > 20
    monkeypatch.setattr(
        llm.engine.runner.platform, "announce", lambda seq_lens: original([1] * len(seq_lens))
    )
    assert answers(llm) != cpu_answers()


def test_fifty_steps_of_changing_lengths_compile_nothing(npu_llm: LLM, ge: Ge) -> None:
    num_graphs, num_lowered = len(ge.graphs), ge.num_lowered
    before = {id(graph): graph.num_runs for graph in ge.graphs}
    prompts = [list(range(5, 5 + length)) for length in (1, 19, 33, 2)]
    params = [
        SamplingParams(temperature=0.0, max_tokens=num, ignore_eos=True) for num in (60, 52, 7, 31)
    ]
    outputs = npu_llm.generate(prompts, params, use_tqdm=False)
    assert [len(output["token_ids"]) for output in outputs] == [60, 52, 7, 31]
    assert (len(ge.graphs), ge.num_lowered) == (num_graphs, num_lowered)
    runs = [graph.num_runs - before[id(graph)] for graph in ge.graphs]
    assert sum(runs) > 50 and sum(num > 10 for num in runs) >= 2, runs


def test_nan_in_the_padding_block_reaches_no_row(
    npu_llm: LLM, cpu_answers: Callable[..., Any]
) -> None:
    for layer_cache in npu_llm.engine.runner.steps.caches:
        for tensor in (layer_cache.k_CBKH, layer_cache.v_CBKH):
            host_view(tensor)[0].fill_(float("nan"))
    assert answers(npu_llm) == cpu_answers()


def test_requests_with_nan_fail_alone(npu_llm: LLM, cpu_answers: Callable[..., Any]) -> None:
    expected = cpu_answers()
    prompts = npu_llm.chat_prompts([[{"role": "user", "content": one}] for one in QUESTIONS])
    used = {token_id for ids in (*prompts, *expected) for token_id in ids}
    bad_id = next(i for i in range(npu_llm.engine.model_config.vocab_size) if i not in used)
    bad_D = host_view(npu_llm.engine.runner.params.embed_VD)[bad_id]
    kept_D = bad_D.clone()
    bad_D.fill_(torch.nan)
    mixed = [[bad_id], *prompts, [*prompts[0], bad_id, 9]]
    params = SamplingParams(temperature=0.0, max_tokens=40)
    try:
        first, *others, last = npu_llm.generate(mixed, params, use_tqdm=False)
    finally:
        bad_D.copy_(kept_D)
    assert first["finish_reason"] == last["finish_reason"] == "error"
    assert [output["token_ids"] for output in others] == expected
    assert answers(npu_llm) == expected


def test_auto_takes_the_npu_that_is_there() -> None:
    assert platforms.select("auto").device == torch.device("npu", 0)


def test_two_engines_in_one_process(npu_llm: LLM, cpu_answers: Callable[..., Any]) -> None:
    other = LLM("tiny-qwen3", device="npu", **{**FEW, "num_kvcache_blocks": 20})
    assert answers(other) == answers(npu_llm) == cpu_answers()
    other.close()


def test_the_cache_is_sized_from_the_devices_memory() -> None:
    options = {**SIZES, "num_kvcache_blocks": None, "enforce_eager": True}
    llm = LLM("tiny-qwen3", device="npu", **options, gpu_memory_utilization=0.9)
    # 4 rows of 256 tokens in blocks of 128, and one block for padding; more would never be used
    assert llm.engine.scheduler.cache.pool.num_blocks == 4 * 2 + 1
    budgets = [llm.engine.runner.measure_budget(share).cache_bytes for share in (0.9, 0.5)]
    assert budgets[0] > budgets[1] > 2**30
    llm.close()


def test_random_weights_in_fp16(shallow: str) -> None:
    llm = LLM(shallow, device="npu", random_weights=True, dtype="float16", **FEW)
    (output,) = llm.generate(
        [[5, 6, 7]], SamplingParams(temperature=0.0, max_tokens=4), use_tqdm=False
    )
    assert llm.engine.model_config.dtype == torch.float16 and len(output["token_ids"]) == 4
    llm.close()
