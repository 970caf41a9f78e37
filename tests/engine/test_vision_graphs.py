"""Steps with images are programs of their own; steps without any cost what they cost without."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm import LLM, EngineConfig, SamplingParams
from nanovllm.platforms.cpu import CpuPlatform
from nanovllm.runner.device_graphs import PrefillStep
from nanovllm.schedule.plan import StepPlan
from nanovllm.startup import precompile
from tests.conftest import save_tiny
from tests.engines import drain
from tests.models.test_vision_text import MODELS, Given, answers, engine
from tests.models.tower_cases import BUDGETS

PARTS = [0, (8, 4), 0, (2, 2), 0]
PLAIN = {"begin": 1, "layer": 4, "last_layer": 1, "head": 1}  # the programs of a step


@pytest.fixture(scope="module", params=MODELS)
def seeing(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, LLM]]:
    """transformers' model, and an engine with programs."""
    torch.manual_seed(0)
    hf = MODELS[request.param]().eval()
    folder = tmp_path_factory.mktemp(request.param)
    hf.save_pretrained(folder)
    llm = engine(folder, max_num_batched_tokens=64)
    yield hf, llm
    llm.close()


def run_programs(llm: LLM, monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> Any:
    """The names of the programs that `work` runs, with their numbers of runs."""
    seen: Counter[str] = Counter()
    compiler = llm.engine.runner.compiler
    original = compiler.program

    def program(name: str, *rest: Any) -> Any:
        seen[name] += 1
        return original(name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(compiler, "program", program)
        work()
    return seen


def test_a_prompt_without_images_runs_the_programs_of_a_text_model(
    seeing: tuple[Any, LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it brings the positions that it has anyway. The sampler runs op by op, for the
    log-probabilities."""
    hf, llm = seeing
    one = Given(hf, [0], 1)
    plain = run_programs(llm, monkeypatch, lambda: answers(llm, [one], 1))
    assert plain == PLAIN
    llm.reset_prefix_cache()
    one.positions = np.tile(np.arange(len(one.ids)), (3, 1))
    assert run_programs(llm, monkeypatch, lambda: answers(llm, [one], 1)) == plain


def test_a_prompt_with_images_runs_few_programs_more(
    seeing: tuple[Any, LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    hf, llm = seeing
    one = Given(hf, PARTS, 2)
    found = run_programs(llm, monkeypatch, lambda: answers(llm, [one], 1))
    num_deepstack = llm.engine.runner.cfg.num_deepstack
    assert num_deepstack == (3 if "Qwen3" in type(hf).__name__ else 0)
    added = {"add_features": num_deepstack} if num_deepstack else {}
    assert found == PLAIN | {"with_given": 1} | added


def test_chunks_behind_the_images_need_no_positions(
    seeing: tuple[Any, LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    hf, llm = seeing
    one = Given(hf, [(4, 4), *[0] * 14], 3)
    plans: list[StepPlan] = []
    launch = llm.engine.runner.launch
    monkeypatch.setattr(
        llm.engine.runner, "launch", lambda plan: plans.append(plan) or launch(plan)
    )
    answers(llm, [one], 1)
    assert [plan.has_given for plan in plans if plan.is_prefill] == [True, False]


def test_a_step_reads_nothing_that_an_earlier_one_was_given(seeing: tuple[Any, LLM]) -> None:
    """NaN and wrong numbers are left in the inputs where nothing is given."""
    hf, llm = seeing
    prompts = [Given(hf, PARTS, 4), Given(hf, [0, (2, 2), 0], 5)]
    expected = [answers(llm, [one])[0].token_ids for one in prompts]
    for step in llm.engine.runner.buckets.prefill_steps.values():
        if step.given is not None:
            step.given.embeds_LTD.fill_(torch.nan)
            step.given.is_given_T.fill_(True)
            if step.given.position_3T is not None:
                step.given.position_3T.fill_(77)
    llm.reset_prefix_cache()
    assert [answers(llm, [one])[0].token_ids for one in prompts] == expected


def test_embeddings_alone_keep_the_positions_of_their_tokens(seeing: tuple[Any, LLM]) -> None:
    """In prompts of several chunks, beside others."""
    hf, llm = seeing
    prompts = [Given(hf, [0, (8, 8), *[0] * 8, (4, 4)], seed) for seed in (9, 10)]
    for one in prompts:
        one.positions = np.tile(np.arange(len(one.ids)), (3, 1))
    with_positions = [each.token_ids for each in answers(llm, prompts)]
    llm.reset_prefix_cache()
    for one in prompts:
        one.positions = None
    assert [each.token_ids for each in answers(llm, prompts)] == with_positions


def test_embeddings_without_levels_add_nothing_to_hidden_states(seeing: tuple[Any, LLM]) -> None:
    hf, llm = seeing
    one, size = Given(hf, PARTS, 6), llm.engine.runner.cfg.hidden_size
    given = one.embeddings
    one.embeddings = [(start, embeds[:, :size]) for start, embeds in given]
    first = answers(llm, [one])[0]
    one.embeddings = [
        (start, torch.nn.functional.pad(embeds[:, :size], (0, embeds.shape[1] - size)))
        for start, embeds in given
    ]
    assert answers(llm, [one])[0].logprobs == first.logprobs


def test_a_captured_step_is_the_step_that_is_launched(
    seeing: tuple[Any, LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capture runs its step once, with padding; replays read the same memory again."""
    hf, llm = seeing
    runner, made = llm.engine.runner, []
    with monkeypatch.context() as patch:
        patch.setattr(runner.buckets, "prefill_steps", {})

        def capture(step: Callable[[], None]) -> Callable[[], None]:
            owner: PrefillStep = step.__self__  # type: ignore[attr-defined]
            if owner.given is not None:
                made.append([tensor.data_ptr() for tensor in owner.given if tensor is not None])
                assert not owner.given.is_given_T.any()
                assert owner.given.position_3T is not None
                assert not owner.given.position_3T.any()
            return step

        captures = runner._captures._replace(spans=capture)
        patch.setattr(runner.buckets, "_captures", captures)
        answers(llm, [Given(hf, PARTS, 7)], 1)
        (step,) = runner.buckets.prefill_steps.values()
        assert step.given is not None
        assert made == [[tensor.data_ptr() for tensor in step.given if tensor is not None]]


def test_steps_of_all_sizes_share_the_memory_of_embeddings(seeing: tuple[Any, LLM]) -> None:
    runner = seeing[1].engine.runner
    kept = runner.buckets.prefill_steps[64, True].given
    smaller = runner.buckets.given_inputs(16).of(16)
    assert kept is not None and smaller.embeds_LTD.shape[1] == 16
    for one in (kept, smaller):
        assert one.embeds_LTD.is_contiguous()
        assert one.embeds_LTD.data_ptr() == kept.embeds_LTD.data_ptr()


def test_a_second_start_compiles_nothing(seeing: tuple[Any, LLM]) -> None:
    hf, llm = seeing
    options = {"max_num_batched_tokens": 64, "compile_cache_mode": "require"}
    again = engine(llm.engine.config.model, **options)
    try:
        compiler, one = again.engine.runner.compiler, Given(hf, PARTS, 8)
        assert compiler.num_compiled == 0 and compiler.num_loaded > 0
        names = [name for name, *_ in compiler._programs]
        has_windows = hf.config.model_type == "qwen2_5_vl"
        assert names.count("tower_block") == len(BUDGETS) * (1 + has_windows)
        found, expected = (answers(each, [one], encodes=True)[0] for each in (again, llm))
        assert found.token_ids == expected.token_ids
    finally:
        again.close()


def test_a_text_model_has_no_programs_for_embeddings(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "qwen3")
    sizes = {"max_num_seqs": 2, "max_model_len": 64, "max_num_batched_tokens": 32}
    llm = LLM(
        str(folder), device="cpu", skip_tokenizer_init=True, graph_batch_sizes=[2],
        kvcache_block_size=16, **sizes,
    )  # fmt: skip
    try:
        names = {name for name, *_ in llm.engine.runner.compiler._programs}
        assert not names & {"with_given", "add_features"} and "layer" in names
        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
        embeds = torch.randn(2, llm.engine.runner.cfg.hidden_size)
        llm.engine.add_request([5, 6, 7, 8], params, embeddings=[(1, embeds)])
        assert len(next(iter(drain(llm).values())).token_ids) == 3
        assert {name for name, *_ in llm.engine.runner.compiler._programs} == names
        with pytest.raises(ValueError, match=r"vision_patch_budgets is \[64\], but .* no vision"):
            LLM(str(folder), device="cpu", skip_tokenizer_init=True, vision_patch_budgets=[64])
    finally:
        llm.close()


def test_the_tower_counts_before_the_cache_is_sized(
    seeing: tuple[Any, LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights, its largest call, and the cache of embeddings."""
    hf, llm = seeing
    runner, order = llm.engine.runner, []
    tower = sum(param.numel() for name, param in hf.named_parameters() if "visual" in name)
    text = sum(param.numel() for name, param in hf.named_parameters() if "visual" not in name)
    assert runner.model.param_bytes == runner.weights_bytes == 4 * (tower + text)
    tower_steps = type(runner.towers.by_name["vision"])
    run = tower_steps.run

    def watched(self: Any, pixel_TC: Any, layout: Any, compiler: Any, **options: Any) -> Any:
        order.append((len(pixel_TC), options))
        return run(self, pixel_TC, layout, compiler, **options)

    monkeypatch.setattr(tower_steps, "run", watched)
    monkeypatch.setattr(CpuPlatform, "reset_peak", lambda self: order.append("reset"))
    original = CpuPlatform.memory_budget
    budgets: list[Any] = []

    def budget(self: CpuPlatform, utilization: float) -> Any:
        order.append("measure")
        budgets.append(original(self, utilization))
        return budgets[-1]

    monkeypatch.setattr(CpuPlatform, "memory_budget", budget)
    found = runner.measure_budget(0.5)
    assert order == ["reset", (BUDGETS[-1], {"few": False}), "measure"]
    kept = runner.spec.embedding_cache_bytes
    assert kept > 0 and found.allowance_bytes == budgets[0].allowance_bytes - kept


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
def test_workers_build_the_programs_of_a_tower(tmp_path: Path, bare_store: Path) -> None:
    """What they leave is all that a start needs."""
    torch.manual_seed(0)
    MODELS["qwen3"]().save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {
        "device": "cpu", "dtype": "float32", "graph_batch_sizes": [2], "max_num_seqs": 2,
        "kvcache_block_size": 16, "max_num_batched_tokens": 16, "max_model_len": 64,
        "tuning": {"vision_patch_budgets": [32]}, "compile_cache": str(bare_store),
    }  # fmt: skip
    model = str(tmp_path / "model")
    outcomes = precompile.fill(EngineConfig(model, **options), 1, lambda outcome, num: None)
    assert ("vision", 32) in {one.bucket for one in outcomes}
    llm = LLM(model, compile_cache_mode="require", skip_tokenizer_init=True, **options)
    assert llm.engine.runner.compiler.num_compiled == 0
    llm.close()
