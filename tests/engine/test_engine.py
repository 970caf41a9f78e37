"""Requests through the engine: seeds, endings, log-probabilities, aborts, interruptions, and what is left afterwards."""

from __future__ import annotations

import gc
import itertools
import os
import re
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams, platforms
from nanovllm.engine.outputs import Completion, RequestOutput
from nanovllm.engine.scheduler import DecodePlan, PrefillPlan
from tests.engine.conftest import EOS_IDS, VOCAB_SIZE, Generate, assert_all_free, random_prompts

NUM_TOKENS = 12


def greedy(num_tokens: int = NUM_TOKENS, **changes: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": num_tokens, "ignore_eos": True, **changes})


def tokens(llm: LLM, prompts: list[list[int]], params: Any) -> list[list[int]]:
    return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]


def drain(llm: LLM) -> dict[int, Completion]:
    """Step until nothing is left; completions by request id."""
    done: dict[int, Completion] = {}
    while llm.engine.has_unfinished:
        done.update({output.request_id: output.completion for output in llm.engine.step() if output.completion})
    return done


@pytest.fixture(params=["eager", "graph"])
def llm(request: pytest.FixtureRequest) -> LLM:
    return request.getfixturevalue(f"{request.param}_llm")


# seeds --------------------------------------------------------------------------------------------------------------

SEEDED = [
    SamplingParams(temperature=1.0, max_tokens=NUM_TOKENS, seed=7, ignore_eos=True),
    SamplingParams(temperature=0.7, max_tokens=NUM_TOKENS, seed=-(2**63), ignore_eos=True),
    SamplingParams(temperature=1.5, max_tokens=NUM_TOKENS, seed=8, top_k=40, ignore_eos=True),
    SamplingParams(temperature=1.5, max_tokens=NUM_TOKENS, seed=9, top_p=0.9, min_p=0.01, ignore_eos=True),
    SamplingParams(temperature=1.2, max_tokens=NUM_TOKENS, seed=2**63 - 1, repetition_penalty=1.3, ignore_eos=True),
    SamplingParams(temperature=1.2, max_tokens=NUM_TOKENS, seed=3, frequency_penalty=0.5, ignore_eos=True),
]


@pytest.fixture(scope="module")
def seeded_prompts() -> list[list[int]]:
    return random_prompts([1, 19, 16, 48, 33, 99], seed=40)


@pytest.fixture(scope="module")
def seeded_tokens(shared_llm: LLM, seeded_prompts: list[list[int]]) -> list[list[int]]:
    return [tokens(shared_llm, [prompt], params)[0] for prompt, params in zip(seeded_prompts, SEEDED)]


def test_same_seed_same_tokens_alone_and_among_others(
    llm: LLM, seeded_prompts: list[list[int]], seeded_tokens: list[list[int]]
) -> None:
    alone = [tokens(llm, [prompt], params)[0] for prompt, params in zip(seeded_prompts, SEEDED)]
    assert alone == seeded_tokens
    assert tokens(llm, seeded_prompts, SEEDED) == seeded_tokens
    others = random_prompts([5] * 31, seed=41)
    crowd = [SamplingParams(max_tokens=1 + i % 20, temperature=i / 10) for i in range(31)]
    found = tokens(llm, others[:17] + seeded_prompts + others[17:], crowd[:17] + SEEDED + crowd[17:])
    assert found[17:-14] == seeded_tokens


def test_same_seed_same_tokens_in_a_batch_of_plain_requests(llm: LLM) -> None:
    """Where no request needs more than the sampler of the step itself, in rows and places of all kinds."""
    prompts = random_prompts([1, 19, 16, 33, 5, 7, 40], seed=48)
    params = [
        SamplingParams(temperature=0.5 + idx / 4, max_tokens=NUM_TOKENS + idx, seed=idx, ignore_eos=True)
        for idx in range(len(prompts))
    ]
    alone = [tokens(llm, [prompt], one)[0] for prompt, one in zip(prompts, params)]
    assert tokens(llm, prompts, params) == alone
    assert tokens(llm, prompts[::-1], params[::-1]) == alone[::-1]
    others = [SamplingParams(max_tokens=1 + i % 20, temperature=i / 10) for i in range(30)]
    assert tokens(llm, random_prompts([5] * 30, seed=49) + prompts, others + params)[30:] == alone


@pytest.mark.parametrize("buckets", [(1,), (2, 3), (64,)], ids=str)
def test_same_seed_same_tokens_in_every_bucket(
    make_llm: Callable[..., LLM],
    seeded_prompts: list[list[int]],
    seeded_tokens: list[list[int]],
    buckets: tuple[int, ...],
) -> None:
    assert tokens(make_llm(graph_batch_sizes=buckets), seeded_prompts, SEEDED) == seeded_tokens
    if buckets == (1,):
        assert tokens(make_llm(pad_batches=False), seeded_prompts, SEEDED) == seeded_tokens


def test_same_seed_same_tokens_after_preemption_and_in_chunks(
    make_llm: Callable[..., LLM], shared_llm: LLM, seeded_prompts: list[list[int]]
) -> None:
    """Penalties among them: restarted requests remember what they have generated."""
    params = [replace(one, max_tokens=50) for one in SEEDED]
    params += [greedy(50, presence_penalty=1.5, frequency_penalty=1.0, repetition_penalty=1.2)] * 2
    prompts = seeded_prompts + seeded_prompts[1:3]
    expected = tokens(shared_llm, prompts, params)
    llm = make_llm(num_kvcache_blocks=1 + 10, max_model_len=160, max_num_batched_tokens=32)
    assert tokens(llm, prompts, params) == expected
    assert llm.engine.scheduler.num_preemptions > 0
    assert_all_free(llm)


def test_different_seeds_differ_and_no_seed_is_a_seed_per_request(make_llm: Callable[..., LLM]) -> None:
    (prompt,) = random_prompts([9], seed=43)
    seeded = [SamplingParams(max_tokens=20, seed=seed, ignore_eos=True) for seed in (0, 1, 2**32, -1)]
    unseeded = [SamplingParams(max_tokens=20, ignore_eos=True)] * 4
    first, again, other = make_llm(seed=5), make_llm(seed=5), make_llm(seed=6)
    found = tokens(first, [prompt] * 8, seeded + unseeded)
    assert len(set(map(tuple, found))) == 8
    assert tokens(again, [prompt] * 8, seeded + unseeded) == found
    elsewhere = tokens(other, [prompt] * 8, seeded + unseeded)
    assert elsewhere[:4] == found[:4]
    assert not {tuple(t) for t in elsewhere[4:]} & {tuple(t) for t in found[4:]}


def test_n_answers_have_their_own_seeds(eager_llm: LLM) -> None:
    (prompt,) = random_prompts([20], seed=44)
    params = SamplingParams(max_tokens=10, seed=50, n=4, ignore_eos=True)
    (output, greedy_output) = eager_llm.generate([prompt, prompt], [params, greedy(10)], use_tqdm=False)
    answers = [one["token_ids"] for one in output["outputs"]]
    assert len({tuple(answer) for answer in answers}) == 4 and output["token_ids"] == answers[0]
    assert "outputs" not in greedy_output
    alone = [SamplingParams(max_tokens=10, seed=50 + i, ignore_eos=True) for i in range(4)]
    assert tokens(eager_llm, [prompt] * 4, alone) == answers
    (again,) = eager_llm.generate([prompt], params, use_tqdm=False)
    assert again["outputs"][3]["token_ids"] == answers[3]


def test_filters_that_leave_one_token_are_greedy(llm: LLM, hf_generate: Generate) -> None:
    prompts = random_prompts([5, 19, 33, 40], seed=45)
    only = [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 0, "top_k": 3, "top_p": 0.5}]
    params = [greedy(**{"temperature": 2.0, **change}) for change in only]
    assert tokens(llm, prompts, params) == [hf_generate(prompt, NUM_TOKENS) for prompt in prompts]


def test_repetition_penalty_is_that_of_transformers(llm: LLM, hf_model: Any) -> None:
    prompts = random_prompts([19, 40, 64], seed=46)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=hf_model.device)
        out = hf_model.generate(
            ids, max_new_tokens=30, do_sample=False, repetition_penalty=1.4, eos_token_id=None, pad_token_id=0
        )
        expected.append(out[0, len(prompt) :].tolist())
    assert tokens(llm, prompts, greedy(30, repetition_penalty=1.4)) == expected


def test_presence_penalty_forbids_repetition_when_logits_are_close(eager_llm: LLM) -> None:
    """Penalties of the largest strength act on generated tokens: far fewer of them repeat."""
    prompts = random_prompts([9, 19], seed=47)
    for plain, penalized in zip(
        tokens(eager_llm, prompts, greedy(60)),
        tokens(eager_llm, prompts, greedy(60, frequency_penalty=2.0, presence_penalty=2.0)),
    ):
        assert len(set(penalized)) > len(set(plain))


# endings ------------------------------------------------------------------------------------------------------------


def find_answer(
    llm: LLM, is_wanted: Callable[[list[int]], bool], num_tokens: int = 60
) -> tuple[list[int], int, list[int]]:
    """(prompt, seed, tokens) of a sampled answer for which `is_wanted`."""
    (prompt,) = random_prompts([5], seed=60)
    params = [SamplingParams(temperature=2.0, max_tokens=num_tokens, seed=s, ignore_eos=True) for s in range(200)]
    for seed, answer in enumerate(tokens(llm, [prompt] * 200, params)):
        if is_wanted(answer):
            return prompt, seed, answer
    raise AssertionError("no such answer among 200")


@pytest.mark.parametrize("eos_id", EOS_IDS)
def test_every_eos_id_of_the_generation_config_ends_an_answer(eager_llm: LLM, eos_id: int) -> None:
    (other,) = set(EOS_IDS) - {eos_id}
    prompt, seed, answer = find_answer(eager_llm, lambda ids: eos_id in ids[5:] and other not in ids)
    end = answer.index(eos_id) + 1
    params = SamplingParams(temperature=2.0, max_tokens=60, seed=seed)
    (output,) = eager_llm.generate([prompt], params, use_tqdm=False)
    assert output["token_ids"] == answer[:end] and output["finish_reason"] == "stop"
    assert output["text"] == eager_llm.tokenizer.decode(answer[: end - 1], skip_special_tokens=True)


def test_ignore_eos_and_max_tokens(eager_llm: LLM) -> None:
    prompt, seed, answer = find_answer(eager_llm, lambda ids: EOS_IDS[0] in ids)
    (output,) = eager_llm.generate(
        [prompt], SamplingParams(temperature=2.0, max_tokens=60, seed=seed, ignore_eos=True), use_tqdm=False
    )
    assert output["token_ids"] == answer and output["finish_reason"] == "length" and len(answer) == 60


def test_stop_token_ids_end_an_answer_with_or_without_ignore_eos(llm: LLM, hf_generate: Generate) -> None:
    (prompt,) = random_prompts([19], seed=61)
    answer = hf_generate(prompt, 40)
    stop_id = answer[10]
    end = answer.index(stop_id) + 1
    params = greedy(40, stop_token_ids=[stop_id, VOCAB_SIZE + 10])
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    assert output["token_ids"] == answer[:end] and output["finish_reason"] == "stop"


@pytest.mark.parametrize("min_tokens", [1, 5, 30])
def test_min_tokens_keeps_every_ending_away(llm: LLM, min_tokens: int) -> None:
    stop_ids = list(range(5, 300))  # most tokens would end the answer
    params = [
        SamplingParams(temperature=1.5, max_tokens=30, min_tokens=min_tokens, seed=seed, stop_token_ids=stop_ids)
        for seed in range(6)
    ]
    prompts = random_prompts([1, 5, 19, 33, 40, 5], seed=62)
    ends = set(stop_ids) | set(EOS_IDS)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for output in outputs:
        ids = output["token_ids"]
        assert len(ids) >= min_tokens
        assert not ends & set(ids[:min_tokens]), "a stop token was drawn too early"
        assert all(token_id not in ends for token_id in ids[:-1])
        assert (output["finish_reason"] == "stop") == (ids[-1] in ends)
    if min_tokens < 30:
        assert any(len(output["token_ids"]) == min_tokens + 1 for output in outputs), "the next one may end it"


def test_stop_strings_across_tokens(llm: LLM) -> None:
    """Greedy answers of a random model are random text: any piece of one that spans tokens can be the stop string."""
    prompts = random_prompts([19, 33, 40], seed=63)
    full = llm.generate(prompts, greedy(40), use_tqdm=False)
    stops = [next(found[0] for found in re.finditer(r">[^\ufffd]{3,5}", output["text"][5:])) for output in full]
    outputs = llm.generate(prompts, [greedy(40, stop=stop) for stop in stops], use_tqdm=False)
    for output, whole, stop in zip(outputs, full, stops):
        assert output["text"] == whole["text"][: whole["text"].index(stop)] and stop not in output["text"]
        assert output["finish_reason"] == "stop"
        num = len(output["token_ids"])
        assert output["token_ids"] == whole["token_ids"][:num]
        assert stop in llm.tokenizer.decode(output["token_ids"], skip_special_tokens=True)
        assert stop not in llm.tokenizer.decode(output["token_ids"][:-1], skip_special_tokens=True)
    streamed = ["", "", ""]
    for piece in llm.stream(prompts, [greedy(40, stop=stop) for stop in stops]):
        streamed[piece["index"]] += piece["text"]
        whole_text = outputs[piece["index"]]["text"]
        assert whole_text.startswith(streamed[piece["index"]]), "part of a stop string was shown"
    assert streamed == [output["text"] for output in outputs]


def test_streamed_text_and_tokens_add_up(llm: LLM) -> None:
    prompts = random_prompts([5, 19, 33], seed=64)
    params = [SamplingParams(temperature=1.5, max_tokens=50, seed=seed) for seed in range(3)]
    expected = llm.generate(prompts, params, use_tqdm=False)
    text, ids, reasons = ["", "", ""], [[], [], []], ["", "", ""]
    for piece in llm.stream(prompts, params):
        text[piece["index"]] += piece["text"]
        ids[piece["index"]] += piece["token_ids"]
        reasons[piece["index"]] = piece["finish_reason"]
    assert text == [output["text"] for output in expected]
    assert ids == [output["token_ids"] for output in expected]
    assert reasons == [output["finish_reason"] for output in expected]


def test_answers_end_at_max_model_len(eager_llm: LLM, hf_generate: Generate) -> None:
    (prompt,) = random_prompts([250], seed=65)
    (output,) = eager_llm.generate([prompt], greedy(100), use_tqdm=False)
    assert output["token_ids"] == hf_generate(prompt, 6) and output["finish_reason"] == "length"
    (longest,) = random_prompts([255], seed=66)
    assert tokens(eager_llm, [longest], greedy(100)) == [hf_generate(longest, 1)]


# log-probabilities --------------------------------------------------------------------------------------------------


def hf_logprobs(hf_model: Any, token_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return hf_model(torch.tensor([token_ids], device=hf_model.device)).logits[0].double().log_softmax(-1).cpu()


def assert_logprobs(found: dict[int, float], expected_V: torch.Tensor, token_id: int, num: int) -> None:
    assert token_id in found and len(found) in (num, num + 1)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    top = expected_V.argsort(descending=True)[:num].tolist()
    assert set(found) == set(top) | {token_id}
    for one, value in found.items():
        assert value == pytest.approx(float(expected_V[one]), abs=1e-3)


def test_logprobs_are_those_of_transformers(llm: LLM, hf_model: Any) -> None:
    """Sampled, penalized and filtered: the values are of the model's own logits all the same."""
    prompts = random_prompts([1, 19, 40, 7, 5], seed=70)
    changes: list[dict[str, Any]] = [{}, {"temperature": 1.5, "seed": 1}, {"top_k": 5, "temperature": 1.0}, {}, {}]
    wanted = [0, 3, 100, 1, None]
    params = [greedy(**{**change, "logprobs": num}) for change, num in zip(changes, wanted)]
    params[3] = greedy(logprobs=1, repetition_penalty=1.9, presence_penalty=1.0, min_tokens=3)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert "logprobs" not in outputs[4] and all("prompt_logprobs" not in output for output in outputs)
    for prompt, num, output in list(zip(prompts, wanted, outputs))[:4]:
        expected = hf_logprobs(hf_model, prompt + output["token_ids"])
        assert len(output["logprobs"]) == len(output["token_ids"]) == NUM_TOKENS
        for idx, (token_id, found) in enumerate(zip(output["token_ids"], output["logprobs"])):
            assert_logprobs(found, expected[len(prompt) - 1 + idx], token_id, num or 0)


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 48}, {"pad_batches": False}], ids=str)
def test_prompt_logprobs_are_those_of_transformers(
    make_llm: Callable[..., LLM], hf_model: Any, options: dict[str, Any]
) -> None:
    llm = make_llm(**options)
    prompts = random_prompts([1, 2, 19, 64, 99, 189], seed=71)
    params = [greedy(3, prompt_logprobs=num) for num in (0, 1, 5, 2, 3, 0)]
    plain = tokens(llm, prompts, greedy(3))
    outputs = llm.generate(prompts, params, use_tqdm=False)  # what is in the prefix cache must be computed again
    assert [output["token_ids"] for output in outputs] == plain
    for prompt, one, output in zip(prompts, params, outputs):
        expected = hf_logprobs(hf_model, prompt)
        assert len(output["prompt_logprobs"]) == len(prompt) and output["prompt_logprobs"][0] is None
        for idx in range(1, len(prompt)):
            assert_logprobs(output["prompt_logprobs"][idx], expected[idx - 1], prompt[idx], one.prompt_logprobs or 0)


def test_prompt_logprobs_in_graph_mode_beside_others(graph_llm: LLM, hf_model: Any) -> None:
    prompts = random_prompts([99, 40, 19], seed=72)
    outputs = graph_llm.generate(prompts, [greedy(), greedy(prompt_logprobs=2, logprobs=2), greedy()], use_tqdm=False)
    expected = hf_logprobs(hf_model, prompts[1])
    for idx in range(1, 40):
        assert_logprobs(outputs[1]["prompt_logprobs"][idx], expected[idx - 1], prompts[1][idx], 2)
    assert all("prompt_logprobs" not in outputs[idx] for idx in (0, 2))


def test_logprobs_survive_preemption(make_llm: Callable[..., LLM], hf_model: Any) -> None:
    llm = make_llm(num_kvcache_blocks=1 + 8, max_model_len=128)
    prompts = random_prompts([19, 20, 21, 22], seed=73)
    outputs = llm.generate(prompts, greedy(50, logprobs=2, prompt_logprobs=1), use_tqdm=False)
    assert llm.engine.scheduler.num_preemptions > 0
    for prompt, output in zip(prompts, outputs):
        expected = hf_logprobs(hf_model, prompt + output["token_ids"])
        for idx, (token_id, found) in enumerate(zip(output["token_ids"], output["logprobs"])):
            assert_logprobs(found, expected[len(prompt) - 1 + idx], token_id, 2)
        for idx in range(1, len(prompt)):
            assert_logprobs(output["prompt_logprobs"][idx], expected[idx - 1], prompt[idx], 1)


# requests by hand: add, step, abort ---------------------------------------------------------------------------------


def test_increments_add_up_to_the_completion(eager_llm: LLM, hf_generate: Generate) -> None:
    engine = eager_llm.engine
    (prompt, other) = random_prompts([19, 7], seed=80)
    steady, quiet = engine.add_request(prompt, greedy()), engine.add_request(other, greedy(), incremental=False)
    outputs: list[RequestOutput] = []
    while engine.has_unfinished:
        outputs += engine.step()
    mine = [output for output in outputs if output.request_id == steady]
    assert [len(output.token_ids) for output in mine] == [1] * NUM_TOKENS
    assert [output.finished for output in mine] == [False] * (NUM_TOKENS - 1) + [True]
    completion = mine[-1].completion
    assert completion is not None and completion.token_ids == hf_generate(prompt, NUM_TOKENS)
    assert completion.text == "".join(output.text for output in mine)
    (last,) = [output for output in outputs if output.request_id == quiet]
    assert last.completion is not None and last.completion.token_ids == hf_generate(other, NUM_TOKENS)


def test_step_without_work_returns_nothing(eager_llm: LLM) -> None:
    assert eager_llm.engine.step() == [] and not eager_llm.engine.has_unfinished


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 5, 9])
def test_abort_in_mid_flight(llm: LLM, hf_generate: Generate, num_steps: int) -> None:
    """Waiting, half prefilled or decoding: the request ends with what it has, and the others do not notice."""
    engine = llm.engine
    prompts = random_prompts([19, 200, 200, 33], seed=81)
    ids = [engine.add_request(prompt, greedy()) for prompt in prompts]
    done: dict[int, Completion] = {}
    for _ in range(num_steps):
        done.update({output.request_id: output.completion for output in engine.step() if output.completion})
    for request_id in (ids[1], ids[0], ids[1], 10**9):
        engine.abort(request_id)
    last = [output for output in engine.step() if output.completion]
    aborted = {output.request_id: output.completion for output in last if output.completion.finish_reason == "abort"}
    assert set(aborted) == {ids[0], ids[1]}
    for idx in (0, 1):
        found = aborted[ids[idx]].token_ids
        assert len(found) <= num_steps and found == hf_generate(prompts[idx], NUM_TOKENS)[: len(found)]
    done.update(drain(llm))
    for idx in (2, 3):
        assert done[ids[idx]].token_ids == hf_generate(prompts[idx], NUM_TOKENS)
    # what the aborted ones left in the prefix cache is right
    assert tokens(llm, prompts, greedy()) == [hf_generate(prompt, NUM_TOKENS) for prompt in prompts]


def test_abort_everything(llm: LLM) -> None:
    engine = llm.engine
    ids = [engine.add_request(prompt, greedy(50)) for prompt in random_prompts([5] * 45, seed=82)]
    for _ in range(4):
        engine.step()
    for request_id in ids:
        engine.abort(request_id)
    assert {reason.finish_reason for reason in drain(llm).values()} == {"abort"}


def test_generate_leaves_the_outputs_of_others_to_them(llm: LLM, hf_generate: Generate) -> None:
    """A request added by hand goes on while `generate` runs, ends there perhaps, and its outputs wait."""
    engine = llm.engine
    short, long, prompt = random_prompts([5, 9, 33], seed=83)
    ids = [engine.add_request(short, greedy(3)), engine.add_request(long, greedy(40))]
    assert tokens(llm, [prompt], greedy()) == [hf_generate(prompt, NUM_TOKENS)]
    found: dict[int, list[int]] = {request_id: [] for request_id in ids}
    while engine.has_unfinished:
        for output in engine.step():
            found[output.request_id] += output.token_ids
    assert found == {ids[0]: hf_generate(short, 3), ids[1]: hf_generate(long, 40)}


def test_two_streams_and_a_generate_between_them(llm: LLM, hf_generate: Generate) -> None:
    prompts = random_prompts([5, 9, 33, 40, 19], seed=84)
    first, second = llm.stream(prompts[:2], greedy(20)), llm.stream(prompts[2:4], greedy(9))
    found: list[list[int]] = [[], [], [], []]
    between = False
    for offset, stream in [(0, first), (2, second)] * 200:
        for piece in [next(stream, None)]:
            if piece is not None:
                found[offset + piece["index"]] += piece["token_ids"]
        if len(found[0]) == 4 and not between:
            between = True
            assert tokens(llm, prompts[4:], greedy()) == [hf_generate(prompts[4], NUM_TOKENS)]
    assert found == [hf_generate(prompt, num) for prompt, num in zip(prompts, (20, 20, 9, 9))] and between


def test_a_stream_closed_early_frees_everything(llm: LLM) -> None:
    prompts = random_prompts([5, 200, 200, 7], seed=85)
    for num in (0, 1, 6):
        stream = llm.stream(prompts, greedy(30))
        for _ in range(num):
            next(stream)
        stream.close()
        assert_all_free(llm)
    for _ in llm.stream(prompts, greedy(30)):
        break
    gc.collect()
    assert_all_free(llm)


def test_decode_goes_on_while_a_long_prompt_comes_in(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(max_num_batched_tokens=16)
    engine = llm.engine
    short, long = random_prompts([5, 160], seed=86)
    first = engine.add_request(short, greedy(60))
    while not engine.step():
        pass
    engine.add_request(long, greedy(2))
    arrivals = [step for step in range(20) for output in engine.step() if output.request_id == first]
    assert max(b - a for a, b in itertools.pairwise(arrivals)) <= 2
    drain(llm)


# interruptions ------------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupt_at(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str], None]:
    """Make the nth launch from now on break off, before or after it has done its work."""

    def arrange(nth: int, where: str) -> None:
        original, count = llm.engine.runner.launch, 0

        def launch(plan: PrefillPlan | DecodePlan) -> Any:
            nonlocal count
            count += 1
            if count != nth:
                return original(plan)
            if where == "after":
                original(plan)
            raise KeyboardInterrupt

        monkeypatch.setattr(llm.engine.runner, "launch", launch)

    return arrange


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("nth", [1, 2, 4, 9])
def test_ctrl_c_leaves_a_usable_engine(
    llm: LLM, hf_generate: Generate, interrupt_at: Callable[[int, str], None], nth: int, where: str
) -> None:
    """Every block is free, and no block is taken for cached that the broken step has not filled."""
    prompts = random_prompts([19, 99, 200, 64], seed=900 + nth)
    interrupt_at(nth, where)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompts, greedy(), use_tqdm=False)
    assert_all_free(llm)
    assert tokens(llm, prompts, greedy()) == [hf_generate(prompt, NUM_TOKENS) for prompt in prompts]


@pytest.mark.parametrize("nth", [1, 3, 6])
def test_requests_of_others_survive_an_interruption(
    llm: LLM, hf_generate: Generate, interrupt_at: Callable[[int, str], None], nth: int
) -> None:
    engine = llm.engine
    theirs, mine = random_prompts([40, 33], seed=91), random_prompts([50, 19], seed=92)
    params = greedy(20, repetition_penalty=1.0001)  # with state of its own on the device
    ids = [engine.add_request(prompt, params) for prompt in theirs]
    interrupt_at(nth, "after")
    with pytest.raises(KeyboardInterrupt):
        llm.generate(mine, greedy(), use_tqdm=False)
    found: dict[int, list[int]] = {request_id: [] for request_id in ids}
    while engine.has_unfinished:
        for output in engine.step():
            found[output.request_id] += output.token_ids
    assert list(found.values()) == [hf_generate(prompt, 20) for prompt in theirs]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
def test_ctrl_c_at_any_moment(llm: LLM, hf_generate: Generate) -> None:
    """A real SIGINT, at a different moment each time."""
    prompts = random_prompts([5, 99, 200, 33, 64, 1] * 5, seed=93)
    expected = [hf_generate(prompt, NUM_TOKENS) for prompt in prompts[:6]]
    previous = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    # a shell starts its background jobs with Ctrl-C ignored, and Python then leaves it so
    previous_int = signal.signal(signal.SIGINT, signal.default_int_handler)
    num_interrupted = 0
    try:
        for attempt in range(12):
            signal.setitimer(signal.ITIMER_REAL, 0.003 + 0.0071 * attempt)
            try:
                llm.generate(prompts, greedy(40), use_tqdm=False)
                signal.setitimer(signal.ITIMER_REAL, 0)  # in here, as the moment may be this one
            except KeyboardInterrupt:
                num_interrupted += 1
            assert_all_free(llm)
            assert tokens(llm, prompts[:6], greedy()) == expected
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        signal.signal(signal.SIGINT, previous_int)
    assert num_interrupted > 0


def test_an_error_on_the_device_leaves_a_usable_engine(
    eager_llm: LLM, hf_generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(plan: object) -> None:
        raise RuntimeError("out of memory")

    (prompt,) = random_prompts([33], seed=94)
    with monkeypatch.context() as patch:
        patch.setattr(eager_llm.engine.runner, "launch", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            eager_llm.generate([prompt], greedy(), use_tqdm=False)
    assert tokens(eager_llm, [prompt], greedy()) == [hf_generate(prompt, NUM_TOKENS)]


# several engines, and what is left of one ---------------------------------------------------------------------------


def test_two_engines_in_one_process(make_llm: Callable[..., LLM], llm: LLM, hf_generate: Generate) -> None:
    second = make_llm(kvcache_block_size=32, max_num_seqs=3, graph_batch_sizes=(2,))
    prompts = random_prompts([5, 40, 99, 19], seed=95)
    expected = [hf_generate(prompt, NUM_TOKENS) for prompt in prompts]
    assert tokens(second, prompts, greedy()) == expected == tokens(llm, prompts, greedy())
    found: list[list[list[int]]] = [[[] for _ in prompts] for _ in range(2)]
    streams: list[Iterator[dict[str, Any]]] = [one.stream(prompts, greedy()) for one in (llm, second)]
    for _ in range(len(prompts) * NUM_TOKENS):
        for answers, stream in zip(found, streams):
            piece = next(stream)
            answers[piece["index"]] += piece["token_ids"]
    assert [list(stream) for stream in streams] == [[], []]
    assert found == [expected, expected]
    del second
    assert tokens(llm, prompts, greedy()) == expected


@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graph"])
def test_nothing_is_left_after_del(make_llm: Callable[..., LLM], enforce_eager: bool) -> None:
    """Weights, cache and state die at once, without the garbage collector; no thread stays."""
    options = {"enforce_eager": enforce_eager, "graph_batch_sizes": (1, 5, 16)}
    (prompt,) = random_prompts([40], seed=96)
    params = [greedy(), greedy(logprobs=2, prompt_logprobs=1, top_k=5, presence_penalty=1.0)]
    make_llm(**options).generate([prompt] * 2, params, use_tqdm=False)  # helpers of the process come with the first
    gc.collect()
    threads = set(threading.enumerate())
    gc.disable()
    try:
        llm = make_llm(**options)
        llm.generate([prompt] * 2, params, use_tqdm=False)
        next(llm.stream([prompt], greedy()))
        runner = llm.engine.runner
        kept = [
            *(tensor for cache in runner.steps.caches for tensor in cache if tensor is not None),
            *(tensor for layer in runner.params.layers for tensor in layer if tensor is not None),
            runner.params.embed_VD,
            runner.cos_sin_MH,
            *runner.state,
            *(tensor for tensor in vars(runner.filtered).values() if isinstance(tensor, torch.Tensor)),
        ]
        refs = [weakref.ref(tensor) for tensor in kept]
        engine = weakref.ref(llm.engine)
        del kept, runner, llm
        assert [ref for ref in refs if ref() is not None] == []
        assert engine() is None
    finally:
        gc.enable()
    assert set(threading.enumerate()) <= threads


def used_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.memory_allocated()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def touch_cache(llm: LLM) -> None:
    for cache in llm.engine.runner.steps.caches:
        cache.k_CBKH.fill_(1)
        cache.v_CBKH.fill_(1)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
@pytest.mark.parametrize("how", ["del", "close"])
def test_memory_comes_back(make_llm: Callable[..., LLM], device: str, how: str) -> None:
    (prompt,) = random_prompts([40], seed=97)
    make_llm().close()
    before = used_bytes(device)
    for _ in range(2):
        # 64 MiB for each tensor: what is smaller, malloc may keep for itself
        llm = make_llm(num_kvcache_blocks=16_384)
        cache_bytes = 16_384 * llm.engine.runner.block_bytes
        touch_cache(llm)
        tokens(llm, [prompt], greedy())
        assert used_bytes(device) - before > 0.9 * cache_bytes
        if how == "close":
            llm.close()
        else:
            del llm
        assert used_bytes(device) - before < 0.25 * cache_bytes


def test_a_closed_model_says_so(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm()
    llm.close()
    llm.close()
    for use in (lambda: llm.generate([[5]], use_tqdm=False), lambda: next(llm.stream([[5]])), llm.engine.step):
        with pytest.raises(RuntimeError, match="closed"):
            use()


def test_eager_mode_captures_nothing_and_graph_mode_captures_every_bucket(
    make_llm: Callable[..., LLM], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = type(platforms.select(device))
    captured: list[object] = []
    capture = platform.capture

    def counted(self: Any, step: Callable[[], None]) -> Any:
        captured.append(step)
        return capture(self, step)

    monkeypatch.setattr(platform, "capture", counted)
    (prompt,) = random_prompts([5], seed=95)
    eager = make_llm(enforce_eager=True)
    eager.generate([prompt], greedy(4), use_tqdm=False)
    assert captured == []
    graph = make_llm(enforce_eager=False, graph_batch_sizes=[1, 4], max_num_seqs=4)
    layout = graph.engine.runner.layout
    assert len(captured) == len(layout.decode_rows) + len(layout.prefill_tokens)
    assert tokens(graph, [prompt], greedy(4)) == tokens(eager, [prompt], greedy(4))
