"""Methods and options of `LLM`: defaults, tokenizers, priorities, metrics, beam search."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, BeamSearchParams, SamplingParams
from nanovllm.engine import metrics
from nanovllm.hub import resolve
from nanovllm.prompts import TokensPrompt
from tests.engines import (
    EOS_IDS,
    NUM_TOKENS,
    Generate,
    assert_all_free,
    greedy,
    random_prompts,
    tokens,
)


def copied(checkpoint: Path, folder: Path, *, without: str = "") -> Path:
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    if without:
        (folder / without).unlink()
    return folder


# sampling parameters ------------------------------------------------------------------------------


def test_requests_without_parameters_get_those_of_the_checkpoint(
    make_llm: Callable[..., LLM], checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied(checkpoint, tmp_path)
    content = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.75,
        "max_new_tokens": 6,
        "do_sample": True,
    }
    (folder / "generation_config.json").write_text(json.dumps(content))
    options = {"enforce_eager": True, "max_model_len": 64, "num_kvcache_blocks": 20}
    llm = LLM(folder, **options)
    expected = SamplingParams(temperature=0.5, top_k=7, top_p=0.75, max_tokens=6)
    assert llm.get_default_sampling_params() == expected
    with caplog.at_level(logging.INFO, "nanovllm"):
        (output,) = llm.generate([7, 8], use_tqdm=False)
    assert len(output["token_ids"]) <= 6 and "using generation_config.json's" in caplog.text
    llm.close()
    llm = LLM(folder, generation_config="vllm", **options)
    assert llm.get_default_sampling_params() == SamplingParams()


def test_max_tokens_none_is_the_models_limit(eager_llm: LLM) -> None:
    (prompt,) = random_prompts([9], seed=100)
    (output,) = eager_llm.generate([prompt], greedy(5, max_tokens=None), use_tqdm=False)
    assert len(output["token_ids"]) == 256 - 9 and output["finish_reason"] == "length"


def test_prompts_are_truncated_on_the_left(eager_llm: LLM) -> None:
    (prompt,) = random_prompts([40], seed=101)
    expected = tokens(eager_llm, [prompt[-9:]], greedy())
    assert tokens(eager_llm, [prompt], greedy(truncate_prompt_tokens=9)) == expected
    (long,) = random_prompts([1000], seed=102)
    expected = tokens(eager_llm, [long[-255:]], greedy(1))
    assert tokens(eager_llm, [long], greedy(1, truncate_prompt_tokens=-1)) == expected


@pytest.mark.parametrize("mode", ["eager_llm", "graph_llm"])
def test_bias_allowed_tokens_and_bad_words(mode: str, request: pytest.FixtureRequest) -> None:
    llm: LLM = request.getfixturevalue(mode)
    prompts = random_prompts([9] * 4, seed=103)
    plain = llm.generate(prompts, greedy(), use_tqdm=False)
    first = plain[0]["token_ids"][0]
    letters = llm.tokenizer.encode("bcdfgjklmpqsuvwxyz", add_special_tokens=False)
    (lettered,) = llm.generate([prompts[3]], greedy(allowed_token_ids=letters), use_tqdm=False)
    word = lettered["text"][4:7]
    params = [
        greedy(logit_bias={first: -100}), greedy(logit_bias={9: 100}),
        greedy(allowed_token_ids=[20, 21]),
        greedy(allowed_token_ids=letters, bad_words=[word]),
    ]  # fmt: skip
    changed = llm.generate(prompts, params, use_tqdm=False)
    assert first not in changed[0]["token_ids"] and set(changed[1]["token_ids"]) == {9}
    assert set(changed[2]["token_ids"]) <= {20, 21}
    assert word not in changed[3]["text"] and len(changed[3]["text"]) == NUM_TOKENS
    assert changed[3]["text"][:6] == lettered["text"][:6]
    assert tokens(llm, prompts, greedy()) == [output["token_ids"] for output in plain]


def test_bias_and_allowed_tokens_outside_the_vocabulary_are_refused(eager_llm: LLM) -> None:
    for name, value in (("logit_bias", {512: 1.0}), ("allowed_token_ids", [5, 512])):
        with pytest.raises(ValueError, match=f"{name} holds token id 512: .* 0 … 511"):
            eager_llm.generate([[5]], greedy(**{name: value}), use_tqdm=False)
    assert_all_free(eager_llm)


# tokenizers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", [None, {"do_sample": True}, {"eos_token_id": 3}], ids=str)
def test_the_tokenizers_eos_ends_an_answer_beside_those_of_configs(
    generation: dict[str, Any] | None, checkpoint: Path, tmp_path: Path, eager_llm: LLM
) -> None:
    """config.json names 3; the tokenizer another id. A base model's generation_config.json may lie
    beside the tokenizer of a chat model."""
    folder = copied(checkpoint, tmp_path, without="generation_config.json")
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["eos_token"] = "<end>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    end = eager_llm.tokenizer.convert_tokens_to_ids("<end>")
    assert end == EOS_IDS[1]
    for _ in range(2):  # a cold and a warm start
        llm = LLM(folder, enforce_eager=True, max_model_len=64, num_kvcache_blocks=20)
        params = SamplingParams(temperature=0, max_tokens=5, logit_bias={end: 100})
        (output,) = llm.generate([7, 8], params, use_tqdm=False)
        assert output["token_ids"] == [end] and output["finish_reason"] == "stop"
        assert llm.engine.eos_ids == {3, end}
        llm.close()


def test_the_tokenizer_is_transformers_own(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm()
    tokenizer = llm.get_tokenizer()
    assert tokenizer is llm.tokenizer and tokenizer("the")["input_ids"]
    tokenizer.chat_template = "{{ messages[0].content }}?"
    (output,) = llm.chat([{"role": "user", "content": "the"}], greedy(2), use_tqdm=False)
    assert output.prompt == "the?"
    for wrong in (None, "gpt2"):
        with pytest.raises(ValueError, match=f"the tokenizer is {wrong!r}"):
            llm.set_tokenizer(wrong)
    assert llm.tokenizer is tokenizer
    other = type("Other", (), {"encode": lambda self, text, **_: [9, 9], "decode": str})()
    llm.set_tokenizer(other)
    assert llm.generate("x", greedy(1, detokenize=False))[0].prompt_token_ids == [9, 9]


def test_another_tokenizer_or_none(make_llm: Callable[..., LLM], checkpoint: Path) -> None:
    embedded = resolve("tiny-qwen3")
    llm = make_llm(tokenizer=str(embedded))
    assert llm.tokenizer.eos_token_id != make_llm().tokenizer.eos_token_id
    llm = make_llm(skip_tokenizer_init=True)
    assert llm.tokenizer is None and llm.get_tokenizer() is None
    (output,) = llm.generate([7, 8], greedy(3), use_tqdm=False)
    assert output["text"] == "" and len(output["token_ids"]) == 3
    with pytest.raises(ValueError, match="no tokenizer: give token ids"):
        llm.generate("x", use_tqdm=False)


# the engine ---------------------------------------------------------------------------------------


def test_requests_of_lower_priority_numbers_run_first(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(max_num_seqs=1)
    prompts = random_prompts([5] * 5, seed=104)
    priorities = [3, 1, 2, 1, 3]
    order = [
        piece.index
        for piece in llm.stream(prompts, greedy(3), priority=priorities)
        if piece.finish_reason
    ]
    assert order == [1, 3, 2, 0, 4]
    expected = tokens(llm, prompts, greedy(3))
    outputs = llm.generate(prompts, greedy(3), use_tqdm=False, priority=priorities)
    assert [output["token_ids"] for output in outputs] == expected
    with pytest.raises(ValueError, match="2 priorities for 5 prompts"):
        llm.generate(prompts, greedy(3), use_tqdm=False, priority=[1, 2])
    for wrong in ("high", 2**63):
        with pytest.raises(ValueError, match=f"priority is {wrong!r}: it must be a whole number"):
            llm.generate([[5]], greedy(3), use_tqdm=False, priority=[wrong])


def test_preemption_takes_the_lowest_priority_first(make_llm: Callable[..., LLM]) -> None:
    prompts = random_prompts([30, 30, 30], seed=105)
    expected = tokens(make_llm(), prompts, greedy(60))
    llm = make_llm(num_kvcache_blocks=1 + 14, max_model_len=128)
    ended = [
        piece.index
        for piece in llm.stream(prompts, greedy(60), priority=[5, 1, 1])
        if piece.finish_reason
    ]
    assert llm.engine.scheduler.num_preemptions > 0 and ended[-1] == 0
    outputs = llm.generate(prompts, greedy(60), use_tqdm=False, priority=[5, 1, 1])
    assert [output["token_ids"] for output in outputs] == expected


def test_the_prefix_cache_can_be_forgotten_and_salted(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm()
    (prompt,) = random_prompts([64], seed=106)

    def cached(given: Any) -> int:
        return llm.generate(given, greedy(2), use_tqdm=False)[0].num_cached_tokens

    assert [cached(prompt), cached(prompt)] == [0, 48]
    assert llm.reset_prefix_cache() is True
    assert [cached(prompt), cached(prompt)] == [0, 48]
    salted: dict[str, Any] = {"prompt_token_ids": prompt, "cache_salt": "one"}
    assert [cached(salted), cached(salted), cached({**salted, "cache_salt": "two"})] == [0, 48, 0]


def test_metrics_count(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm()

    def read() -> dict[str, float]:
        return {
            metric.name.removeprefix("nanovllm:") + "".join(metric.labels.values()): metric.value
            for metric in llm.get_metrics()
        }

    assert set(read().values()) == {0}
    prompts = random_prompts([32, 5], seed=107)
    llm.generate([*prompts, prompts[0]], greedy(4), use_tqdm=False)
    stream = llm.stream(prompts, greedy(9))
    next(stream)
    found = read()
    assert found["prompt_tokens"] == 32 + 5 + 32 + 37 == found["prefix_cache_query_tokens"]
    assert 12 < found["generation_tokens"] <= 12 + 9, "of requests that run, too"
    assert found["request_successlength"] == 3 and found["num_requests_running"] == 2
    assert 0 < found["kv_cache_usage_perc"] < 1 and found["num_steps"] >= 5
    stream.close()
    assert read()["request_successabort"] == 2 and read()["num_requests_running"] == 0
    assert read()["generation_tokens"] >= found["generation_tokens"]


def test_statistics_are_logged_on_request(
    make_llm: Callable[..., LLM], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "LOG_EVERY_S", 0.0)
    prompts = random_prompts([5] * 3, seed=111)
    with caplog.at_level(logging.INFO, "nanovllm.engine.metrics"):
        make_llm().generate(prompts, greedy(3), use_tqdm=False)
        assert "tokens/s" not in caplog.text
        make_llm(disable_log_stats=False).generate(prompts, greedy(3), use_tqdm=False)
    assert "generated tokens/s, 3 running, 0 waiting" in caplog.text


@pytest.mark.parametrize("name", ["encode", "embed", "classify", "reward", "score"])
def test_a_model_that_generates_does_not_pool(eager_llm: LLM, name: str) -> None:
    texts = ["text"] * (2 if name == "score" else 1)
    with pytest.raises(ValueError, match="was loaded to generate: load it with task='embed'"):
        getattr(eager_llm, name)(*texts)


def test_progress_can_be_any_function(eager_llm: LLM) -> None:
    calls: list[Any] = []

    class Bar:
        format_dict = {"elapsed": 1.0}  # noqa: RUF012 (tqdm has the same)

        def __init__(self, **options: Any) -> None:
            calls.append(options["total"])

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            calls.append("closed")

        def update(self) -> None:
            calls.append("update")

        def set_postfix_str(self, text: str) -> None:
            pass

    eager_llm.generate([[5], [6]], greedy(2), use_tqdm=Bar)
    assert calls == [2, "update", "update", "closed"]


# beam search --------------------------------------------------------------------------------------


def brute_force(hf_model: Any, prompt: list[int], width: int, num: int) -> list[list[int]]:
    """Beam search with transformers' logits, written out."""
    beams: list[tuple[float, list[int]]] = [(0.0, prompt)]
    for _ in range(num):
        grown = []
        for total, ids in beams:
            with torch.no_grad():
                logits = hf_model(torch.tensor([ids], device=hf_model.device)).logits[0, -1]
            found = logits.double().log_softmax(-1).topk(2 * width)
            pairs = zip(found.values.tolist(), found.indices.tolist())
            grown += [(total + value, [*ids, token_id]) for value, token_id in pairs]
        beams = sorted(grown, key=lambda beam: beam[0] / len(beam[1]), reverse=True)[:width]
    return [ids for _, ids in beams]


def test_beam_search_is_that_of_the_formula(eager_llm: LLM, hf_model: Any) -> None:
    prompts = random_prompts([5, 9], seed=108)
    params = BeamSearchParams(beam_width=3, max_tokens=4, ignore_eos=True)
    outputs = eager_llm.beam_search(prompts, params)
    for prompt, output in zip(prompts, outputs):
        found = [sequence.tokens for sequence in output.sequences]
        assert found == brute_force(hf_model, prompt, 3, 4)
        best = output.sequences[0]
        assert best.text == eager_llm.tokenizer.decode(best.tokens)
        assert best.orig_prompt == {"prompt_token_ids": prompt} and best.lora_request is None
        assert len(best.logprobs) == 4 and best.finish_reason == "length"
        chosen = [one[t] for one, t in zip(best.logprobs, best.tokens[len(prompt) :])]
        assert best.cum_logprob == pytest.approx(sum(chosen))
    assert_all_free(eager_llm)


def test_one_beam_is_greedy_and_beams_end_at_eos(eager_llm: LLM, hf_generate: Generate) -> None:
    prompts = random_prompts([7, 8], seed=109)
    params = BeamSearchParams(beam_width=1, max_tokens=6, ignore_eos=True)
    for prompt, output in zip(prompts, eager_llm.beam_search(prompts, params)):
        assert output.sequences[0].tokens == prompt + hf_generate(prompt, 6)
    wide = BeamSearchParams(beam_width=40, max_tokens=12)
    (output,) = eager_llm.beam_search(prompts[0], wide)
    ended = [one for one in output.sequences if one.finish_reason == "stop"]
    assert ended and not any(set(one.tokens[7:-1]) & set(EOS_IDS) for one in output.sequences)
    for one in output.sequences:
        has_ended = one.tokens[-1] in EOS_IDS
        assert (one.finish_reason, one.stop_reason) == (
            ("stop", one.tokens[-1]) if has_ended else ("length", None)
        )
        assert len(one.tokens) == 7 + len(one.logprobs)
        assert one.text == eager_llm.tokenizer.decode(one.tokens), "with the text of the end"
    with pytest.raises(ValueError, match="beam_width is 51: it must be at least 1, at most 50"):
        BeamSearchParams(beam_width=51, max_tokens=1)
    with pytest.raises(ValueError, match=r"length_penalty is -300.0: .* in \[-10, 10\]"):
        BeamSearchParams(beam_width=1, max_tokens=1, length_penalty=-300)
    with pytest.raises(ValueError, match="it must be BeamSearchParams"):
        eager_llm.beam_search(prompts, SamplingParams())  # type: ignore[arg-type]


def test_beams_end_at_the_limit_of_their_own_prompt(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(max_model_len=32)
    prompts = random_prompts([20, 30], seed=93)
    params = BeamSearchParams(beam_width=2, max_tokens=6, ignore_eos=True)
    together = llm.beam_search(prompts, params)
    assert [len(one.sequences[0].tokens) for one in together] == [26, 32]
    for prompt, output in zip(prompts, together):
        (alone,) = llm.beam_search([prompt], params)
        assert [one.tokens for one in output.sequences] == [one.tokens for one in alone.sequences]


def test_beams_share_blocks_with_prompts_of_the_same_salt_only(eager_llm: LLM) -> None:
    (prompt,) = random_prompts([60], seed=1094)
    salted: TokensPrompt = {"prompt_token_ids": prompt, "cache_salt": "a"}
    (output,) = eager_llm.beam_search(salted, BeamSearchParams(beam_width=2, max_tokens=3))
    assert output.sequences[0].orig_prompt == salted
    plain, again = eager_llm.generate([{"prompt_token_ids": prompt}, salted], greedy(1))
    assert not plain.num_cached_tokens and again.num_cached_tokens


def test_priorities_must_be_a_list(eager_llm: LLM) -> None:
    with pytest.raises(ValueError, match="the priorities are 5: give a list"):
        eager_llm.generate(["a"], priority=5)  # type: ignore[arg-type]


def test_a_bad_word_must_be_unicode(eager_llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"bad_words has .* half of a surrogate pair"):
        eager_llm.generate("a", SamplingParams(bad_words=["\ud83d"]), use_tqdm=False)
