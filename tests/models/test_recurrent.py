"""Layers with a recurrent state beside attention: equal to a plain loop, however steps are cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM
from nanovllm.schedule.request import Request
from tests.engines import greedy, tokens
from tests.models import recurrent, test_shards
from tests.models.harness import engine_logits, load, max_difference, sequences

TOLERANCE = 1e-4
SIZES: dict[str, Any] = {
    "max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 64,
    "kvcache_block_size": 16, "num_kvcache_blocks": 65, "graph_batch_sizes": [4],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with recurrent.checkpoint(tmp_path_factory.mktemp("recurrent")) as made:
        yield made


def make(folder: Path, device: str, **options: Any) -> LLM:
    chosen = {**SIZES, "enforce_eager": True, **options}
    return LLM(str(folder), device=device, dtype="float32", skip_tokenizer_init=True, **chosen)


def prompts_of(*lengths: int) -> list[list[int]]:
    return [one.token_ids for one in sequences(recurrent.VOCAB_SIZE, *((n, n) for n in lengths))]


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_logits_are_those_of_a_plain_loop(mode: str, folder: Path, device: str) -> None:
    """Prompts in chunks, beside each other, and tokens after them."""
    runner = load(folder, device, enforce_eager=mode == "eager", **SIZES)
    assert (runner.compiler.lowering is None) == (mode == "eager")
    for lengths in (((1, 6), (99, 102)), ((19, 24), (32, 33))):
        known = sequences(recurrent.VOCAB_SIZE, *lengths)
        expected = [recurrent.expected_logits(folder, one.token_ids) for one in known]
        assert max_difference(engine_logits(runner, known), expected) <= TOLERANCE


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_answers_survive_batches_preemption_and_shared_prefixes(
    mode: str, folder: Path, device: str
) -> None:
    options = {"enforce_eager": mode == "eager"}
    prompts = prompts_of(130, 70, 1, 33, 16)
    expected = [recurrent.greedy_tokens(folder, prompt, 20) for prompt in prompts]
    llm = make(folder, device, **options)
    assert tokens(llm, prompts, greedy(20)) == expected
    assert llm.engine.metrics.num_cached_tokens == 0
    assert tokens(llm, prompts, greedy(20)) == expected
    # a snapshot ends a step of four blocks at least, and the second prompt began in 62 tokens
    assert llm.engine.metrics.num_cached_tokens == 128
    small = make(folder, device, num_kvcache_blocks=17, **options)
    grown = [recurrent.greedy_tokens(folder, prompt, 90) for prompt in prompts[2:]]
    assert tokens(small, prompts[2:], greedy(90)) == grown
    assert small.engine.scheduler.num_preemptions


def test_a_snapshot_serves_many_requests_and_old_ones_make_room(folder: Path) -> None:
    (shared, *_), tails = prompts_of(80), prompts_of(5, 9, 20)
    llm = make(folder, "cpu")
    prompts = [shared + tail for tail in tails]
    expected = [recurrent.greedy_tokens(folder, prompt, 6) for prompt in prompts]
    tokens(llm, [[*shared, 5]], greedy(1))
    assert tokens(llm, prompts, greedy(6)) == expected
    assert llm.engine.metrics.num_cached_tokens == 3 * 64
    one_slot = sum(of_rows[0].nbytes for of_rows, _ in llm.engine.runner.snapshots.states)
    tight = make(folder, "cpu", tuning={"snapshot_bytes": 2 * one_slot + 1})
    assert tight.engine.runner.spec.snapshot_slots == 2
    others = prompts_of(81, 82, 83, 84)
    wanted = [recurrent.greedy_tokens(folder, prompt, 3) for prompt in others]
    for _ in range(2):
        assert [tokens(tight, [one], greedy(3))[0] for one in others] == wanted
    assert tight.engine.metrics.num_cached_tokens == 0, "each overwrote the oldest of two"
    assert tokens(tight, others[2:], greedy(3)) == wanted[2:]
    assert tight.engine.metrics.num_cached_tokens == 128
    tight.reset_prefix_cache()
    assert tokens(tight, others[2:], greedy(3)) == wanted[2:]
    assert tight.engine.metrics.num_cached_tokens == 128
    without = make(folder, "cpu", tuning={"snapshot_bytes": 0})
    for _ in range(2):
        assert tokens(without, others[:1], greedy(3)) == wanted[:1]
    assert without.engine.metrics.num_cached_tokens == 0


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_rejected_proposals_are_rolled_back(mode: str, folder: Path, device: str) -> None:
    """Right and wrong proposals in all mixtures, over blocks and beside rows without any."""
    llm = make(folder, device, draft_lengths=[3], enforce_eager=mode == "eager")
    prompts = prompts_of(30, 70, 1)
    expected = [recurrent.greedy_tokens(folder, prompt, 24) for prompt in prompts]
    assert llm.engine.runner.layout.num_places == 4
    by_prompt = {tuple(prompt): answer for prompt, answer in zip(prompts, expected)}

    def propose(request: Request) -> list[int]:
        known = len(request.output_ids)
        right = by_prompt[tuple(request.prompt_ids)][known : known + 3]
        num_right = (known * 7 + len(request.prompt_ids)) % 4
        wrong = [(token + 1) % recurrent.VOCAB_SIZE for token in right[num_right:]]
        return [] if known % 5 == 4 else right[:num_right] + wrong

    llm.engine.propose = propose
    assert tokens(llm, prompts, greedy(24)) == expected
    assert llm.engine.metrics.num_steps < 24


def test_profiled_steps_and_sleep_leave_no_trace(folder: Path) -> None:
    llm = make(folder, "cpu", enable_sleep_mode=True)
    (prompt,) = prompts_of(70)
    expected = recurrent.greedy_tokens(folder, prompt, 8)
    runner = llm.engine.runner
    states = runner.snapshots.states
    llm.engine.add_request({"prompt_token_ids": prompt}, greedy(8))
    found: list[int] = []
    while llm.engine.has_unfinished:
        for output in llm.engine.step():
            found += output.token_ids
        rows = [request.row for request in llm.engine.scheduler.running if request.is_decoding]
        if rows:
            runner.decode_uncaptured(4, torch.no_grad(), rows)
    assert found == expected
    assert any(bool(of_rows.any()) for of_rows, _ in states)
    llm.sleep(1)
    llm.wake_up()
    assert not any(bool(x.any()) for pair in runner.snapshots.states for x in pair)
    assert tokens(llm, [prompt], greedy(8)) == [expected]
    assert llm.engine.metrics.num_cached_tokens == 0


def test_two_ranks_give_the_logits_of_one(folder: Path) -> None:
    test_shards.check(folder, 2, recurrent.VOCAB_SIZE)
