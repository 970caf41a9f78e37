"""Requests with adapters get the answers of the merged model, in any company."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, LoRARequest
from nanovllm.batch.rows import Line
from nanovllm.batch.worker import EngineWorker, WorkerSettings
from nanovllm.checks import InvalidValue
from nanovllm.compile import keys
from nanovllm.compile.program import Compiler
from nanovllm.compile.trace import input_leaves
from nanovllm.engine.request import EngineRequest
from nanovllm.models.model import AdapterRows
from nanovllm.runner.graph_cache import GraphCache
from nanovllm.schedule.plan import StepPlan
from tests.engine.adapter_cases import (
    LORA,
    MODES,
    NAMES,
    NUMBERS,
    PROMPTS,
    SIZES,
    Asked,
    adapters,
    alone,
    asked,
    eager,
    make,
)
from tests.engines import assert_all_free, drain, greedy
from tests.models import lora_cases
from tests.models.harness import transformers_model

__all__ = ["adapters", "alone", "asked", "eager"]  # fixtures
GPU_MODES: dict[str, dict[str, Any]] = {
    f"cuda-{name}": {**mode, "device": "cuda"} for name, mode in MODES.items()
}
BATCH = [
    f"batch_{one}" for one in ("rope_pos_T", "slot_T", "block_table_RP", "seq_len_R", "q_start_S")
]


def scale(name: str, module: str, rank: int) -> float:
    """PEFT's factor of an adapter's product, by its configs above."""
    if name == "french":
        return lora_cases.ALPHA / rank**0.5
    alpha = 3 if name == "german" and module.endswith("v_proj") else lora_cases.ALPHA
    return alpha / rank


@pytest.fixture(scope="module")
def merged(
    checkpoint: Path, adapters: dict[str, LoRARequest], tmp_path_factory: pytest.TempPathFactory
) -> dict[str | None, Any]:
    """transformers' models with the adapters merged."""
    root = tmp_path_factory.mktemp("merged")
    found = {None: transformers_model(checkpoint, "cpu")}
    for name, one in adapters.items():
        folder = lora_cases.save_merged(
            root / name, checkpoint, Path(one.path), lambda *at, name=name: scale(name, *at)
        )
        found[name] = transformers_model(folder, "cpu")
    return found


@torch.no_grad()
@pytest.mark.parametrize(
    "mode", ["eager", "graph", *(pytest.param(one, marks=pytest.mark.gpu) for one in GPU_MODES)]
)
def test_answers_and_their_logprobs_are_those_of_merged_models(
    mode: str, checkpoint: Path, asked: Asked, merged: dict[str | None, Any]
) -> None:
    """Also with more adapters than slots and than places in host memory, in one batch."""
    llm = make(checkpoint, **{**MODES, **GPU_MODES}[mode])
    num_programs = llm.engine.runner.compiler.num_compiled
    for names in (NAMES, ("dutch", "danish", "french", "german", None, "danish")):
        for prompt, name, found in zip(PROMPTS, names, asked(llm, PROMPTS, names)):
            given = torch.tensor([prompt + found.token_ids])
            logits_TV = merged[name](given).logits[0, len(prompt) - 1 : -1]
            assert found.token_ids == logits_TV.argmax(-1).tolist()
            expected_TV = logits_TV.log_softmax(-1)
            for expected_V, top in zip(expected_TV, found.logprobs or ()):
                for token_id, one in top.items():
                    assert abs(one.logprob - expected_V[token_id]) < 1e-4
    assert llm.engine.runner.compiler.num_compiled == num_programs
    llm.close()


def test_a_batch_of_several_adapters_gives_each_its_own_answer(
    eager: LLM, asked: Asked, alone: list[list[int]]
) -> None:
    eager.engine.forget_prefixes()
    assert asked.tokens(eager, PROMPTS, NAMES) == alone
    plain = asked.tokens(eager, PROMPTS, [None] * 6)
    differs = [one != other for one, other in zip(plain, alone)]
    assert differs == [name is not None for name in NAMES], "an adapter changes its answers alone"


def test_outputs_have_the_adapters_of_their_requests(
    eager: LLM, asked: Asked, alone: list[list[int]]
) -> None:
    given = [asked.of(name) for name in NAMES]
    outputs = eager.generate(PROMPTS, greedy(12), use_tqdm=False, lora_request=given)
    assert [one.lora_request for one in outputs] == given
    assert [one.outputs[0].lora_request for one in outputs] == given
    assert [one.token_ids for one in outputs] == alone


def test_rows_of_a_batch_job_name_their_adapters(
    eager: LLM, asked: Asked, alone: list[list[int]]
) -> None:
    folders = {name: one.path for name, one in asked.adapters.items()}
    params = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    worker = EngineWorker(eager.shared, WorkerSettings(params, adapters=folders))
    worker.check_adapters()
    for row, (prompt, name) in enumerate(zip([*PROMPTS, [5]], [*NAMES, "norse"])):
        text = json.dumps({"prompt": prompt, "model": name}).encode()
        worker.submit(Line(row, text, len(text)))
    (failed,) = worker.wait()
    assert failed.is_error and b"'norse', which is not an adapter: french" in failed.line
    found = []
    while len(found) < len(PROMPTS):
        found += [json.loads(one.line) for one in worker.wait()]
    assert [one["token_ids"] for one in sorted(found, key=lambda one: one["row"])] == alone


def test_equal_prompts_share_blocks_with_one_adapter_only(eager: LLM, asked: Asked) -> None:
    eager.engine.forget_prefixes()
    names = (None, "french", "german", "german", None)
    found = [asked(eager, [PROMPTS[2]], [name])[0] for name in names]
    assert [one.num_cached_tokens for one in found] == [0, 0, 0, 32, 32]
    assert found[3].token_ids == found[2].token_ids != found[1].token_ids
    assert found[4].token_ids == found[0].token_ids


def test_preempted_requests_keep_their_adapters(
    checkpoint: Path, asked: Asked, alone: list[list[int]]
) -> None:
    llm = make(checkpoint, num_kvcache_blocks=1 + 11)
    assert asked.tokens(llm, PROMPTS, NAMES) == alone
    longer = asked.tokens(llm, PROMPTS, NAMES, 40)
    assert llm.engine.scheduler.num_preemptions > 0
    assert [one[:12] for one in longer] == alone
    llm.close()


def test_verified_tokens_are_those_of_the_adapter(
    eager: LLM, asked: Asked, alone: list[list[int]]
) -> None:
    of = {tuple(prompt): answer for prompt, answer in zip(PROMPTS, alone)}

    def propose(request: Any) -> list[int]:
        start = len(request.output_ids)
        return of[tuple(request.prompt_ids)][start : start + 2]

    eager.engine.propose = propose
    params = greedy(12)
    try:
        num_steps = eager.engine.metrics.num_steps
        ids = [
            eager.engine.add_request(prompt, params, lora_request=asked.of(name))
            for prompt, name in zip(PROMPTS, NAMES)
        ]
        done = drain(eager)
        assert [done[one].token_ids for one in ids] == alone
        assert eager.engine.metrics.num_steps - num_steps < 10
    finally:
        eager.engine.propose = None


def test_the_slot_and_the_memory_unused_for_longest_are_replaced(
    checkpoint: Path, asked: Asked
) -> None:
    """Two slots; three adapters in host memory."""
    llm = make(checkpoint)
    slots, adapters = llm.engine.scheduler.adapters, llm.engine.adapters
    assert slots is not None
    loaded, known = [], []
    for name in ("french", "german", "french", "dutch", "german", "danish", "french"):
        asked(llm, [PROMPTS[1]], [name], 2)
        loaded.append({one for one, number in NUMBERS.items() if number in slots.loaded})
        known.append({one.lora_name for one in adapters.requests})
    assert loaded == [
        {"french"}, {"french", "german"}, {"french", "german"}, {"french", "dutch"},
        {"dutch", "german"}, {"german", "danish"}, {"danish", "french"},
    ]  # fmt: skip
    assert known[4] == {"french", "german", "dutch"}
    assert known[5] == {"german", "dutch", "danish"}
    assert known[6] == {"german", "danish", "french"}
    llm.close()


def test_requests_wait_for_a_slot_and_others_pass_them(checkpoint: Path, asked: Asked) -> None:
    llm = make(checkpoint, max_loras=1, max_cpu_loras=1)
    engine, params = llm.engine, greedy(4)
    names = ("french", "german", None, "french")
    ids = [engine.add_request(PROMPTS[1], params, lora_request=asked.of(one)) for one in names]
    order = []
    while engine.has_unfinished:
        order += [ids.index(one.request_id) for one in engine.step() if one.completion]
        running = [request.adapter_id for request in engine.scheduler.running]
        assert len(set(running) - {0}) <= 1
    assert order[-1] == 1 and set(order[:3]) == {0, 2, 3}
    assert_all_free(llm)
    llm.close()


def test_an_adapter_of_an_aborted_request_is_free_again(checkpoint: Path, asked: Asked) -> None:
    llm = make(checkpoint, max_loras=1, max_cpu_loras=1)
    engine = llm.engine
    first = engine.add_request(PROMPTS[0], greedy(50), lora_request=asked.of("french"))
    while not engine.scheduler.running:
        engine.step()
    with pytest.raises(InvalidValue, match="adapter 'french' is in use: unfinished requests"):
        engine.adapters.remove(NUMBERS["french"])
    engine.abort(first)
    assert asked.tokens(llm, PROMPTS[:2], ["german", None])
    assert engine.adapters.remove(NUMBERS["german"]) and not engine.adapters.remove(99)
    assert not engine.adapters.requests
    llm.close()


@pytest.mark.parametrize("level", [1, 2])
def test_adapters_are_there_after_sleep(level: int, eager: LLM, asked: Asked) -> None:
    before = asked.tokens(eager, PROMPTS[:2], ["french", "german"])
    eager.sleep(level)
    eager.wake_up()
    assert asked.tokens(eager, PROMPTS[:2], ["french", "german"]) == before


def test_reading_an_adapter_starts_no_other_threads(eager: LLM) -> None:
    own = torch.get_num_threads()
    store = eager.engine.runner.adapters
    assert store._reader.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == own


def test_the_plans_bytes_are_all_that_another_rank_needs(
    checkpoint: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second runner that gets plans as the other ranks do chooses the same tokens."""
    llm, other = make(checkpoint), make(checkpoint)
    ours, theirs = llm.engine.runner, other.engine.runner
    launch, results = ours.launch, []
    for name in ("french", "german"):
        theirs.check_adapter(NUMBERS[name], Path(asked.adapters[name].path))
        theirs.read_adapter(NUMBERS[name])

    def told(plan: StepPlan) -> Any:
        read = StepPlan.from_bytes(plan.to_bytes())
        assert [row.adapter for row in read.settings] == [row.adapter for row in plan.settings]
        launched = launch(plan)
        results.append((launched.wait().tokens, theirs.launch(read).wait().tokens))
        return launched

    monkeypatch.setattr(ours, "launch", told)
    asked(llm, PROMPTS, NAMES)
    assert results and all(one == other for one, other in results)
    llm.close()
    other.close()


@pytest.mark.parametrize("option", ["tensor_parallel_size", "data_parallel_size"])
def test_ranks_and_replicas_read_the_adapters_of_requests(
    option: str, checkpoint: Path, asked: Asked, eager: LLM
) -> None:
    """Each is a process. There are more adapters than places in host memory."""
    names = ("dutch", "danish", "french", "german", None, "danish")
    eager.engine.forget_prefixes()
    expected = asked.tokens(eager, PROMPTS, names)
    llm = make(checkpoint, **{option: 2})
    requests = [asked.of(name) for name in names]
    found = llm.generate(PROMPTS, greedy(12), use_tqdm=False, lora_request=requests)
    assert [one["token_ids"] for one in found] == expected
    llm.close()


def test_programs_without_adapters_have_the_inputs_and_keys_of_a_model_without_any(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: dict[bool, dict[str, tuple[list[str], dict[str, str]]]] = {False: {}, True: {}}
    make_program = Compiler._make
    for is_enabled, found in known.items():

        def noting(
            self: Compiler, name: str, function: Any, inputs: Any, found: Any = found
        ) -> Any:
            key = keys.program_key(function, inputs, varying=(), common={})
            found[name] = [leaf for leaf, _ in input_leaves(inputs)], dict(key.ingredients)
            return make_program(self, name, function, inputs)

        monkeypatch.setattr(Compiler, "_make", noting)
        lora = LORA if is_enabled else {}
        LLM(str(checkpoint), **SIZES, **MODES["eager"], **lora).close()
    plain, both = known[False], known[True]
    assert {name: both[name] for name in plain} == plain, "steps without adapters are those"
    added = {name for name in both if name not in plain}
    assert added == {f"{name}_lora" for name in plain if "layer" in name or "begin" in name}
    for name in added:
        names, more = plain[name.removesuffix("_lora")][0], both[name][0]
        if name.startswith("begin"):
            assert "state_adapter_S" in more and "state_adapter_S" not in names
        else:
            of_batch = [one for one in names if one.startswith("batch_")]
            assert of_batch[:5] == BATCH and names[-1] == "h_TD"
            fields = ["adapters", "kept_adapters"][: 2 if name.startswith("last_") else 1]
            rows = [f"batch_{field}_{one}" for field in fields for one in AdapterRows._fields]
            assert [one for one in more if one.startswith("batch_")] == [*of_batch, *rows]
            assert "w_qkv_ED" in names and "w_qkv_ED_a_NLD" in more


def test_steps_in_which_no_row_has_an_adapter_are_those_without_slots(
    checkpoint: Path, asked: Asked, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make(checkpoint)
    runner, used = llm.engine.runner, list[bool]()
    find = runner._buckets_of

    def noting(plan: StepPlan) -> GraphCache:
        found = find(plan)
        used.append(found is runner.buckets)
        return found

    monkeypatch.setattr(runner, "_buckets_of", noting)
    assert asked.tokens(llm, PROMPTS[1:2], NAMES[1:2], 12) == alone[1:2]
    assert all(used)
    used.clear()
    assert asked.tokens(llm, PROMPTS[:1], [None]) == alone[:1]
    assert used and not any(used), "although the row of the state had an adapter before"
    used.clear()
    asked(llm, PROMPTS[:2], ["french", None], 3)
    assert all(used)
    llm.close()


def test_other_files_under_one_name_have_other_blocks(
    checkpoint: Path, tmp_path: Path, asked: Asked
) -> None:
    llm, roots, answers = make(checkpoint), [], []
    for seed in (11, 12):
        folder = lora_cases.save_adapter(tmp_path / "one", checkpoint, seed=seed)
        request = LoRARequest("one", 1, str(folder))
        llm.engine.add(EngineRequest(PROMPTS[2], greedy(3), incremental=False, adapter=request))
        roots += [one.cache_root for one, _ in llm.engine._answers.requests.values()]
        answers += [one.token_ids for one in drain(llm).values()]
        llm.engine.adapters.remove(1)
    assert roots[0] != roots[1] and answers[0] != answers[1]
    llm.close()
