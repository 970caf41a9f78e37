"""A request whose logits are NaN ends with an error. Other requests keep their answers.

The embedding of one token is NaN in the checkpoint, so its router scores are NaN from the first
layer on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm import LLM, SamplingParams
from nanovllm.sampling import BeamSearchParams
from nanovllm.schedule.request import Request
from tests.conftest import save_tiny
from tests.engines import assert_all_free, greedy, random_prompts, tokens

BLOCK_SIZE = 16
# The first prompt's own answer leads to the token that is NaN.
CLEAN = random_prompts([7, 1, 40, 19])
NUM_BEFORE = 4  # tokens of the first prompt's answer before that token
ERROR = "all logits are NaN or −inf"


def make(folder: Path, device: str, **options: Any) -> LLM:
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "device": device,
        "enforce_eager": True,
        "max_num_seqs": 12,
        "max_num_batched_tokens": 64,
        "max_model_len": 128,
        "kvcache_block_size": BLOCK_SIZE,
        "num_kvcache_blocks": 100,
        "graph_batch_sizes": (2, 12),
    }
    return LLM(str(folder), **{**defaults, **options})


@pytest.fixture(scope="module")
def answers(folder: Path, device: str) -> list[list[int]]:
    """Answers of the checkpoint without NaN."""
    llm = make(folder, device)
    found = [tokens(llm, [prompt], greedy())[0] for prompt in CLEAN]
    llm.close()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(
        tmp_path_factory.mktemp("nan"),
        "qwen3_moe",
        hidden_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        tie_word_embeddings=False,
    )


@pytest.fixture(scope="module")
def bad_id(folder: Path, answers: list[list[int]]) -> int:
    """The token that is NaN from now on."""
    token_id = answers[0][NUM_BEFORE]
    others = [*answers[0][:NUM_BEFORE], *chain(*answers[1:], *CLEAN)]
    assert token_id not in others
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][token_id] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return token_id


@pytest.fixture(scope="module", params=["eager", "unpadded", "graph", "ahead"])
def llm(request: pytest.FixtureRequest, folder: Path, device: str, bad_id: int) -> Iterator[LLM]:
    modes: dict[str, dict[str, Any]] = {
        "eager": {},
        "unpadded": {"pad_batches": False},
        "graph": {"enforce_eager": False},
        "ahead": {"run_ahead": 1},
    }
    llm = make(folder, device, **modes[request.param])
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def one(folder: Path, device: str, bad_id: int) -> Iterator[LLM]:
    """For tests of what does not depend on the mode."""
    llm = make(folder, device, draft_lengths=(3,), run_ahead=0)
    yield llm
    llm.close()


def poisoned(bad_id: int) -> list[list[int]]:
    """Prompts with the bad token at the start, in the middle and at the end.

    The last one needs two prefill steps, with the token in the first.
    """
    base = random_prompts([1, 18, 70], seed=9)
    return [[bad_id], [*base[1], bad_id], [*base[1][:9], bad_id, 8], [bad_id, *base[2]]]


def mixed(bad_id: int) -> list[list[int]]:
    """A clean prompt after each poisoned one."""
    return [prompt for pair in zip(poisoned(bad_id), CLEAN) for prompt in pair]


def assert_failed(output: Any, num_tokens: int = 0) -> None:
    assert output["finish_reason"] == output.outputs[0].finish_reason == "error"
    assert ERROR in output.error and output.error == output.outputs[0].error
    assert len(output["token_ids"]) == num_tokens and output.finished


def test_only_requests_with_nan_end_with_an_error(
    llm: LLM, bad_id: int, answers: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    llm.reset_prefix_cache()
    with caplog.at_level(logging.ERROR):
        outputs = llm.generate(mixed(bad_id), greedy(), use_tqdm=False)
    for output in outputs[::2]:
        assert_failed(output)
    assert [output["token_ids"] for output in outputs[3::2]] == answers[1:]
    assert all(output.error is None for output in outputs[3::2])
    # the first answer reaches the bad token by itself
    assert_failed(outputs[1], num_tokens=NUM_BEFORE + 1)
    assert outputs[1]["token_ids"] == answers[0][: NUM_BEFORE + 1]
    assert caplog.text.count(ERROR) == 5
    assert_all_free(llm)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.8, "seed": 3},
        {"temperature": 0.8, "seed": 3, "top_k": 9, "top_p": 0.9, "min_p": 0.01},
        {"repetition_penalty": 1.3, "presence_penalty": 0.4},
        {"logit_bias": {7: 2.0}},
        {"logprobs": 2},
        {"prompt_logprobs": 1},
        {"min_tokens": 2, "stop_token_ids": [9]},
    ],
    ids=lambda changes: next(reversed(changes)),
)
def test_every_sampler_finds_nan_and_spares_other_rows(
    llm: LLM, bad_id: int, changes: dict[str, Any]
) -> None:
    params = greedy(3, **changes)
    expected = [tokens(llm, [prompt], params)[0] for prompt in CLEAN]
    assert all(bad_id not in answer for answer in expected)
    outputs = llm.generate(mixed(bad_id), params, use_tqdm=False)
    for output in outputs[::2]:
        assert_failed(output)
        assert not output.outputs[0].logprobs
    assert [output["token_ids"] for output in outputs[1::2]] == expected
    assert_all_free(llm)


def test_a_failed_row_counts_no_token_of_another_row(one: LLM, bad_id: int) -> None:
    outputs = one.generate(mixed(bad_id), greedy(3, presence_penalty=0.4), use_tqdm=False)
    last_id = one.engine.model_config.vocab_size - 1
    assert not any(last_id in output["token_ids"] for output in outputs)
    counts_SV, _ = one.engine.runner.sampler._tables()
    assert counts_SV.any() and not counts_SV[:, last_id].any()


@pytest.mark.parametrize("changes", [{}, {"logprobs": 1}], ids=["plain", "logprobs"])
def test_requests_with_the_same_prefix_as_a_failed_one_keep_their_answers(
    llm: LLM, bad_id: int, changes: dict[str, Any]
) -> None:
    """In the failed request's blocks, NaN reaches tokens before the bad one as well."""
    pool, params = llm.engine.scheduler.cache.pool, greedy(5, **changes)
    (start,) = random_prompts([2 * BLOCK_SIZE], seed=21)
    bad, good = [*start, bad_id, *start], [[*start, 5], [*start, 8, 7], [*start, *CLEAN[3]]]
    llm.reset_prefix_cache()
    alone = [tokens(llm, [prompt], params)[0] for prompt in good]
    assert len(pool.cached_prefix(pool.digests(good[0]))) == 2
    assert all(bad_id not in answer for answer in alone)
    for _ in range(2):
        (failed,) = llm.generate([bad], params, use_tqdm=False)
        assert_failed(failed)
        assert pool.cached_prefix(pool.digests(bad)) == []
        failed, *others = llm.generate([bad, *good], params, use_tqdm=False)
        assert_failed(failed)
        assert [output["token_ids"] for output in others] == alone
        if changes:
            assert [len(output["logprobs"]) for output in others] == [5] * 3
    assert_all_free(llm)


@pytest.mark.parametrize("num_right", [0, 1, 2, 3])
def test_proposals_before_and_of_nan_do_not_change_where_an_answer_ends(
    one: LLM, bad_id: int, answers: list[list[int]], num_right: int
) -> None:
    def propose(request: Request) -> list[int]:
        start = len(request.output_ids)
        return [*answers[0][start : start + num_right], bad_id, bad_id]

    one.engine.propose = propose
    try:
        (output,) = one.generate(CLEAN[:1], greedy(), use_tqdm=False)
        stop_id = answers[0][NUM_BEFORE - 1]
        (stopped,) = one.generate(CLEAN[:1], greedy(stop_token_ids=[stop_id]), use_tqdm=False)
    finally:
        one.engine.propose = None
    assert_failed(output, num_tokens=NUM_BEFORE + 1)
    assert output["token_ids"] == answers[0][: NUM_BEFORE + 1]
    assert stopped["finish_reason"] == "stop" and stopped.error is None
    assert stopped["token_ids"] == answers[0][:NUM_BEFORE]
    assert_all_free(one)


def test_a_stream_ends_with_the_error(one: LLM, bad_id: int, answers: list[list[int]]) -> None:
    pieces = list(one.stream([[bad_id], CLEAN[0], CLEAN[1]], greedy()))
    for index, expected in enumerate(([], answers[0][: NUM_BEFORE + 1], answers[1])):
        own = [piece for piece in pieces if piece.index == index]
        assert [*chain(*(piece["token_ids"] for piece in own))] == expected
        assert [piece.finish_reason for piece in own[:-1]] == [None] * (len(own) - 1)
        assert (own[-1].finish_reason == "error") == (index < 2)
        assert (own[-1].error is None) == (index == 2)


def test_beams_end_where_nan_begins(one: LLM, bad_id: int) -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=3, ignore_eos=True)
    (alone,) = one.beam_search([{"prompt_token_ids": CLEAN[1]}], params)
    failed, other = one.beam_search(
        [{"prompt_token_ids": [5, bad_id]}, {"prompt_token_ids": CLEAN[1]}], params
    )
    assert [(beam.tokens, beam.finish_reason) for beam in failed.sequences] == [
        ([5, bad_id], "error")
    ]
    assert [beam.tokens for beam in other.sequences] == [beam.tokens for beam in alone.sequences]


def test_all_answers_to_a_prompt_with_nan_fail(one: LLM, bad_id: int) -> None:
    params = SamplingParams(n=3, temperature=0.7, max_tokens=2)
    (output,) = one.generate([[5, bad_id]], params, use_tqdm=False)
    assert [answer.finish_reason for answer in output.outputs] == ["error"] * 3
    counts = [m for m in one.get_metrics() if "finished_reason" in (m.labels or {})]
    errors = {m.labels["finished_reason"]: m.value for m in counts}
    assert errors["error"] >= 3


def test_given_embeddings_of_nan_fail_alone(one: LLM) -> None:
    engine, answer = one.engine, tokens(one, [CLEAN[3]], greedy(2))[0]
    embeds = torch.full((2, engine.model_config.hidden_size), torch.nan)
    ids = [
        engine.add_request(CLEAN[3], greedy(2), incremental=False, embeddings=given)
        for given in ([(3, embeds)], [])
    ]
    done = {}
    while engine.has_unfinished:
        done.update({output.request_id: output.completion for output in engine.step()})
    assert done[ids[0]].finish_reason == "error" and done[ids[1]].token_ids == answer


def test_a_request_that_forbids_all_tokens_fails_alone(one: LLM, answers: list[list[int]]) -> None:
    nothing = greedy(4, allowed_token_ids=[9], stop_token_ids=[9], min_tokens=2)
    params = [nothing, greedy(), nothing, greedy()]
    outputs = one.generate(CLEAN, params, use_tqdm=False)
    for output in outputs[::2]:
        assert_failed(output)
        assert "forbid all" in output.error
    assert outputs[3]["token_ids"] == answers[3]
    assert outputs[1]["token_ids"] == answers[1]
