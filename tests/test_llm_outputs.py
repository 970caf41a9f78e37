"""Outputs read as dicts and as vLLM's objects."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
import torch

from nanovllm import LLM, CompletionOutput, RequestOutput, SamplingParams
from nanovllm.schedule.logprobs import Logprob
from tests.engines import greedy, random_prompts


def test_an_output_is_a_dict_and_an_object(eager_llm: LLM) -> None:
    outputs = eager_llm.generate(["the thin man", [7, 8, 9]], greedy(5), use_tqdm=False)
    for number, (output, prompt) in enumerate(zip(outputs, ("the thin man", None))):
        assert isinstance(output, RequestOutput) and isinstance(output, dict)
        assert output.request_id == str(number) and output.finished and output.prompt == prompt
        (answer,) = output.outputs
        assert isinstance(answer, CompletionOutput) and isinstance(answer, dict)
        assert answer.text == output["text"] == output.text and answer.finished()
        assert answer.token_ids == output["token_ids"] == output["outputs"][0]["token_ids"]
        assert (answer.index, answer.finish_reason, answer.stop_reason) == (0, "length", None)
        assert answer.logprobs is None is answer.cumulative_logprob
        assert output.prompt_logprobs is None and "logprobs" not in output
        assert json.loads(json.dumps(output)) == output == pickle.loads(pickle.dumps(output))
    assert outputs[1].prompt_token_ids == [7, 8, 9]
    with pytest.raises(AttributeError, match="RequestOutput has no 'texts'"):
        _ = outputs[0].texts


def test_token_ids_of_numpy_and_torch_are_python_numbers(eager_llm: LLM) -> None:
    given = [np.int64(7), torch.tensor(8), 9]
    (output,) = eager_llm.generate(prompt_token_ids=given, sampling_params=greedy(1))
    assert output.prompt_token_ids == [7, 8, 9]
    assert {type(token_id) for token_id in output.prompt_token_ids} == {int}


def test_logprobs_carry_value_rank_and_text(eager_llm: LLM) -> None:
    (prompt,) = random_prompts([9], seed=90)
    params = SamplingParams(
        temperature=3.0, seed=5, max_tokens=8, logprobs=3, prompt_logprobs=1, ignore_eos=True
    )
    (output,) = eager_llm.generate([prompt], params, use_tqdm=False)
    (answer,) = output.outputs
    total = 0.0
    for token_id, found in zip(answer.token_ids, answer.logprobs or ()):
        assert all(isinstance(one, Logprob) and isinstance(one, float) for one in found.values())
        assert [one.rank for one in found.values()][:3] == [1, 2, 3]
        chosen = found[token_id]
        assert chosen.logprob == chosen <= max(found.values()) and chosen.rank >= 1
        assert chosen.decoded_token == eager_llm.tokenizer.decode([token_id])
        total += chosen
    assert answer.cumulative_logprob == pytest.approx(total)
    assert any(found[t].rank > 3 for t, found in zip(answer.token_ids, answer.logprobs or ()))
    first, second = (output.prompt_logprobs or [])[:2]
    assert first is None and second is not None and second[prompt[1]].rank >= 1
    copied = pickle.loads(pickle.dumps(answer.logprobs))
    assert copied == answer.logprobs and [one.rank for one in copied[0].values()][:2] == [1, 2]
    assert json.loads(json.dumps(output["logprobs"][0]))


@pytest.mark.parametrize("mode", ["eager_llm", "graph_llm"])
def test_minus_one_reports_the_whole_vocabulary(mode: str, request: pytest.FixtureRequest) -> None:
    llm: LLM = request.getfixturevalue(mode)
    prompts = random_prompts([9, 9], seed=91)
    params = [greedy(3, logprobs=-1, prompt_logprobs=-1), greedy(3, logprobs=2)]
    one, two = llm.generate(prompts, params, use_tqdm=False)
    size = llm.engine.model_config.vocab_size
    for found in [*one["logprobs"], *one["prompt_logprobs"][1:]]:
        assert len(found) == size and math.isclose(
            sum(map(math.exp, found.values())), 1.0, rel_tol=1e-4
        )
        assert [value.rank for value in found.values()] == list(range(1, size + 1))
    assert all(len(found) == 2 for found in two["logprobs"])


def test_pieces_of_several_answers_are_told_apart(eager_llm: LLM) -> None:
    prompts = random_prompts([5, 7], seed=92)
    params = SamplingParams(temperature=2.0, seed=3, n=3, max_tokens=7, logprobs=1, ignore_eos=True)
    outputs = eager_llm.generate(prompts, params, use_tqdm=False)
    texts, tokens, logprobs = {}, {}, {}
    for piece in eager_llm.stream(prompts, params):
        key = piece.index, piece.output_index
        texts[key] = texts.get(key, "") + piece.text
        tokens[key] = tokens.get(key, []) + piece.token_ids
        logprobs[key] = logprobs.get(key, []) + (piece.logprobs or [])
    assert len(texts) == 6
    for prompt_idx, output in enumerate(outputs):
        for answer in output.outputs:
            key = prompt_idx, answer.index
            assert (texts[key], tokens[key]) == (answer.text, answer.token_ids)
            assert logprobs[key] == answer.logprobs


def test_the_reason_of_a_stop_is_named(eager_llm: LLM) -> None:
    (prompt,) = random_prompts([9], seed=93)
    (plain,) = eager_llm.generate([prompt], greedy(20), use_tqdm=False)
    token_id = plain["token_ids"][7]
    (output,) = eager_llm.generate([prompt], greedy(20, stop_token_ids=[token_id]), use_tqdm=False)
    assert output.outputs[0].stop_reason == token_id == output["token_ids"][-1]
    stop = plain["text"][6:9]
    for include in (False, True):
        params = greedy(20, stop=["zzz", stop], include_stop_str_in_output=include)
        (output,) = eager_llm.generate([prompt], params, use_tqdm=False)
        assert output.outputs[0].stop_reason == stop
        assert output["text"].endswith(stop) == include


@pytest.mark.parametrize("stop", [None, ["never there"]])
def test_the_text_has_the_stop_token_on_request_only(
    stop: list[str] | None, eager_llm: LLM
) -> None:
    (prompt,) = random_prompts([9], seed=93)
    (plain,) = eager_llm.generate([prompt], greedy(20), use_tqdm=False)
    token_id = plain["token_ids"][7]
    token_ids = plain["token_ids"][: plain["token_ids"].index(token_id) + 1]
    tokenizer = eager_llm.engine.tokenizer
    assert tokenizer is not None and tokenizer.decode([token_id])
    for include in (False, True):
        text = tokenizer.decode(token_ids if include else token_ids[:-1])
        params = greedy(
            20, stop=stop, stop_token_ids=[token_id], include_stop_str_in_output=include
        )
        (output,) = eager_llm.generate([prompt], params, use_tqdm=False)
        assert (output["text"], output["token_ids"]) == (text, token_ids)
        pieces = list(eager_llm.stream([prompt], params))
        assert "".join(piece.text for piece in pieces) == text
        assert [one for piece in pieces for one in piece.token_ids] == token_ids


def test_a_special_token_that_stops_is_not_shown(eager_llm: LLM) -> None:
    shown = greedy(4, logit_bias={3: 100}, stop_token_ids=[3], skip_special_tokens=False)
    (output,) = eager_llm.generate("the", shown, use_tqdm=False)
    assert "</s>" not in output["text"] and output["token_ids"][-1] == 3


def test_detokenize_false_leaves_out_the_text(eager_llm: LLM) -> None:
    params = greedy(5)
    (plain,) = eager_llm.generate("the", params, use_tqdm=False)
    params.detokenize = False
    (output,) = eager_llm.generate("the", params, use_tqdm=False)
    assert output["text"] == "" and output["token_ids"] == plain["token_ids"]
    assert all(piece.text == "" for piece in eager_llm.stream("the", params))


def test_special_tokens_are_shown_on_request(eager_llm: LLM) -> None:
    (plain,) = eager_llm.generate("the", greedy(4, allowed_token_ids=[3]), use_tqdm=False)
    shown = greedy(4, allowed_token_ids=[3], skip_special_tokens=False)
    (output,) = eager_llm.generate("the", shown, use_tqdm=False)
    assert plain["text"] == "" and output["text"] == "</s>" * 4
    assert "".join(piece.text for piece in eager_llm.stream("the", shown)) == "</s>" * 4
