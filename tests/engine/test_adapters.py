"""Rows know their adapter: each gets the answer that it would get alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.checks import InvalidValue
from nanovllm.compile import keys
from nanovllm.compile.program import Compiler
from nanovllm.compile.trace import input_leaves
from nanovllm.engine.request import EngineRequest
from nanovllm.models import registry
from nanovllm.schedule.outputs import FinishedOutput
from nanovllm.schedule.plan import StepPlan
from tests.engines import assert_all_free, drain, greedy
from tests.models import adapted

LENGTHS = (19, 1, 40, 33, 7, 20)
PROMPTS = [[(7 * i + 3 * j * j) % 120 + 5 for j in range(num)] for i, num in enumerate(LENGTHS)]
NAMES = (None, "french", "german", "french", None, "german")
SIZES: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "max_model_len": 128, "kvcache_block_size": 16,
    "max_num_seqs": 6, "max_num_batched_tokens": 64, "num_kvcache_blocks": 60,
}  # fmt: skip
MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "graph": {"graph_batch_sizes": (1, 6)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with adapted.checkpoint(tmp_path_factory.mktemp("adapted")) as found:
        yield found


def make(folder: Path, **options: Any) -> LLM:
    llm = LLM(str(folder), **{**SIZES, **MODES["eager"], **options})
    for name in ("french", "german"):
        llm.engine.adapters.add(name, name.encode())
    return llm


@pytest.fixture(scope="module")
def eager(folder: Path) -> Iterator[LLM]:
    llm = make(folder, draft_lengths=(2,))
    yield llm
    llm.close()


def run(
    llm: LLM, prompts: Sequence[list[int]], names: Sequence[str | None], num_tokens: int = 12
) -> list[FinishedOutput]:
    """Answers to prompts in one batch, each with an adapter or none."""
    engine, params = llm.engine, greedy(num_tokens)
    ids = [
        engine.add(EngineRequest(prompt, params, incremental=False, adapter=name))
        for prompt, name in zip(prompts, names)
    ]
    done = drain(llm)
    assert_all_free(llm)
    return [done[one] for one in ids]


def tokens(*args: Any) -> list[list[int]]:
    return [one.token_ids for one in run(*args)]


@pytest.fixture(scope="module")
def alone(eager: LLM) -> list[list[int]]:
    """The answer to each prompt with its adapter, without company."""
    found = []
    for prompt, name in zip(PROMPTS, NAMES):
        eager.engine.forget_prefixes()
        found += tokens(eager, [prompt], [name])
    return found


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_of_several_adapters_gives_each_its_own_answer(
    mode: str, folder: Path, alone: list[list[int]]
) -> None:
    llm = make(folder, **MODES[mode])
    assert tokens(llm, PROMPTS, NAMES) == alone
    plain = tokens(llm, PROMPTS, [None] * 6)
    differs = [one != other for one, other in zip(plain, alone)]
    assert differs == [name is not None for name in NAMES], "an adapter changes its answers alone"
    llm.close()


def test_equal_prompts_share_blocks_with_one_adapter_only(eager: LLM) -> None:
    eager.engine.forget_prefixes()
    names = (None, "french", "german", "german", None)
    found = [run(eager, [PROMPTS[2]], [name])[0] for name in names]
    assert [one.num_cached_tokens for one in found] == [0, 0, 0, 32, 32]
    assert found[3].token_ids == found[2].token_ids != found[1].token_ids
    assert found[4].token_ids == found[0].token_ids


def test_preempted_requests_keep_their_adapters(folder: Path, alone: list[list[int]]) -> None:
    llm = make(folder, num_kvcache_blocks=1 + 11)
    assert tokens(llm, PROMPTS, NAMES) == alone
    expected = tokens(llm, PROMPTS, NAMES, 40)
    assert llm.engine.scheduler.num_preemptions > 0
    assert [one[:12] for one in expected] == alone
    llm.close()


def test_verified_tokens_are_those_of_the_adapter(eager: LLM, alone: list[list[int]]) -> None:
    of = {tuple(prompt): answer for prompt, answer in zip(PROMPTS, alone)}

    def propose(request: Any) -> list[int]:
        start = len(request.output_ids)
        return of[tuple(request.prompt_ids)][start : start + 2]

    eager.engine.propose = propose
    try:
        num_steps = eager.engine.metrics.num_steps
        assert tokens(eager, PROMPTS, NAMES) == alone
        assert eager.engine.metrics.num_steps - num_steps < 10
    finally:
        eager.engine.propose = None


def test_an_adapter_that_is_not_loaded_is_refused_and_others_go_on(
    eager: LLM, alone: list[list[int]]
) -> None:
    engine = eager.engine
    first = engine.add(EngineRequest(PROMPTS[1], greedy(12), incremental=False, adapter="french"))
    engine.step()
    with pytest.raises(
        InvalidValue, match="adapter 'dutch' is not loaded: loaded are 'french', 'german'"
    ) as raised:
        engine.add(EngineRequest(PROMPTS[0], greedy(12), adapter="dutch"))
    assert raised.value.field == "adapter"
    assert drain(eager)[first].token_ids == alone[1]
    with pytest.raises(ValueError, match="adapter 'french' is loaded already"):
        engine.adapters.add("french", b"")
    with pytest.raises(ValueError, match=r"adapter 'dutch' cannot be loaded: there is room for 2"):
        engine.adapters.add("dutch", b"")


def test_a_model_without_adapters_refuses_them(eager_llm: LLM) -> None:
    with pytest.raises(InvalidValue, match="adapter 'french' is not loaded: none is"):
        eager_llm.engine.add(EngineRequest([5], SamplingParams(), adapter="french"))
    assert not eager_llm.engine.has_unfinished


def test_the_plans_bytes_are_all_that_another_rank_needs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second runner that gets plans as the other ranks do chooses the same tokens."""
    llm, other = make(folder), make(folder)
    launch, results = llm.engine.runner.launch, []

    def told(plan: StepPlan) -> Any:
        read = StepPlan.from_bytes(plan.to_bytes())
        assert [row.adapter for row in read.settings] == [row.adapter for row in plan.settings]
        launched = launch(plan)
        results.append((launched.wait().tokens, other.engine.runner.launch(read).wait().tokens))
        return launched

    monkeypatch.setattr(llm.engine.runner, "launch", told)
    run(llm, PROMPTS, NAMES)
    assert results and all(ours == theirs for ours, theirs in results)
    llm.close()
    other.close()


def test_programs_without_adapters_have_the_inputs_and_keys_of_a_model_without_any(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: dict[int, dict[str, tuple[list[str], dict[str, str]]]] = {0: {}, 2: {}}
    make_program = Compiler._make

    for num, found in known.items():
        monkeypatch.setitem(registry.ARCHITECTURES, adapted.NAME, partial(adapted.adapted, num=num))

        def noting(
            self: Compiler, name: str, function: Any, inputs: Any, found: Any = found
        ) -> Any:
            key = keys.program_key(function, inputs, varying=(), common={})
            found[name] = [leaf for leaf, _ in input_leaves(inputs)], dict(key.ingredients)
            return make_program(self, name, function, inputs)

        monkeypatch.setattr(Compiler, "_make", noting)
        LLM(str(folder), **SIZES, **MODES["eager"]).close()
    plain, with_adapters = known[0], known[2]
    state = ["token_S", "pos_S", "rope_offset_S", "block_tables_0", "sampling_SF", "seed_S"]
    of_state = [f"state_{name}" for name in state]
    batch = ["rope_pos_T", "slot_T", "block_table_RP", "seq_len_R", "q_start_S"]
    of_batch = [f"batch_{name}" for name in batch]
    begins = [name for name in plain if name.startswith("begin")]
    layers = [name for name in plain if name.startswith("layer_decode")]
    assert begins and layers
    for name in plain:
        names, ingredients = plain[name]
        more, more_ingredients = with_adapters[name]
        if name in begins:
            assert names[:7] == [*of_state, "embed_VD"]
            assert more == [*of_state, "state_adapter_S", *names[6:]]
        if name in layers:
            assert names[-6:] == [*of_batch, "h_TD"]
            assert more == [*names[:-1], "batch_adapter_T", "h_TD"]
        assert ingredients == {
            one: value for one, value in more_ingredients.items() if "adapter_S" not in one
            and "adapter_T" not in one
        }  # fmt: skip
        assert not any(leaf.endswith(("adapter_S", "adapter_T")) for leaf in names)


def test_a_request_with_other_weights_under_one_name_has_other_blocks(
    eager: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = EngineRequest(PROMPTS[2], greedy(1), incremental=False, adapter="french")
    roots, adapters = [], eager.engine.adapters
    french = next(iter(adapters))
    for digest in (b"old", b"new"):
        monkeypatch.setitem(adapters._by_name, french.name, replace(french, digest=digest))
        eager.engine.add(asked)
        roots.append(eager.engine.scheduler.waiting[0].cache_root)
        drain(eager)
    assert roots[0] != roots[1]
