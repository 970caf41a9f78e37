"""What clients of other people send: nulls, 4.0 for 4, answers as they came, wrong paths."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from nanovllm.api import paths
from nanovllm.api.app import NAMES, ROUTES
from nanovllm.api.config import ServerConfig
from nanovllm.api.errors import from_exception
from nanovllm.api.pooled import results
from nanovllm.api.service import Service
from nanovllm.checks import InvalidValue
from nanovllm.config import EngineConfig
from nanovllm.pooling_params import PoolingParams
from nanovllm.prompts import Prompt
from scripts.bench.mock_engine import MockEngine, MockOptions
from tests.api.fields import ENDPOINTS
from tests.api.mock_api_server import MODEL, TEMPLATE, MockServer, served, tokenizer

USER: Any = [{"role": "user", "content": "Hi"}]
NEEDED = {
    "/v1/completions": {"prompt": "hello"},
    "/v1/chat/completions": {"messages": USER},
    "/v1/responses": {"input": "Hi"},
}
LIMITS = ("max_output_tokens", "max_tokens", "max_completion_tokens")


@pytest.fixture(scope="module")
def server() -> Iterator[MockServer]:
    with served(template=TEMPLATE) as one:
        yield one


def post(server: MockServer, path: str, **fields: Any) -> tuple[int, dict[str, Any]]:
    response = server.http.post(path, json=fields)
    return response.status_code, response.json()


def refused(server: MockServer, path: str, **fields: Any) -> dict[str, Any]:
    """The error of a request, whose status must be 400."""
    status, body = post(server, path, **{**NEEDED.get(path, {}), **fields})
    assert status == 400, body
    return dict(body["error"])


@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_field_may_be_null(server: MockServer, path: str) -> None:
    needed = {"messages": USER, "max_tokens": 2} if path == "/v1/messages" else NEEDED[path]
    nulls = dict.fromkeys(set(ENDPOINTS[path].__struct_fields__) - needed.keys() - {*LIMITS})
    limit = LIMITS[0] if path == "/v1/responses" else LIMITS[1]
    status, body = post(server, path, **{**nulls, **needed, limit: 2})
    assert status == 200, body


@pytest.mark.parametrize(
    ("path", "name"),
    [(path, name) for path in NEEDED for name in LIMITS
     if name in ENDPOINTS[path].__struct_fields__],
)  # fmt: skip
def test_a_whole_number_may_have_a_point(server: MockServer, path: str, name: str) -> None:
    status, body = post(server, path, **NEEDED[path], **{name: 4.0})
    assert status == 200, body
    counts = body["usage"]
    assert counts.get("completion_tokens", counts.get("output_tokens")) == 4
    assert refused(server, path, **{name: 4.5})["param"] == name


@pytest.mark.parametrize(
    ("path", "name", "text"),
    [("/v1/completions", "prompt", ""), ("/v1/completions", "prompt", [10**11]),
     ("/v1/completions", "prompt", [5] * 10**4), ("/v1/completions", "prompt", "word " * 10**4),
     ("/v1/chat/completions", "messages", [{"role": "user", "content": "word " * 10**4}]),
     ("/v1/responses", "input", "word " * 10**4)],
    ids=["empty", "no id", "ids", "text", "chat", "response"],
)  # fmt: skip
def test_a_prompt_that_cannot_be_answered_is_named(
    server: MockServer, path: str, name: str, text: Any
) -> None:
    error = refused(server, path, **{name: text})
    assert error["param"] == name
    is_long = len(text) > 1 or path != "/v1/completions"
    assert error["code"] == ("context_length_exceeded" if is_long else "invalid_value")


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/completions", {"n": 17}, "n"),
        ("/v1/completions", {"prompt": ["a"] * 6, "n": 3}, "n"),
        ("/v1/completions", {"prompt": ["a"] * 17}, "prompt"),
        ("/v1/chat/completions", {"n": 128}, "n"),
    ],
)
def test_a_request_that_no_queue_takes_is_refused_for_good(
    path: str, fields: dict[str, Any], param: str
) -> None:
    with served(MockOptions(max_num_seqs=8), max_queue_len=8, template=TEMPLATE) as one:
        error = refused(one, path, **fields)
        assert error["param"] == param
        assert "at most 16 may run and wait (max_num_seqs + max_queue_len)" in error["message"]
        most: dict[str, Any] = {"prompt": ["a"] * 8, "n": 2, "max_tokens": 1}
        assert post(one, "/v1/completions", **most)[0] == 200


def test_inputs_that_no_queue_takes_are_refused_before_one_is_opened() -> None:
    engine = MockEngine(EngineConfig(MODEL), tokenizer(), MockOptions(max_num_seqs=2))
    service = Service(engine, ServerConfig(max_queue_len=3))
    exchange: Any = None
    with pytest.raises(InvalidValue, match="6 answers: at most 5 may run and wait") as caught:
        asyncio.run(results(service, exchange, [Prompt("a", None)] * 6, PoolingParams()))
    assert from_exception(caught.value, NAMES["/v1/embeddings"]).param == "input"
    assert from_exception(caught.value).status == 400 and not engine.streams


def test_no_likeliest_tokens_need_no_logprobs(server: MockServer) -> None:
    status, _ = post(server, "/v1/chat/completions", messages=USER, max_tokens=1, top_logprobs=0)
    assert status == 200


WRONG_FORM = {"type": "object", "not": {}}
SCHEMA = {"name": "a", "schema": WRONG_FORM}


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize(
    ("path", "name", "value"),
    [("/v1/completions", "guided_json", WRONG_FORM),
     ("/v1/chat/completions", "response_format", {"type": "json_schema", "json_schema": SCHEMA}),
     ("/v1/chat/completions", "structured_outputs", {"json": WRONG_FORM}),
     ("/v1/responses", "text", {"format": {"type": "json_schema", **SCHEMA}})],
)  # fmt: skip
def test_a_form_that_is_refused_has_the_name_of_its_field(
    server: MockServer, monkeypatch: pytest.MonkeyPatch, path: str, name: str, value: Any,
    is_late: bool,
) -> None:  # fmt: skip
    """The engine says so at once, or when it has compiled the form, in whatever words."""
    reason = "a schema with 'not' cannot be kept"
    plain = server.engine.open

    async def opened(*args: Any, **options: Any) -> Any:
        if not is_late:
            raise InvalidValue("structured_outputs", reason)
        return Refusing(await plain(*args, **options), reason)

    monkeypatch.setattr(server.engine, "open", opened)
    error = refused(server, path, **{name: value})
    assert error["param"] == name and reason in error["message"]
    assert "structured_outputs" not in error["message"]


class Refusing:
    """A stream whose answer ends with an error at once."""

    def __init__(self, stream: Any, reason: str, field: str | None = "structured_outputs") -> None:
        self._stream, self._reason, self._field = stream, reason, field
        self.prompt_token_ids = stream.prompt_token_ids

    async def __aiter__(self) -> Any:
        async for delta in self._stream:
            delta.finish_reason, delta.error = "error", self._reason
            delta.error_field = self._field
            yield delta

    def abort(self) -> None:
        self._stream.abort()


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
def test_a_wrong_variable_of_a_template_is_named(server: MockServer, name: str) -> None:
    error = refused(server, "/v1/chat/completions", chat_template_kwargs={name: False})
    assert error["param"] == "chat_template_kwargs" and name in error["message"]
    assert "transformers" not in error["message"]


PARTS: list[tuple[dict[str, Any], str]] = [
    ({"type": "text"}, "text"),
    ({"type": "input_text", "text": "Hi"}, "type"),
]


@pytest.mark.parametrize(("part", "name"), PARTS)
def test_a_wrong_part_of_a_message_is_named(
    server: MockServer, part: dict[str, Any], name: str
) -> None:
    messages = [*USER, {"role": "user", "content": [{"type": "text", "text": "a"}, part]}]
    error = refused(server, "/v1/chat/completions", messages=messages)
    assert error["param"] == f"messages[1].content[1].{name}"


def test_a_message_of_an_answer_can_be_sent_back(server: MockServer) -> None:
    with server.client() as client:
        done = client.chat.completions.create(model=MODEL, messages=USER, max_tokens=3)
        again = {**done.choices[0].message.model_dump(), "annotations": []}
        messages: Any = [*USER, again, *USER]
        client.chat.completions.create(model=MODEL, messages=messages, max_tokens=3)


def tokens_of(server: MockServer, messages: Any, path: str = "/tokenize") -> Any:
    status, body = post(server, path, messages=messages)
    assert status == 200, body
    return body["tokens"]


def test_fields_of_messages_that_other_servers_write_are_ignored(
    server: MockServer, caplog: pytest.LogCaptureFixture
) -> None:
    plain = [*USER, {"role": "assistant", "content": "a"}, *USER]
    more = {"provider_specific_fields": {"a": 1}, "refusal": "no", "odd one": [1]}
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    with caplog.at_level(logging.INFO, logger="nanovllm.api.chat_messages"):
        for content in ("a", [part], [part]):
            other = [*USER, {"role": "assistant", "content": content, **more}, *USER]
            assert tokens_of(server, other) == tokens_of(server, plain)
    assert sum("'odd one'" in text for text in caplog.messages) == 1, "it is logged once"
    items = [{"role": "user", "content": "Hi", **more},
             {"role": "user", "content": [{**part, "type": "input_text", "id": 1}]}]  # fmt: skip
    assert post(server, "/v1/responses", input=items, max_output_tokens=2)[0] == 200
    assert refused(server, "/v1/chat/completions", odd=1)["param"] == "odd"


@pytest.mark.parametrize(
    "fields",
    [{"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None},
     {"provider_specific_fields": {"refusal": None}, "thinking_blocks": [], "images": []},
     {"name": "model", "refusal": "no"}, {"annotations": [{"type": "url_citation"}]},
     {"content": [{"type": "text", "text": "four", "annotations": [], "index": 0}]},
     {"content": [{"type": "refusal", "refusal": "four"}]}],
    ids=["openai", "litellm", "agents", "citations", "langchain", "refused"],
)  # fmt: skip
def test_what_clients_add_to_an_answer_changes_no_prompt(
    server: MockServer, fields: dict[str, Any]
) -> None:
    answer = {"role": "assistant", "content": "four"}
    found = [
        post(server, "/tokenize", messages=[*USER, one, *USER]) for one in (answer, answer | fields)
    ]
    assert found[0] == found[1] and found[0][0] == 200


def test_embeddings_are_refused_with_the_reason(server: MockServer) -> None:
    error = refused(server, "/v1/embeddings", input="a", model=MODEL)
    assert error["code"] == "unsupported_model"
    assert "generates text, not embeddings" in error["message"]
    status, body = post(server, "/v1/embeddings", input="a", model="text-embedding-3-small")
    assert status == 404 and body["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("message", [{"content": None}, {}, {"content": None, "tool_calls": []}])
def test_an_answer_without_text_and_calls_can_be_sent_back(
    server: MockServer, message: dict[str, Any]
) -> None:
    empty = [*USER, {"role": "assistant", "content": ""}, *USER]
    assert tokens_of(server, [*USER, {"role": "assistant", **message}, *USER]) == tokens_of(
        server, empty
    )


ITEMS = "{% for key, value in f.arguments|items %}{{ key }}={{ value }}{% endfor %}"


READS = (
    "{% if f.arguments is string %}{{ (f.arguments | from_json).values() | list }}"
    "{% else %}{{ f.arguments.values() | list | first }}{% endif %}"
)


@pytest.mark.parametrize("text", ['{"zone": "C', "{", "[1]", "5", "a \\ {{ 1 }}"])
@pytest.mark.parametrize(
    ("writes", "around"),
    [("{{ f.arguments }}", "{}"), ("{{ f.arguments | tojson }}", "{}"),
     ("{{ 'args: ' + f.arguments }}", "args: {}"), (ITEMS, "arguments={}"), (READS, "{}")],
    ids=["text", "tojson", "joined", "items", "from_json"],
)  # fmt: skip
def test_cut_arguments_are_written_as_they_are(text: str, writes: str, around: str) -> None:
    call = "{% for c in m.tool_calls or [] %}{% set f = c.function %}[" + writes + "]{% endfor %}"
    template = "{% for m in messages %}{{ m.content }}" + call + "{% endfor %}"
    function = {"name": "f", "arguments": text}
    answer = {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}
    with served(template=template) as one:
        tokens = tokens_of(one, [*USER, answer])
        found = post(one, "/detokenize", tokens=tokens)[1]["prompt"]
    assert found == "Hi[" + around.format(text) + "]"


def test_a_response_can_be_sent_back_with_its_reasoning() -> None:
    template = "{% for m in messages %}[{{ m.role }}|{{ m.reasoning_content }}|{{ m.content }}]" + (
        "{% endfor %}{% if enable_thinking is false %}<think></think>{% endif %}"
    )
    text = "<think>\nWhy?\n</think>\n\nSo."
    with served(MockOptions(text=text), template) as server, server.client() as client:
        first = client.responses.create(model=MODEL, input="Hi")
        assert [item.type for item in first.output] == ["reasoning", "message"]
        items: Any = [{"role": "user", "content": "Hi"}, *first.output]
        second = client.responses.create(
            model=MODEL, input=[*items, {"role": "user", "content": "?"}]
        )
        seen = server.http.post("/tokenize", json={"messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "So.", "reasoning_content": "Why?"},
            {"role": "user", "content": "?"},
        ]}).json()["count"]  # fmt: skip
    assert second.usage is not None and second.usage.input_tokens == seen


@pytest.mark.parametrize(
    ("item", "param"),
    [({"role": "user", "content": None}, "content"), ({"role": "robot", "content": ""}, "role"),
     ({"type": ["message"]}, "type"),
     ({"type": "reasoning", "content": 3}, "content"),
     ({"type": "reasoning", "summary": [{"type": "summary_text", "text": ""}]}, "summary")],
)  # fmt: skip
def test_a_wrong_item_of_an_input_is_named(
    server: MockServer, item: dict[str, Any], param: str
) -> None:
    items = [{"role": "user", "content": "Hi", "phase": None}, item]
    error = refused(server, "/v1/responses", input=items, instructions="Be brief.")
    assert error["param"] == f"input[1].{param}"


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"prompt": "a", "add_generation_prompt": False}, "add_generation_prompt"),
     ({"prompt": "a", "tools": []}, "tools"),
     ({"messages": USER, "add_special_tokens": True}, "add_special_tokens")],
)  # fmt: skip
def test_tokenize_ignores_no_field(server: MockServer, fields: dict[str, Any], name: str) -> None:
    assert refused(server, "/tokenize", **fields)["param"] == name


@pytest.mark.parametrize(
    ("path", "meant"),
    [("/chat/completions", "/v1/chat/completions"), ("/v1/completions/", "/v1/completions"),
     ("/v1/v1/responses", "/v1/responses"), ("/models", "/v1/models"),
     ("/v1/models/", "/v1/models"), ("/v1/tokenize", "/tokenize")],
)  # fmt: skip
def test_a_path_that_is_almost_right_is_told(server: MockServer, path: str, meant: str) -> None:
    response = server.http.post(path, json={})
    assert response.status_code == 404
    assert response.json()["error"]["message"].endswith(f"did you mean {meant}?")


@pytest.mark.parametrize(
    ("path", "endpoint"),
    [("/api/chat", "POST /v1/chat/completions"), ("/api/generate", "POST /v1/completions"),
     ("/api/tags", "GET /v1/models"), ("/api/tags/", "GET /v1/models"),
     ("/completion", "POST /v1/completions"), ("/generate", "POST /v1/completions"),
     ("/ping", "GET /health"), ("/healthz", "GET /health")],
)  # fmt: skip
def test_a_path_of_another_server_is_answered_with_the_one_of_this(
    server: MockServer, path: str, endpoint: str
) -> None:
    for method in ("GET", "POST"):
        response = server.http.request(method, path)
        assert response.status_code == 404
        assert response.json()["error"]["message"].endswith(f"use {endpoint}")


def test_every_endpoint_that_is_named_for_another_path_exists(server: MockServer) -> None:
    known = {f"{route.method} {path}" for path, route in ROUTES.items()}
    assert not set(paths.ELSEWHERE) & set(ROUTES)
    assert set(paths.ELSEWHERE.values()) <= known | {"GET /v1/models/NAME"}
    message = server.http.get("/api/pull").json()["error"]["message"]
    assert message == "there is no such path: GET /openapi.json lists the paths"


def test_a_compressed_body_is_refused_as_such(server: MockServer) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    body = gzip.compress(json.dumps({"prompt": "hello"}).encode())
    response = server.http.post("/v1/completions", content=body, headers=headers)
    assert response.status_code == 415 and "gzip" in response.json()["error"]["message"]


def test_bytes_of_logprobs_add_up_to_characters(server: MockServer) -> None:
    found: list[int] = []
    for byte in "é".encode():
        one = next(i for i in range(256) if tokenizer().bytes_of(i) == bytes([byte]))
        _, body = post(
            server, "/v1/chat/completions", messages=USER, max_tokens=1, seed=one, logprobs=True
        )
        entry = body["choices"][0]["logprobs"]["content"][0]
        assert entry["token"] == "\ufffd"
        found += entry["bytes"]
    assert bytes(found).decode() == "é"


def test_too_many_messages_are_called_input_in_responses() -> None:
    with served(max_messages=2) as few:
        assert refused(few, "/v1/responses", input=USER * 3)["param"] == "input"
        assert refused(few, "/v1/responses", messages=USER)["param"] == "messages"


@pytest.mark.parametrize("has_usage", [False, True])
def test_token_ids_of_a_chat_stream_are_where_vllm_has_them(
    server: MockServer, has_usage: bool
) -> None:
    """Those of the prompt beside the choices of the first event, the others in each choice."""
    options: Any = {"continuous_usage_stats": True} if has_usage else None
    asked: Any = {"model": MODEL, "messages": USER, "max_tokens": 3, "seed": 5}
    extra: Any = {"return_token_ids": True}
    with server.client() as client:
        whole = client.chat.completions.create(**asked, extra_body=extra)
        events = list(client.chat.completions.create(
            **asked, extra_body=extra, stream=True, stream_options=options
        ))  # fmt: skip
    prompt_ids = (whole.model_extra or {})["prompt_token_ids"]
    given = [(event.model_extra or {}).get("prompt_token_ids") for event in events]
    assert given[0] == prompt_ids and not any(given[1:])
    choices = [one.model_extra or {} for event in events for one in event.choices]
    assert [token_id for one in choices for token_id in one["token_ids"]] == [5, 6, 7]


def test_echo_without_tokens_has_none_in_a_stream_either(server: MockServer) -> None:
    asked: Any = {
        "prompt": "hello", "echo": True, "max_tokens": 0, "return_token_ids": True, "stop": "x",
    }  # fmt: skip
    whole = post(server, "/v1/completions", **asked)[1]
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = server.http.post(
        "/v1/completions", json={**asked, "stream": True, "stream_options": options}
    ).text.split("\n\n")
    chunks = [json.loads(one.removeprefix("data: ")) for one in events if "{" in one]
    choices = [choice for one in chunks for choice in one["choices"]]
    assert "".join(one["text"] for one in choices) == whole["choices"][0]["text"] == "hello"
    assert all(one["token_ids"] == [] for one in choices) and not whole["choices"][0]["token_ids"]
    assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"] == "length"
    assert choices[-1]["stop_reason"] is whole["choices"][0]["stop_reason"] is None
    for usage in [whole["usage"], *(one["usage"] for one in chunks)]:
        assert usage["completion_tokens"] == 0


def test_the_tokens_of_an_input_can_be_counted(server: MockServer) -> None:
    asked: Any = {"input": [{"role": "user", "content": "Hi"}], "instructions": "Be brief."}
    with server.client() as client:
        counted = client.responses.input_tokens.count(model=MODEL, **asked)
        answer = client.responses.create(model=MODEL, max_output_tokens=2, **asked)
    assert counted.object == "response.input_tokens" and answer.usage is not None
    assert counted.input_tokens == answer.usage.input_tokens
    image = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
    for wrong in ([{"role": "user", "content": [image]}], [{"role": "robot", "content": ""}]):
        error = refused(server, "/v1/responses/input_tokens", input=wrong)
        assert error["param"].startswith("input")
