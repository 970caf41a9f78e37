"""Decoders that pool against transformers: embeddings, classes, rewards, and a reranker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm import LLM, PoolingParams, pairs
from tests.engines import random_prompts
from tests.pooling.pooling_cases import (
    LENGTHS,
    MAX_LEN,
    assert_near,
    embeddings,
    hidden,
    logits,
    pooling_llm,
    save_decoder,
    unit,
    write_modules,
)

PROMPTS = random_prompts(LENGTHS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("embedding")


@pytest.fixture(scope="module")
def hf(folder: Path) -> Any:
    return save_decoder(folder, head="")  # tensors have no prefix, as those of Qwen3-Embedding


@pytest.fixture(scope="module")
def llm(folder: Path, hf: Any) -> Iterator[LLM]:
    llm = pooling_llm(folder)
    yield llm
    llm.close()


def last(hf: Any) -> list[Tensor]:
    return [unit(hidden(hf, prompt)[-1]) for prompt in PROMPTS]


def test_embeddings_are_the_normalized_state_of_the_last_token(llm: LLM, hf: Any) -> None:
    assert_near(embeddings(llm, PROMPTS), last(hf))


def test_graphs_give_the_embeddings_of_transformers(folder: Path, hf: Any) -> None:
    llm = pooling_llm(folder, enforce_eager=False, max_num_batched_tokens=128)
    assert_near(embeddings(llm, PROMPTS), last(hf))
    llm.close()


def test_order_and_company_change_only_rounding(llm: LLM) -> None:
    alone = [embeddings(llm, [prompt])[0] for prompt in PROMPTS]
    assert_near(embeddings(llm, PROMPTS[::-1]), alone[::-1], atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gemma3_text"])
def test_other_families_embed(kind: str, tmp_path: Path) -> None:
    model = save_decoder(tmp_path, kind)
    llm = pooling_llm(tmp_path)
    assert_near(embeddings(llm, PROMPTS), last(model))
    llm.close()


@pytest.mark.parametrize(("mode", "normalize"), [("mean", True), ("cls", False)])
def test_files_of_sentence_transformers_choose_the_pooling(
    mode: str, normalize: bool, folder: Path, hf: Any, tmp_path: Path
) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    name = "pooling_mode_mean_tokens" if mode == "mean" else "pooling_mode_cls_token"
    write_modules(tmp_path, name, normalize=normalize)
    wanted = []
    for prompt in PROMPTS:
        states = hidden(hf, prompt)
        state = states.mean(0) if mode == "mean" else states[0]
        wanted.append(unit(state) if normalize else state)
    llm = pooling_llm(tmp_path)
    assert_near(embeddings(llm, PROMPTS), wanted)
    llm.close()


def test_dimensions_are_cut_before_the_length_becomes_one(llm: LLM, hf: Any) -> None:
    found = embeddings(llm, PROMPTS, pooling_params=PoolingParams(dimensions=17))
    assert_near(found, [unit(hidden(hf, prompt)[-1][:17]) for prompt in PROMPTS])


def test_a_request_can_leave_embeddings_as_they_are(llm: LLM, hf: Any) -> None:
    found = llm.encode(PROMPTS[:2], PoolingParams(normalize=False), use_tqdm=False)
    assert_near([one.outputs.data for one in found], [hidden(hf, one)[-1] for one in PROMPTS[:2]])


def test_score_is_the_cosine_of_two_embeddings(llm: LLM) -> None:
    texts = ["the cat", "a cat", "an error on the ban"]
    a, *others = embeddings(llm, texts)
    found = llm.score(texts[0], texts[1:], use_tqdm=False)
    assert [one.outputs.score for one in found] == pytest.approx([float(a @ b) for b in others])


def test_a_text_is_truncated_at_its_end_if_that_is_asked(llm: LLM) -> None:
    text = "x" * (MAX_LEN + 1)
    with pytest.raises(ValueError, match=f"{MAX_LEN + 1} tokens: at most max_model_len"):
        llm.embed(text, use_tqdm=False)
    whole = embeddings(llm, text, truncate_prompt_tokens=-1)
    assert_near(whole, embeddings(llm, "x" * MAX_LEN))
    assert_near(embeddings(llm, "abcdef", truncate_prompt_tokens=2), embeddings(llm, "ab"))


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ([512], {}, "token id 512 is outside the vocabulary"),
        ("a", {"dimensions": 65}, "dimensions is 65: embeddings of this model have 64"),
        ("a", {"dimensions": 0}, "dimensions is 0: it must be a whole number, at least 1"),
        ("a", {"truncate_prompt_tokens": 129}, "truncate_prompt_tokens is 129: .* at most 128"),
        ("a", {"task": "classify"}, "the call is for 'embed'"),
    ],
)
def test_what_cannot_be_pooled_is_refused(
    prompt: Any, params: dict[str, Any], message: str, llm: LLM
) -> None:
    with pytest.raises(ValueError, match=message):
        llm.embed([prompt] if isinstance(prompt, str) else {"prompt_token_ids": prompt},
                  pooling_params=PoolingParams(**params), use_tqdm=False)  # fmt: skip
    assert not llm.engine.has_unfinished  # type: ignore[attr-defined]


def test_a_model_that_pools_does_not_generate(llm: LLM) -> None:
    with pytest.raises(ValueError, match="generating needs task='generate'"):
        llm.generate("a", use_tqdm=False)
    with pytest.raises(ValueError, match="this model makes embeddings"):
        llm.classify("a", use_tqdm=False)


def test_an_aborted_prompt_has_no_result(llm: LLM) -> None:
    engine: Any = llm.engine
    first, second = (engine.add_request(one, PoolingParams()) for one in PROMPTS[:2])
    engine.abort(first)
    done = {one.request_id: one.completion for _ in range(2) for one in engine.step()}
    assert done[first].finish_reason == "abort" and done[first].pooled is None
    assert done[second].pooled is not None and not engine.has_unfinished


def test_a_step_that_has_room_left_takes_a_later_prompt(llm: LLM) -> None:
    engine: Any = llm.engine
    before = engine.metrics.num_steps
    prompts = random_prompts([100, 100, 50, 60])  # a step takes 160 tokens
    found = embeddings(llm, prompts)
    assert engine.metrics.num_steps - before == 2
    assert_near(found, [embeddings(llm, [one])[0] for one in prompts], atol=1e-6)


@pytest.mark.parametrize("num_labels", [1, 3])
def test_classes_are_those_of_transformers(num_labels: int, tmp_path: Path) -> None:
    hf = save_decoder(
        tmp_path, head="SequenceClassification", num_labels=num_labels, pad_token_id=0
    )
    llm = pooling_llm(tmp_path, "classify")
    raw = [logits(hf, prompt) for prompt in PROMPTS]
    wanted = [one.sigmoid() if num_labels == 1 else one.softmax(-1) for one in raw]
    found = llm.classify(PROMPTS, use_tqdm=False)
    assert_near([torch.tensor(one.outputs.probs) for one in found], wanted)
    rewards = llm.reward(PROMPTS, use_tqdm=False)
    assert_near([one.outputs.data for one in rewards], raw)
    llm.close()


def test_a_reranker_compares_two_tokens_in_the_published_prompt(tmp_path: Path) -> None:
    hf = save_decoder(tmp_path, max_position_embeddings=1024)
    labels = {"hf_overrides": {"classifier_from_token": ["a", "b"]}}
    llm = pooling_llm(tmp_path, "score", max_model_len=1024, **labels)
    assert llm.engine.tokenizer is not None
    query, document = "the cat", "an error"
    prompt = llm.engine.tokenizer.encode(query + document)
    no, yes = (llm.engine.tokenizer.encode(one)[0] for one in "ab")
    with torch.no_grad():
        both = hf(torch.tensor([prompt])).logits[0, -1, [no, yes]]
    (found,) = llm.score(query, document, use_tqdm=False)
    assert found.outputs.score == pytest.approx(float(both.softmax(-1)[1]), abs=1e-5)
    llm.close()


def test_the_prompt_of_the_reranker_is_the_published_one() -> None:
    from nanovllm.pooling_params import PoolingInfo

    info = PoolingInfo("classify", 1, template="qwen3")
    found = pairs.pair_prompt(info, None, "q", "d").text
    assert found == (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query "
        'and the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
        "<|im_start|>user\n<Instruct>: Given a web search query, retrieve relevant passages that "
        "answer the query\n<Query>: q\n<Document>: d<|im_end|>\n<|im_start|>assistant\n<think>\n\n"
        "</think>\n\n"
    )


def test_a_model_without_a_head_does_not_classify(folder: Path, hf: Any) -> None:
    with pytest.raises(ValueError, match="Qwen3Model has no head of classes"):
        pooling_llm(folder, "classify")


def test_the_model_alone_does_not_generate(folder: Path, hf: Any) -> None:
    with pytest.raises(ValueError, match="Qwen3Model does not generate text: set task="):
        LLM(str(folder), device="cpu", enforce_eager=True)
