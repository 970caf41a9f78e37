"""End-of-sequence ids, stop strings, stop tokens and limits end an answer, streamed or not."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from nanovllm import LLM, SamplingParams
from tests.engines import EOS_IDS, VOCAB_SIZE, Generate, greedy, random_prompts, tokens


def find_answer(
    llm: LLM, is_wanted: Callable[[list[int]], bool], num_tokens: int = 60
) -> tuple[list[int], int, list[int]]:
    """(prompt, seed, tokens) of a sampled answer for which `is_wanted` is true."""
    (prompt,) = random_prompts([5], seed=60)
    params = [
        SamplingParams(temperature=2.0, max_tokens=num_tokens, seed=s, ignore_eos=True)
        for s in range(200)
    ]
    for seed, answer in enumerate(tokens(llm, [prompt] * 200, params)):
        if is_wanted(answer):
            return prompt, seed, answer
    raise AssertionError("no such answer among 200")


@pytest.mark.parametrize("eos_id", EOS_IDS)
def test_every_eos_id_of_the_generation_config_ends_an_answer(eager_llm: LLM, eos_id: int) -> None:
    (other,) = set(EOS_IDS) - {eos_id}
    prompt, seed, answer = find_answer(
        eager_llm, lambda ids: eos_id in ids[5:] and other not in ids
    )
    end = answer.index(eos_id) + 1
    params = SamplingParams(temperature=2.0, max_tokens=60, seed=seed)
    (output,) = eager_llm.generate([prompt], params, use_tqdm=False)
    assert output["token_ids"] == answer[:end] and output["finish_reason"] == "stop"
    assert output["text"] == eager_llm.tokenizer.decode(answer[: end - 1], skip_special_tokens=True)


def test_ignore_eos_and_max_tokens(eager_llm: LLM) -> None:
    prompt, seed, answer = find_answer(eager_llm, lambda ids: EOS_IDS[0] in ids)
    (output,) = eager_llm.generate(
        [prompt],
        SamplingParams(temperature=2.0, max_tokens=60, seed=seed, ignore_eos=True),
        use_tqdm=False,
    )
    assert (
        output["token_ids"] == answer and output["finish_reason"] == "length" and len(answer) == 60
    )


def test_stop_token_ids_end_an_answer_with_or_without_ignore_eos(
    llm: LLM, hf_generate: Generate
) -> None:
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
        SamplingParams(
            temperature=1.5,
            max_tokens=30,
            min_tokens=min_tokens,
            seed=seed,
            stop_token_ids=stop_ids,
        )
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
        assert any(len(output["token_ids"]) == min_tokens + 1 for output in outputs), (
            "the next one may end it"
        )


def test_stop_strings_across_tokens(llm: LLM) -> None:
    """Answers of a random model are random text: any part across tokens can be a stop string."""
    prompts = random_prompts([19, 33, 40], seed=63)
    full = llm.generate(prompts, greedy(40), use_tqdm=False)
    stops = [
        next(found[0] for found in re.finditer(r">[^\ufffd]{3,5}", output["text"][5:]))
        for output in full
    ]
    outputs = llm.generate(prompts, [greedy(40, stop=stop) for stop in stops], use_tqdm=False)
    for output, whole, stop in zip(outputs, full, stops):
        assert (
            output["text"] == whole["text"][: whole["text"].index(stop)]
            and stop not in output["text"]
        )
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


def test_a_stop_string_within_min_tokens_ends_nothing(llm: LLM) -> None:
    """It ends an answer whose next token completes it, even if it begins within them."""
    (prompt,) = random_prompts([19], seed=63)
    (whole,) = llm.generate([prompt], greedy(40), use_tqdm=False)
    texts = [llm.tokenizer.decode([one]) for one in whole["token_ids"]]
    place = next(
        place for place in range(3, 40)
        if texts[place].startswith("<filler") and texts.count(texts[place]) == 1
    )  # fmt: skip
    across = texts[place - 1][-1] + texts[place]
    for stop in (texts[place], across):
        params = [greedy(40, stop=stop, min_tokens=num) for num in (place, place + 1)]
        early, late = llm.generate([prompt] * 2, params, use_tqdm=False)
        assert early["token_ids"] == whole["token_ids"][: place + 1]
        assert early["text"] == whole["text"][: whole["text"].index(stop)]
        assert late["token_ids"] == whole["token_ids"] and late["text"] == whole["text"]


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
