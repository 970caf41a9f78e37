"""HTTP endpoints of a model that pools: OpenAI's official client, the others' forms, refusals."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import numpy as np
import pytest
import torch

from nanovllm import LLM, PoolingParams
from nanovllm.api import pooling as pooling_api
from nanovllm.api.http import AccessRecord, ClientGone, Exchange
from nanovllm.api.pooled import Results, pair_prompts
from nanovllm.pooling_params import PoolingInfo
from nanovllm.tokenizer import LONG_TEXT, Tokenizer
from tests.api.engine_server import ALIAS, MODEL, Served, through_http
from tests.pooling.pooling_cases import assert_near, embeddings, pooling_llm, save_decoder

TEXTS = ["the cat", "a cat", "an error on the ban"]
IDS = [[9, 10, 11], [7]]
LABELS = {"hf_overrides": {"classifier_from_token": ["a", "b"]}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    save_decoder(folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    llm = pooling_llm(folder)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def reranker(folder: Path) -> Iterator[LLM]:
    llm = pooling_llm(folder, "score", **LABELS)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("classes")
    save_decoder(
        folder, head="SequenceClassification", num_labels=3, pad_token_id=0,
        id2label={0: "bad", 1: "fair", 2: "good"}, label2id={"bad": 0, "fair": 1, "good": 2},
    )  # fmt: skip
    llm = pooling_llm(folder, "classify")
    yield llm
    llm.close()


def posts(path: str, *bodies: dict[str, Any]) -> Callable[[Served], Coroutine[Any, Any, Any]]:
    """Sends bodies to a path at the same time; returns the answers."""

    async def work(served: Served) -> list[httpx.Response]:
        sent = (served.http.post(path, json={"model": MODEL, **body}) for body in bodies)
        return list(await asyncio.gather(*sent))

    return work


def answered(llm: LLM, path: str, **body: Any) -> dict[str, Any]:
    (answer,) = through_http(llm, posts(path, body))
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_the_official_client_gets_the_embeddings_of_llm(llm: LLM) -> None:
    async def work(served: Served) -> list[Any]:
        create = served.openai.embeddings.create
        # without encoding_format the client asks for base64, and decodes it
        return [
            await create(model=MODEL, input=TEXTS),
            await create(model=MODEL, input=TEXTS[0], dimensions=7, encoding_format="float"),
            await create(model=MODEL, input=IDS),
        ]

    several, short, ids = through_http(llm, work)
    found = [torch.tensor(one.embedding) for one in several.data]
    assert_near(found, embeddings(llm, TEXTS), atol=1e-6)
    wanted = embeddings(llm, TEXTS[:1], pooling_params=PoolingParams(dimensions=7))
    assert_near([torch.tensor(short.data[0].embedding)], wanted, atol=1e-6)
    assert_near([torch.tensor(one.embedding) for one in ids.data], embeddings(llm, IDS), atol=1e-6)
    assert [one.index for one in several.data] == [0, 1, 2]
    assert ids.usage.prompt_tokens == ids.usage.total_tokens == 4


def test_base64_holds_the_same_numbers(llm: LLM) -> None:
    asked = {"input": TEXTS[0]}
    plain, coded = through_http(
        llm, posts("/v1/embeddings", asked, {**asked, "encoding_format": "base64"})
    )
    raw = base64.b64decode(coded.json()["data"][0]["embedding"])
    numbers = plain.json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(raw, "<f4"), numbers, atol=1e-6)


def test_messages_are_one_text_by_the_chat_template(folder: Path) -> None:
    template = folder / "template.jinja"
    template.write_text(
        "{% for one in messages %}{{ one.role }}: {{ one.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    llm = pooling_llm(folder, chat_template=str(template))
    messages = [{"role": "user", "content": "the cat"}]
    wanted = embeddings(llm, ["user: the cat\n", "user: the cat\nassistant:"])
    for path, key in (("/v1/embeddings", "embedding"), ("/pooling", "data")):
        bodies = ({"messages": messages}, {"messages": messages, "add_generation_prompt": True})
        answers = through_http(llm, posts(path, *bodies))
        found = [torch.tensor(one.json()["data"][0][key]) for one in answers]
        assert_near(found, wanted, atol=1e-5)
    llm.close()


def test_pooling_gives_what_the_model_makes(llm: LLM, classifier: LLM) -> None:
    (one,) = answered(llm, "/pooling", input=TEXTS[0], normalize=False)["data"]
    wanted = embeddings(llm, TEXTS[:1], pooling_params=PoolingParams(normalize=False))
    assert one["object"] == "pooling"
    assert_near([torch.tensor(one["data"])], wanted, atol=1e-5)
    (one,) = answered(classifier, "/pooling", input=TEXTS[0], task="classify")["data"]
    assert len(one["data"]) == 3 and sum(one["data"]) == pytest.approx(1.0)


def test_classes_have_the_names_of_the_checkpoint(classifier: LLM) -> None:
    found = answered(classifier, "/classify", input=TEXTS)
    wanted = classifier.classify(TEXTS, use_tqdm=False)
    for one, other in zip(found["data"], wanted, strict=True):
        assert one["probs"] == pytest.approx(other.outputs.probs, abs=1e-6)
        assert one["label"] == ("bad", "fair", "good")[int(np.argmax(one["probs"]))]
        assert one["num_classes"] == 3


@pytest.mark.parametrize("model", ["llm", "reranker"])
def test_scores_are_those_of_llm(model: str, request: pytest.FixtureRequest) -> None:
    llm: LLM = request.getfixturevalue(model)
    wanted = [one.outputs.score for one in llm.score(TEXTS[0], TEXTS[1:], use_tqdm=False)]
    bodies = [
        {"text_1": TEXTS[0], "text_2": TEXTS[1:]},
        {"queries": [TEXTS[0]] * 2, "documents": TEXTS[1:]},
    ]
    for answer in through_http(llm, posts("/score", *bodies)):
        found = [one["score"] for one in answer.json()["data"]]
        assert found == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("num", [9, LONG_TEXT + 1])
def test_many_numbers_are_written_beside_the_event_loop(num: int) -> None:
    threads: list[threading.Thread] = []
    sent: list[bytes] = []

    class Noting:
        async def answer(self, status: int, body: bytes, headers: Any) -> None:
            sent.append(body)

    def data() -> list[Any]:
        threads.append(threading.current_thread())
        return [1]

    found, exchange = Results([np.zeros(num)], 1), cast(Any, Noting())
    asyncio.run(pooling_api._answer(exchange, MODEL, "embd-", found, data))
    assert (threads[0] is threading.current_thread()) == (num <= LONG_TEXT)
    assert json.loads(sent[0])["data"] == [1]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_documents_are_ranked_by_their_scores(path: str, reranker: LLM) -> None:
    documents = [TEXTS[1], {"text": TEXTS[2]}]
    wanted = [one.outputs.score for one in reranker.score(TEXTS[0], TEXTS[1:], use_tqdm=False)]
    found = answered(reranker, path, query=TEXTS[0], documents=documents)
    order = sorted(range(2), key=lambda i: -wanted[i])
    assert [one["index"] for one in found["results"]] == order
    assert [one["document"]["text"] for one in found["results"]] == [TEXTS[1:][i] for i in order]
    scores = [one["relevance_score"] for one in found["results"]]
    assert scores == pytest.approx(sorted(wanted, reverse=True), abs=1e-6)
    first = answered(reranker, path, query=TEXTS[0], documents=documents, top_n=1,
                     return_documents=False)  # fmt: skip
    assert len(first["results"]) == 1 and "document" not in first["results"][0]
    every = answered(reranker, path, query=TEXTS[0], documents=documents, top_n=0)
    assert [one["index"] for one in every["results"]] == order


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("/v1/embeddings", {"input": []}, "input", "input is empty"),
        ("/v1/embeddings", {"input": ["a", ""]}, "input", "input 1 is empty"),
        ("/v1/embeddings", {"input": ["a", [1]]}, "input", "mixes texts and token ids"),
        ("/v1/embeddings", {"input": [[600]]}, "input", "outside the vocabulary"),
        ("/v1/embeddings", {"input": "x" * 200}, "input", "200 tokens: at most max_model_len"),
        ("/v1/embeddings", {"input": "x" * 9000}, "input", "9000 characters: at most 8192"),
        ("/v1/embeddings", {"input": ["a"] * 2049}, "input", "2049 texts: at most 2048"),
        ("/v1/embeddings", {"input": "a", "dimensions": 65}, "dimensions", "dimensions is 65"),
        ("/v1/embeddings", {"input": "a", "messages": []}, "messages", "both input and messages"),
        ("/v1/embeddings", {}, "input", "input is missing: give it, or messages"),
        ("/v1/embeddings", {"input": "a", "add_generation_prompt": True}, "add_generation_prompt",
         "needs messages"),
        ("/pooling", {"messages": [{"role": "user"}]}, "messages[0].content", "content"),
        ("/classify", {"input": "a"}, "model", "makes embeddings, not scores of classes"),
        ("/score", {"text_1": "a"}, "text_2", "text_2 is missing"),
        ("/score", {}, "text_1", "give text_1 and text_2"),
        ("/score", {"text_1": ["a"] * 2, "text_2": ["a"] * 3}, None, "do not make pairs"),
        ("/rerank", {"query": "a", "documents": []}, "documents", "documents is empty"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n", "top_n is -1"),
        ("/rerank", {"query": "a", "documents": ["b"], "rank_fields": ["c"]}, "rank_fields",
         "the field 'text' alone"),
        ("/v1/completions", {"prompt": "a"}, None, "generating needs task='generate'"),
    ],
)  # fmt: skip
def test_requests_are_refused_in_openais_form(
    path: str, body: dict[str, Any], param: str | None, message: str, llm: LLM
) -> None:
    async def work(served: Served) -> tuple[int, dict[str, Any]]:
        answer = await served.http.post(path, json={"model": MODEL, **body})
        return answer.status_code, answer.json()["error"]

    status, error = through_http(llm, work)
    assert status == 400 and error["param"] == param and message in error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": "a"}),
        ("/pooling", {"input": "a"}),
        ("/score", {"text_1": "a", "text_2": "b"}),
        ("/rerank", {"query": "a", "documents": ["b"]}),
    ],
)
def test_the_model_of_an_answer_is_that_of_its_request(
    path: str, body: dict[str, Any], llm: LLM
) -> None:
    assert answered(llm, path, **body, model=ALIAS)["model"] == ALIAS


@pytest.mark.parametrize(
    ("query", "num", "message"),
    [
        ("x" * 200, 99, "the prompt has 201 tokens: at most max_model_len (128) fit"),
        ("x" * 8000, 9, "the pairs have 72009 characters, with the query in each: at most 65536"),
    ],
)
def test_no_more_pairs_are_encoded_than_the_first_that_is_too_long(
    query: str, num: int, message: str, reranker: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, encode = [], Tokenizer.encode
    monkeypatch.setattr(
        Tokenizer, "encode", lambda *args, **options: encoded.append(1) or encode(*args, **options)
    )
    body = {"query": query, "documents": ["a"] * num}
    (answer,) = through_http(reranker, posts("/rerank", body))
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert len(encoded) <= 1


def test_no_more_pairs_are_encoded_for_a_client_that_has_left() -> None:
    is_working, may_end, num_encoded = threading.Event(), threading.Event(), 0

    def encode_first(text: str, limit: int | None) -> list[int]:
        nonlocal num_encoded
        num_encoded += 1
        is_working.set()
        assert may_end.wait(60)
        return [1]

    async def receive() -> dict[str, Any]:
        await asyncio.to_thread(is_working.wait, 60)
        return {"type": "http.disconnect"}

    async def work() -> None:
        engine = SimpleNamespace(
            pooling=PoolingInfo("classify", 1), max_model_len=128,
            tokenizer=SimpleNamespace(encode_first=encode_first),
        )  # fmt: skip
        service: Any = SimpleNamespace(engine=engine, config=SimpleNamespace(max_body_bytes=99_999))
        exchange = Exchange({}, receive, cast(Any, None), AccessRecord("id"))
        with pytest.raises(ClientGone):
            await pair_prompts(service, exchange, [("a" * 5000, "b")] * 2, PoolingParams(), None)
        may_end.set()

    asyncio.run(work())  # waits for its threads
    assert num_encoded == 1


def test_a_text_is_truncated_if_that_is_asked(llm: LLM) -> None:
    asked = {"input": "x" * 200, "truncate_prompt_tokens": -1}
    found = answered(llm, "/v1/embeddings", **asked)
    assert found["usage"]["prompt_tokens"] == 128


def test_metrics_count_prompts_and_their_tokens(folder: Path) -> None:
    llm = pooling_llm(folder)

    async def work(served: Served) -> str:
        await served.http.post("/v1/embeddings", json={"input": IDS})
        return (await served.http.get("/metrics")).text

    text = through_http(llm, work)
    assert 'vllm:prompt_tokens_total{model_name="tiny"} 4.0' in text
    assert 'vllm:request_success_total{finished_reason="stop",model_name="tiny"} 2.0' in text
    llm.close()
