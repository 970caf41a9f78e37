"""A proposer on the device does not change answers, and steps need not wait for its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.engine.engine import Engine
from nanovllm.runner.draft import PREFIX, DraftModel
from nanovllm.runner.proposer import DeviceProposer
from tests.conftest import save_tiny
from tests.engines import greedy, random_prompts
from tests.engines import tokens as llm_tokens
from tests.runner.proposers import MODES, Reading, Repeat, Spoiled, Watched, make, run, tokens

PROMPTS = random_prompts([19, 1, 40, 99, 7], seed=3)
DRAWN = SamplingParams(temperature=0.9, seed=4, max_tokens=25, ignore_eos=True)
MIXED = [
    greedy(25), greedy(9, presence_penalty=1.5), greedy(14, logprobs=2), DRAWN,
    greedy(20, min_tokens=5),
]  # fmt: skip


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the same vocabulary."""
    changes = {"hidden_size": 32, "num_hidden_layers": 1, "initializer_range": 0.15}
    return save_tiny(tmp_path_factory.mktemp("other"), "llama", vocab_size=512, **changes)


@pytest.fixture(scope="module")
def plain(make_llm: Callable[..., LLM]) -> Iterator[LLM]:
    llm = make_llm(max_num_seqs=6, device="cpu")
    yield llm
    llm.close()


# proposer, its model, the least and the most tokens that a verifying step adds to a row on average
KINDS: dict[str, tuple[DeviceProposer, str | None, float, float]] = {
    "repeat": (Repeat(2), None, 1.0, 1.6),
    "same": (DraftModel(3), "same", 3.2, 4.0),
    "spoiled": (Spoiled(3), "same", 2.0, 3.5),
    "other": (DraftModel(2), "other", 1.0, 1.6),
}
CASES = [*((kind, "eager") for kind in KINDS), ("same", "unpadded"), ("repeat", "graph"),
         ("spoiled", "graph")]  # fmt: skip


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def drafting(
    request: pytest.FixtureRequest, checkpoint: Path, other: Path
) -> Iterator[tuple[Engine, tuple[float, float]]]:
    kind, mode = request.param
    proposer, model, least, most = KINDS[kind]
    folder = None if model is None else {"same": checkpoint, "other": other}[model]
    engine = make(checkpoint, proposer, folder, **MODES[mode])
    yield engine, (least, most)
    engine.close()


@pytest.mark.parametrize("params", [greedy(25), DRAWN], ids=["greedy", "drawn"])
def test_answers_are_those_without_proposals(
    drafting: tuple[Engine, tuple[float, float]], params: SamplingParams, plain: LLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    engine, (least, most) = drafting
    watched = Watched()
    watched.watch(engine, monkeypatch)
    expected = llm_tokens(plain, PROMPTS, params)
    assert tokens(engine, PROMPTS, params) == expected
    verifying = watched.verifying
    ahead = [num_unknown for _, num_unknown in verifying]
    assert ahead.count(1) > len(ahead) / 2, "steps began before earlier results were known"
    num_rows = sum(len(plan.rows) for plan, _ in watched.plans if not plan.is_prefill)
    assert least <= sum(len(one) - 1 for one in expected) / num_rows * 1.15
    alone = tokens(engine, PROMPTS[:1], params)
    assert alone == expected[:1]
    assert sum(len(one) - 1 for one in expected) / num_rows <= most


def test_requests_of_all_kinds_share_a_batch(
    drafting: tuple[Engine, tuple[float, float]], plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that need earlier tokens have no proposals, and log-probabilities are those of plain
    steps."""
    engine, _ = drafting
    watched = Watched()
    watched.watch(engine, monkeypatch)
    expected = plain.generate(PROMPTS, MIXED, use_tqdm=False)
    found = run(engine, PROMPTS, MIXED)
    assert [one.token_ids for one in found] == [one["token_ids"] for one in expected]
    assert found[2].logprobs is not None and len(found[2].logprobs) == 14
    for one, other in zip(found[2].logprobs, expected[2]["logprobs"], strict=True):
        assert list(one.values()) == pytest.approx(list(other.values()), abs=1e-4)
    samplings = [plan.sampling for plan, _ in watched.verifying]
    assert any(one.num_logprobs and one.has_penalties for one in samplings)


def test_answers_end_at_their_limits_and_stops(
    drafting: tuple[Engine, tuple[float, float]], plain: LLM
) -> None:
    engine, _ = drafting
    long = llm_tokens(plain, PROMPTS, greedy(20))
    params = [greedy(20, stop_token_ids=[answer[9]]) for answer in long]
    expected = [answer[: answer.index(answer[9]) + 1] for answer in long]
    assert tokens(engine, PROMPTS, params) == expected
    for num in (1, 2, 4, 7):
        found = run(engine, PROMPTS, greedy(num))
        assert [one.token_ids for one in found] == [answer[:num] for answer in long]
        assert {one.finish_reason for one in found} == {"length"}


def test_the_last_tokens_of_the_longest_sequence_are_right(
    drafting: tuple[Engine, tuple[float, float]], plain: LLM
) -> None:
    engine, _ = drafting
    (prompt,) = random_prompts([245], seed=8)
    expected = llm_tokens(plain, [prompt], greedy(100))
    assert len(expected[0]) == 11
    assert tokens(engine, [prompt], greedy(100)) == expected


@pytest.mark.parametrize("kind", ["same", "other"])
def test_preempted_requests_go_on(kind: str, checkpoint: Path, other: Path, plain: LLM) -> None:
    proposer, model, *_ = KINDS[kind]
    folder = checkpoint if model == "same" else other
    engine = make(checkpoint, proposer, folder, num_kvcache_blocks=1 + 16, **MODES["eager"])
    assert tokens(engine, PROMPTS, greedy(60)) == llm_tokens(plain, PROMPTS, greedy(60))
    assert engine.scheduler.num_preemptions > 0
    engine.close()


def num_steps(engine: Engine, prompt: list[int]) -> int:
    before = engine.metrics.num_steps
    run(engine, [prompt], greedy(41))
    return engine.metrics.num_steps - before


def test_cached_prefixes_and_steps_without_proposals_leave_the_second_models_cache_whole(
    checkpoint: Path,
) -> None:
    """Equal models agree on every token only if the second one has read the same tokens."""
    engine = make(checkpoint, DraftModel(3), checkpoint, **MODES["eager"])
    (prompt,) = random_prompts([70], seed=9)
    num = num_steps(engine, prompt)
    assert num <= 2 + 10 + 4, "four tokens a step, and a few launched beyond the end"
    (cached,) = run(engine, [prompt], greedy(1))
    assert cached.num_cached_tokens == 64
    assert num_steps(engine, prompt) <= num
    engine.forget_prefixes()
    # the first needs penalties for half of the other's answer
    before = engine.metrics.num_steps
    run(engine, [PROMPTS[0], prompt], [greedy(20, presence_penalty=0.5), greedy(61)])
    assert engine.metrics.num_steps - before <= 3 + 20 + 10 + 4
    engine.close()


@pytest.mark.parametrize("level", [1, 2])
def test_both_models_sleep_and_wake(level: int, checkpoint: Path, other: Path, plain: LLM) -> None:
    engine = make(checkpoint, DraftModel(2), other, **MODES["eager"])
    runner, expected = engine.runner, llm_tokens(plain, PROMPTS, greedy(9))
    assert runner.steps.drafting is not None
    steps = runner.steps.drafting.steps
    assert steps is not None
    table_VD, cache = steps.params.embed_VD, steps.caches[0].k_CBKH
    weights = table_VD.clone()
    engine.sleep(level)
    if level == 2:
        assert table_VD.untyped_storage().nbytes() == 0
    assert cache.untyped_storage().nbytes() == 0
    engine.wake_up()
    assert torch.equal(table_VD, weights)
    assert tokens(engine, PROMPTS, greedy(9)) == expected
    engine.close()


def test_the_second_models_bytes_count(checkpoint: Path, other: Path, plain: LLM) -> None:
    engine = make(checkpoint, DraftModel(2), other, **MODES["eager"])
    drafting, without = engine.runner.steps.drafting, plain.engine.runner
    assert drafting is not None and drafting.steps is not None
    caches, params = drafting.steps.caches, drafting.steps.params
    cache_bytes = sum(one.nbytes for cache in caches for one in (cache.k_CBKH, cache.v_CBKH))
    assert cache_bytes == 100 * (engine.runner.block_bytes - without.block_bytes) > 0
    more = engine.runner.weights_bytes - without.weights_bytes
    assert more > params.embed_VD.nbytes
    engine.close()


def test_a_proposer_reads_hidden_states_of_its_layers(checkpoint: Path) -> None:
    proposer = Reading(2)
    engine = make(checkpoint, proposer, **MODES["eager"])
    proposer.seen.clear()  # those of warm-up
    prompt = PROMPTS[3]
    answer = tokens(engine, [prompt], greedy(12))[0]
    steps, sequence = engine.runner.steps, prompt + answer
    first, second = proposer.seen[:2]
    assert [one.phase for one in proposer.seen[:3]] == ["prefill", "prefill", "verify"]
    assert first.token_T.tolist() == sequence[:64]
    assert second.token_T[:35].tolist() == sequence[64:99]
    for fed in proposer.seen[1:]:
        assert fed.states_TJ is not None
        last_TD, before_TD = fed.states_TJ.chunk(2, dim=1)
        assert len(last_TD) == len(before_TD) == len(fed.token_T)
        chosen = steps._head(last_TD).argmax(-1).tolist()
        place = sum(fed.batch.seq_len_R.tolist()) - int(fed.batch.q_start_S[-1])
        if place < len(sequence) - 1:
            num = 35 if fed.phase == "prefill" else 1
            assert chosen[num - 1] == sequence[place + num]
        assert not torch.allclose(last_TD, before_TD)
    engine.close()


def test_a_second_start_loads_the_programs_of_both_models(
    checkpoint: Path, other: Path, bare_store: Path
) -> None:
    sizes = {"graph_batch_sizes": (2,), "max_num_seqs": 2, "max_num_batched_tokens": 16}
    for is_cold in (True, False):
        engine = make(checkpoint, DraftModel(1), other, compile_cache=str(bare_store), **sizes)
        compiler = engine.runner.compiler
        assert (compiler.num_compiled > 0) == is_cold
        assert any(str(key[0]).startswith(PREFIX) for key in compiler._programs)
        run(engine, PROMPTS[:2], greedy(5))  # a compile from here on is an error
        engine.close()


def test_engines_without_a_proposer_have_nothing_of_it(plain: LLM) -> None:
    runner = plain.engine.runner
    assert runner.state.draft_SK is None and runner.steps.drafting is None
    names = {str(key[0]) for key in runner.compiler._programs}
    assert not any(name.startswith(PREFIX) or name == "fed" for name in names)


def test_what_does_not_go_together_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    eager = MODES["eager"]
    with pytest.raises(ValueError, match=r"drafts 3 tokens, but steps verify \[2\]"):
        make(checkpoint, Repeat(3), draft_lengths=(2,), **eager)
    with pytest.raises(ValueError, match=r"after layers \[0, 2\]: they must be 0 … 1"):
        make(checkpoint, Reading(2, (0, 2)), **eager)
    small = save_tiny(tmp_path / "small", "llama", vocab_size=101)
    with pytest.raises(ValueError, match="the draft model has 101 tokens in its vocabulary"):
        make(checkpoint, DraftModel(2), small, **eager)


def test_a_function_on_the_host_takes_the_place_of_the_device(
    checkpoint: Path, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(checkpoint, Repeat(2), **MODES["eager"])
    expected = llm_tokens(plain, PROMPTS, greedy(12))
    of = {tuple(prompt): answer for prompt, answer in zip(PROMPTS, expected)}
    watched = Watched()
    watched.watch(engine, monkeypatch)

    def propose(request: Any) -> list[int]:
        start = len(request.output_ids)
        return of[tuple(request.prompt_ids)][start : start + 2]

    engine.propose = propose
    assert tokens(engine, PROMPTS, greedy(12)) == expected
    assert not watched.verifying
    assert any(len(plan.token_T) and not plan.is_prefill for plan, _ in watched.plans)
    engine.close()
