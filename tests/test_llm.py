"""`LLM` with the embedded model: prompts of every kind, chat, streams."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tqdm import tqdm

import nanovllm
from nanovllm import LLM, SamplingParams, progress

GREEDY = SamplingParams(temperature=0, max_tokens=24)
QUESTIONS = ["What is 37 + 45?", "Sort 9 2 7.", "Reverse the word lamp.", "Who are you?"]


def conversation(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


@pytest.fixture(scope="module")
def loaded() -> Iterator[LLM]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more threads do not make so small a model faster
    llm = LLM("tiny-qwen3", dtype="float32", enforce_eager=True, max_num_seqs=8, max_model_len=256)
    yield llm
    llm.close()
    torch.set_num_threads(num_threads)


@pytest.fixture
def llm(loaded: LLM) -> Iterator[LLM]:
    yield loaded
    pool = loaded.engine.scheduler.cache.pool
    assert not loaded.engine.has_unfinished and pool.num_free == pool.num_blocks - 1


def texts(outputs: list[dict[str, Any]]) -> list[str]:
    return [output["text"] for output in outputs]


def test_public_names() -> None:
    assert set(nanovllm.__all__) == {
        "LLM", "AsyncLLM", "AsyncLLMEngine", "LLMEngine", "AsyncEngineArgs", "EngineArgs",
        "EngineConfig", "SamplingParams", "LoRARequest",
        "BeamSearchParams", "RequestOutputKind", "RequestOutput", "CompletionOutput", "TextPrompt",
        "TokensPrompt", "print_attention_backend_info",
        "PoolingParams", "PoolingOutput", "PoolingRequestOutput", "EmbeddingOutput",
        "EmbeddingRequestOutput", "ClassificationOutput", "ClassificationRequestOutput",
        "ScoringOutput", "ScoringRequestOutput",
    }  # fmt: skip
    assert all(hasattr(nanovllm, name) for name in nanovllm.__all__)


def test_the_embedded_model_answers(llm: LLM) -> None:
    outputs = llm.chat(
        [conversation(question) for question in QUESTIONS[:2]], GREEDY, use_tqdm=False
    )
    assert "82" in outputs[0]["text"] and "2, 7, 9" in outputs[1]["text"]
    assert [output["finish_reason"] for output in outputs] == ["stop", "stop"]


def test_one_prompt_or_several_of_every_kind(llm: LLM) -> None:
    text = "The word"
    ids = llm.tokenizer.encode(text)
    (single,) = llm.generate(text, GREEDY, use_tqdm=False)
    assert llm.generate(ids, GREEDY, use_tqdm=False)[0]["token_ids"] == single["token_ids"]
    mixed = llm.generate([text, ids, "Sort"], GREEDY, use_tqdm=False)
    assert [output["token_ids"] for output in mixed[:2]] == [single["token_ids"]] * 2
    assert single["num_prompt_tokens"] == len(ids) == mixed[1]["num_prompt_tokens"]
    assert set(single) == {
        "text", "token_ids", "finish_reason", "num_prompt_tokens", "num_cached_tokens",
        "request_id", "prompt", "prompt_token_ids", "finished", "outputs",
    }  # fmt: skip


def test_chat_of_one_conversation_is_chat_of_a_list(llm: LLM) -> None:
    one = llm.chat(conversation(QUESTIONS[0]), GREEDY, use_tqdm=False)
    assert texts(one) == texts(llm.chat([conversation(QUESTIONS[0])], GREEDY, use_tqdm=False))


def test_chat_prompts_are_the_checkpoints_template(llm: LLM) -> None:
    (ids,) = llm.chat_prompts(conversation("Hi"))
    assert llm.tokenizer.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_params_per_prompt_and_default_params(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=num) for num in (1, 5, 2)]
    outputs = llm.generate(["a", "b", "c"], params, use_tqdm=False)
    assert [len(output["token_ids"]) for output in outputs] == [1, 5, 2]
    assert {output["finish_reason"] for output in outputs} == {"length"}
    assert len(llm.generate("a", use_tqdm=False)[0]["token_ids"]) <= 64


def test_answers_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=1 + (7 * i) % 23) for i in range(19)]
    outputs = llm.generate([str(i) for i in range(19)], params, use_tqdm=False)
    alone = [llm.generate(str(i), params[i], use_tqdm=False)[0] for i in (0, 5, 18)]
    assert [outputs[i]["token_ids"] for i in (0, 5, 18)] == [
        output["token_ids"] for output in alone
    ]


def test_n_answers(llm: LLM) -> None:
    params = SamplingParams(temperature=2.0, max_tokens=8, n=3, seed=1)
    (one, two) = llm.generate(["a", "b"], [params, GREEDY], use_tqdm=False)
    assert len(one["outputs"]) == 3 and len({tuple(o["token_ids"]) for o in one["outputs"]}) > 1
    names = ("text", "token_ids", "finish_reason", "num_prompt_tokens", "num_cached_tokens")
    assert all(one[name] == one["outputs"][0][name] for name in names)
    assert [answer.index for answer in one.outputs] == [0, 1, 2] and len(two.outputs) == 1


def test_stream_is_generate_in_pieces(llm: LLM) -> None:
    prompts = llm.chat_prompts([conversation(question) for question in QUESTIONS])
    expected = llm.generate(prompts, GREEDY, use_tqdm=False)
    found, reasons = [""] * 4, [""] * 4
    for piece in llm.stream(prompts, GREEDY):
        assert set(piece) == {
            "index", "output_index", "text", "token_ids", "finish_reason", "stop_reason"
        }  # fmt: skip
        found[piece["index"]] += piece["text"]
        reasons[piece["index"]] = piece["finish_reason"]
    assert found == texts(expected) and reasons == [output["finish_reason"] for output in expected]


def test_stop_strings_cut_text_and_stream(llm: LLM) -> None:
    (prompt,) = llm.chat_prompts(conversation(QUESTIONS[0]))
    params = SamplingParams(temperature=0, max_tokens=24, stop=[" = ", "never"])
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    assert output["text"] == "37 + 45" and output["finish_reason"] == "stop"
    pieces = [piece["text"] for piece in llm.stream([prompt], params)]
    assert "".join(pieces) == "37 + 45"


def test_logprobs_come_when_asked_for(llm: LLM) -> None:
    (output,) = llm.generate(
        "a", SamplingParams(max_tokens=3, logprobs=2, prompt_logprobs=0), use_tqdm=False
    )
    assert len(output["logprobs"]) == len(output["token_ids"])
    assert output["prompt_logprobs"] == [None]
    assert all(
        token_id in found for token_id, found in zip(output["token_ids"], output["logprobs"])
    )


def test_progress_is_shown_on_request_where_bars_are_drawn(
    llm: LLM, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm.generate(["a", "b"], GREEDY)
    assert capfd.readouterr().err == "", "stderr is no terminal"
    monkeypatch.setattr(progress, "is_drawn", lambda: True)
    llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert capfd.readouterr().err == ""
    llm.generate(["a", "b"], GREEDY)
    assert "generating" in capfd.readouterr().err


def test_bars_of_the_caller_are_drawn_everywhere(
    llm: LLM, capfd: pytest.CaptureFixture[str]
) -> None:
    llm.generate(["a", "b"], GREEDY, use_tqdm=tqdm)
    assert "generating" in capfd.readouterr().err
