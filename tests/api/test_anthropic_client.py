"""Anthropic's official client against the server: whole, streamed, tools, thinking, errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import httpx
import pytest

from nanovllm.checks import InvalidValue
from scripts.bench.mock_engine import MockOptions
from tests.api.mock_api_server import MODEL, TEMPLATE, MockServer, served, tokenizer

KEY = "a-key"
USER: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
ASKED: Any = {"model": MODEL, "messages": USER, "max_tokens": 400}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS: Any = [
    {"name": name, "description": f"The {name}.", "input_schema": SCHEMA}
    for name in ("weather", "clock")
]
ANSWER = (
    '<think>\nTwo calls.\n</think>\n\nI look.\n<tool_call>\n{"name": "weather", "arguments": '
    '{"city": "Oslo"}}\n</tool_call>\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
)
BLOCKS = [
    {"type": "thinking", "thinking": "Two calls.", "signature": ""},
    {"type": "text", "text": "I look.\n"},
    {"type": "tool_use", "name": "weather", "input": {"city": "Oslo"}},
    {"type": "tool_use", "name": "clock", "input": {}},
]
# a template that writes everything that a message can have
FULL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.id }} "
    "{{ c.function.arguments | tojson }}</tool_call>{% endfor %}"
    "{% if m.tool_call_id %}<id>{{ m.tool_call_id }}</id>{% endif %}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if reasoning_effort %}effort {{ reasoning_effort }}{% endif %}"
    "{% if enable_thinking is defined %}thinking {{ enable_thinking }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def client_of(server: MockServer, **options: Any) -> anthropic.Anthropic:
    given = {"api_key": KEY, "max_retries": 0, "timeout": 60, **options}
    return anthropic.Anthropic(base_url=server.url, **given)


@contextmanager
def answering(text: str, **options: Any) -> Iterator[anthropic.Anthropic]:
    """A client of a server whose answers have this text."""
    made_up = MockOptions(text=text)
    with served(made_up, TEMPLATE, **options) as server, client_of(server) as client:
        yield client


@pytest.fixture(scope="module")
def server() -> Iterator[MockServer]:
    with served(template=FULL, api_key=[KEY]) as one:
        yield one


@pytest.fixture(scope="module")
def client(server: MockServer) -> Iterator[anthropic.Anthropic]:
    with client_of(server) as one:
        yield one


@pytest.fixture(scope="module")
def talker() -> Iterator[anthropic.Anthropic]:
    with answering(ANSWER) as one:
        yield one


@pytest.fixture
def opened(server: MockServer, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The texts of prompts and the parameters that reach the engine."""
    found: list[tuple[str, Any]] = []
    plain = server.engine.open

    async def noting(prompt: Any, params: Any, **options: Any) -> Any:
        found.append((prompt.text, params))
        return await plain(prompt, params, **options)

    monkeypatch.setattr(server.engine, "open", noting)
    return found


def written(client: anthropic.Anthropic, opened: list[tuple[str, Any]], **fields: Any) -> str:
    """The prompt of a request."""
    client.messages.create(**{**ASKED, "max_tokens": 1, **fields})
    return opened[-1][0]


def blocks_of(message: Any) -> list[dict[str, Any]]:
    found = [block.model_dump(exclude_none=True) for block in message.content]
    ids = [block.pop("id") for block in found if block["type"] == "tool_use"]
    assert len({*ids}) == len(ids) and all(one.startswith("toolu_") for one in ids)
    return found


def test_an_answer_has_its_text_and_counts(client: anthropic.Anthropic) -> None:
    done = client.messages.create(**{**ASKED, "max_tokens": 19})
    assert done.id.startswith("msg_") and (done.type, done.role) == ("message", "assistant")
    assert done.model == MODEL and done.stop_reason == "max_tokens" and not done.stop_sequence
    assert [block.type for block in done.content] == ["text"]
    assert done.usage.output_tokens == 19 and done.usage.cache_read_input_tokens == 0
    assert (
        done.usage.input_tokens
        == client.messages.count_tokens(model=MODEL, messages=USER).input_tokens
    )


def test_reasoning_text_and_calls_are_blocks(talker: anthropic.Anthropic) -> None:
    done = talker.messages.create(**ASKED, tools=TOOLS)
    assert blocks_of(done) == BLOCKS and done.stop_reason == "tool_use"


def test_a_stream_adds_up_to_the_whole_message(talker: anthropic.Anthropic) -> None:
    whole = talker.messages.create(**ASKED, tools=TOOLS)
    with talker.messages.stream(**ASKED, tools=TOOLS) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_message()
    assert blocks_of(message) == BLOCKS and message.stop_reason == "tool_use"
    assert message.usage.output_tokens == whole.usage.output_tokens
    assert message.usage.input_tokens == whole.usage.input_tokens
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == len(BLOCKS)


def test_the_events_are_those_of_the_protocol(talker: anthropic.Anthropic) -> None:
    body = {**ASKED, "tools": TOOLS, "stream": True}
    text = httpx.post(
        f"{str(talker.base_url).rstrip(chr(47))}/v1/messages", json=body, timeout=60
    ).text
    events = [dict(line.split(": ", 1) for line in one.split("\n"))
              for one in text.strip().split("\n\n")]  # fmt: skip
    data = [json.loads(one["data"]) for one in events]
    assert [one["type"] for one in data] == [one["event"] for one in events]
    assert data[0]["message"]["content"] == [] and data[1] == {"type": "ping"}
    kinds = {one["delta"]["type"] for one in data if one["type"] == "content_block_delta"}
    assert kinds == {"thinking_delta", "text_delta", "input_json_delta"}
    assert [one["index"] for one in data if one["type"] == "content_block_start"] == [0, 1, 2, 3]
    assert data[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_stop_sequence_is_named(is_stream: bool) -> None:
    asked: Any = {**ASKED, "stop_sequences": ["three", "nine"]}
    with answering("one two three four") as client:
        if is_stream:
            with client.messages.stream(**asked) as stream:
                done: Any = stream.get_final_message()
        else:
            done = client.messages.create(**asked)
    assert (done.stop_reason, done.stop_sequence) == ("stop_sequence", "three")
    assert done.content[0].text == "one two "


def test_an_answer_that_ends_by_itself_has_ended_its_turn() -> None:
    with answering("Hello.") as client:
        assert client.messages.create(**ASKED).stop_reason == "end_turn"


def test_an_empty_answer_has_no_blocks() -> None:
    asked: Any = {**ASKED, "stop_sequences": ["H"]}
    with answering("Hello.") as client:
        assert client.messages.create(**asked).content == []
        kinds = [event.type for event in client.messages.create(**asked, stream=True)]
    assert kinds == ["message_start", "message_delta", "message_stop"]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "clock"}])
def test_a_demanded_call_is_given_alone(choice: Any) -> None:
    with answering('[{"name": "clock", "arguments": {"city": "Oslo"}}]') as client:
        done = client.messages.create(**ASKED, tools=TOOLS, tool_choice=choice)
    assert blocks_of(done) == [{"type": "tool_use", "name": "clock", "input": {"city": "Oslo"}}]
    assert done.stop_reason == "tool_use"


def test_the_input_of_a_call_that_is_cut_is_empty() -> None:
    text = '[{"name": "clock", "arguments": {"city": "Os'
    asked: Any = {**ASKED, "max_tokens": len(text), "tool_choice": {"type": "any"}}
    with answering(text + "lo") as client:
        done = client.messages.create(**asked, tools=TOOLS)
    assert blocks_of(done) == [{"type": "tool_use", "name": "clock", "input": {}}]
    assert done.stop_reason == "max_tokens"


def test_parallel_calls_can_be_turned_off(talker: anthropic.Anthropic) -> None:
    choice: Any = {"type": "auto", "disable_parallel_tool_use": True}
    done = talker.messages.create(**ASKED, tools=TOOLS, tool_choice=choice)
    assert blocks_of(done) == BLOCKS[:3]


def test_with_tool_choice_none_the_text_stays(talker: anthropic.Anthropic) -> None:
    done: Any = talker.messages.create(**ASKED, tools=TOOLS, tool_choice={"type": "none"})
    assert [one.type for one in done.content] == ["thinking", "text"]
    assert "<tool_call>" in done.content[1].text


def test_an_answer_can_be_sent_back_with_the_results_of_its_calls(
    client: anthropic.Anthropic, talker: anthropic.Anthropic, opened: list[Any]
) -> None:
    done = talker.messages.create(**ASKED, tools=TOOLS)
    first, second = [one.id for one in done.content if one.type == "tool_use"]
    parts = [{"type": "text", "text": "7 degrees"}, {"type": "text", "text": "and rain"}]
    back: Any = [
        {"type": "tool_result", "tool_use_id": first, "content": parts},
        {"type": "tool_result", "tool_use_id": second, "content": "no clock", "is_error": True},
        {"type": "text", "text": "Thanks."},
    ]
    messages: Any = [
        *USER, {"role": "assistant", "content": done.content}, {"role": "user", "content": back},
    ]  # fmt: skip
    text = written(client, opened, messages=messages, tools=TOOLS, tool_choice={"type": "any"})
    turns = text.split("<|im_start|>")[1:]
    assert turns[1] == (
        "assistant\n<think>Two calls.</think>I look.\n"
        f'<tool_call>weather {first} {{"city": "Oslo"}}</tool_call>'
        f"<tool_call>clock {second} {{}}</tool_call><|im_end|>\n"
    )
    assert turns[2] == f"tool\n7 degrees\nand rain<id>{first}</id><|im_end|>\n"
    assert turns[3] == f"tool\nError: no clock<id>{second}</id><|im_end|>\n"
    assert turns[4].startswith("user\nThanks.<|im_end|>")


def test_system_and_messages_of_one_role_in_a_row(
    client: anthropic.Anthropic, opened: list[Any]
) -> None:
    cached = {"type": "ephemeral"}
    text = written(
        client, opened, system=[{"type": "text", "text": "Be brief.", "cache_control": cached}],
        messages=[*USER, {"role": "user", "content": [{"type": "text", "text": "Well?"}]}],
    )  # fmt: skip
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
        "What is the weather in Oslo?\nWell?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_answer_may_be_begun(client: anthropic.Anthropic, opened: list[Any]) -> None:
    text = written(client, opened, messages=[*USER, {"role": "assistant", "content": "It is"}])
    assert text.endswith("<|im_start|>assistant\nIt is")


@pytest.mark.parametrize(
    ("thinking", "shown"),
    [({"type": "enabled", "budget_tokens": 2000}, "thinking True"),
     ({"type": "disabled"}, "thinking False"), ({"type": "adaptive"}, "assistant\n")],
)  # fmt: skip
def test_thinking_is_a_variable_of_the_template(
    client: anthropic.Anthropic, opened: list[Any], thinking: Any, shown: str
) -> None:
    text = written(client, opened, thinking=thinking)
    assert shown in text and ("thinking" in text) == ("thinking" in shown)


def test_reasoning_can_be_left_out(talker: anthropic.Anthropic) -> None:
    thinking: Any = {"type": "adaptive", "display": "omitted"}
    done = talker.messages.create(**ASKED, thinking=thinking, tools=TOOLS)
    assert blocks_of(done) == BLOCKS[1:]


def test_the_form_of_an_answer_reaches_the_engine(
    client: anthropic.Anthropic, opened: list[Any]
) -> None:
    output: Any = {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}}
    text = written(client, opened, output_config=output)
    assert "effort low" in text and "thinking" not in text
    assert opened[-1][1].structured_outputs.json == SCHEMA


def test_options_of_sampling_reach_the_engine(
    client: anthropic.Anthropic, opened: list[Any]
) -> None:
    extra = {"anthropic-beta": "something-2030-01-01"}
    fields = {"temperature": 0.5, "top_p": 0.75, "top_k": 3}  # newer clients do not name them
    written(client, opened, extra_headers=extra, extra_body=fields, stop_sequences=["a", "b"])
    params = opened[-1][1]
    assert (params.temperature, params.top_p, params.top_k) == (0.5, 0.75, 3)
    assert params.stop == ("a", "b") and params.max_tokens == 1


def test_beta_requests_are_the_same(client: anthropic.Anthropic) -> None:
    done = client.beta.messages.create(**{**ASKED, "max_tokens": 3}, betas=["context-1m-2030"])
    assert done.usage.output_tokens == 3


def test_tools_and_system_are_counted(client: anthropic.Anthropic) -> None:
    def count(**fields: Any) -> int:
        return client.messages.count_tokens(model=MODEL, messages=USER, **fields).input_tokens

    plain = count()
    assert plain == len(tokenizer(FULL).encode(
        f"<|im_start|>user\n{USER[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    ))  # fmt: skip
    assert count(system="Be brief.") > plain
    forced: Any = {"type": "any"}
    assert count(tools=TOOLS, tool_choice=forced) > plain


def test_async_streams_run_at_the_same_time(server: MockServer) -> None:
    async def ask(client: anthropic.AsyncAnthropic) -> int:
        async with client.messages.stream(**{**ASKED, "max_tokens": 9}) as stream:
            texts = [text async for text in stream.text_stream]
            message = await stream.get_final_message()
        assert "".join(texts) == message.content[0].text  # type: ignore[union-attr]
        return message.usage.output_tokens

    async def work() -> list[int]:
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key=KEY) as client:
            return await asyncio.gather(*(ask(client) for _ in range(5)))

    assert asyncio.run(work()) == [9] * 5


@pytest.mark.parametrize("options", [{}, {"api_key": None, "auth_token": KEY}, {"api_key": "no"}])
def test_a_key_may_come_in_either_header(server: MockServer, options: dict[str, Any]) -> None:
    with client_of(server, **options) as client:
        if "no" not in options.values():
            assert client.messages.count_tokens(model=MODEL, messages=USER).input_tokens
            return
        with pytest.raises(anthropic.AuthenticationError) as caught:
            client.messages.create(**ASKED)
    assert kind_of(caught.value) == "authentication_error"


def test_the_key_of_anthropic_s_header_is_one_for_all_paths(server: MockServer) -> None:
    with httpx.Client(base_url=server.url, headers={"x-api-key": KEY}, timeout=60) as http:
        assert http.get("/v1/models").status_code == 200
        http.headers["authorization"] = "Bearer wrong"
        assert http.get("/v1/models").status_code == 200
        http.headers["x-api-key"] = "wrong"
        assert http.get("/v1/models").status_code == 401


def test_keys_of_anthropic_s_header_have_caches_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with served(api_key=["one", "two"]) as server:
        salts: list[str | None] = []
        plain = server.engine.open

        async def noting(prompt: Any, params: Any, **options: Any) -> Any:
            salts.append(prompt.cache_salt)
            return await plain(prompt, params, **options)

        monkeypatch.setattr(server.engine, "open", noting)
        given: list[dict[str, str]] = [
            {"x-api-key": "one"}, {"x-api-key": "two"}, {"authorization": "Bearer one"},
            {"x-api-key": "one", "authorization": "Bearer no"},
        ]  # fmt: skip
        for headers in given:
            answer = server.http.post("/v1/messages", json=ASKED, headers=headers)
            assert answer.status_code == 200
    assert len({*salts}) == 2 and salts[0] == salts[2] == salts[3] != salts[1]


def kind_of(error: anthropic.APIStatusError) -> str:
    body: Any = error.body
    assert body["type"] == "error" and body["request_id"]
    return str(body["error"]["type"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"max_tokens": 0}, "max_tokens is 0"),
     ({"max_tokens": None}, "max_tokens"),
     ({"messages": []}, "messages has 0"),
     ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role must"),
     ({"messages": [{"role": "user", "content": [{"type": "document"}]}]},
      "messages[0].content[0].type is 'document'"),
     ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
      "messages[0].content[0].tool_use_id must be text"),
     ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file"}}]}]},
      "messages[0].content[0].source.type must be base64 or url"),
     ({"messages": [{"role": "user", "content": None}]}, "messages[0].content must be"),
     ({"messages": [*USER, {"role": "assistant", "content": [
         {"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]}, "ends with a tool_use"),
     ({"stop_sequences": ["a"] * 99}, "stop_sequences has 99 strings"),
     ({"top_p": 7}, "top_p is 7"), ({"stop": "a"}, "did you mean"),
     ({"container": "a"}, "container is not supported"),
     ({"tools": [{"name": "a"}]}, "tools[0].input_schema must be an object"),
     ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name must have"),
     ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "runs no tools"),
     ({"tools": TOOLS, "tool_choice": {"type": "some"}}, "tool_choice.type must be"),
     ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
     ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "nine"}}, "nine"),
     ({"thinking": {"type": "some"}}, "thinking.type"),
     ({"output_config": {"format": {"type": "json_object"}}}, "output_config.format.type")],
)  # fmt: skip
def test_a_wrong_request_is_refused_with_anthropic_s_error(
    client: anthropic.Anthropic, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(**{**ASKED, "extra_body": fields})
    assert kind_of(caught.value) == "invalid_request_error"
    message: Any = caught.value.body
    assert words in message["error"]["message"]


def test_a_form_that_the_engine_refuses_has_the_name_of_its_field(
    server: MockServer, client: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*args: Any, **options: Any) -> Any:
        raise InvalidValue("structured_outputs", "structured_outputs: no such schema")

    monkeypatch.setattr(server.engine, "open", refuse)
    output: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
    with pytest.raises(anthropic.BadRequestError, match=r"output_config\.format: no such schema"):
        client.messages.create(**ASKED, output_config=output)


def test_the_client_reads_the_id_of_its_request(client: anthropic.Anthropic) -> None:
    given = {"x-request-id": "mine-19"}
    done = client.messages.create(**{**ASKED, "max_tokens": 1}, extra_headers=given)
    assert done._request_id == "mine-19"
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(**{**ASKED, "max_tokens": 0}, extra_headers=given)
    assert caught.value.request_id == "mine-19"


def test_errors_have_anthropic_s_types(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(**{**ASKED, "model": "claude"})
    assert kind_of(missing.value) == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long: "):
        client.messages.create(**{**ASKED, "messages": [{"role": "user", "content": "a " * 9999}]})
    for path, status, kind in (
        ("/v1/messages/batches", 404, "not_found_error"), ("/v1/messages", 405, None),
    ):  # fmt: skip
        found = httpx.get(
            f"{str(client.base_url).rstrip(chr(47))}{path}", headers={"x-api-key": KEY}, timeout=60
        )
        assert found.status_code == status
        assert found.json()["error"]["type"] == (kind or "invalid_request_error")


def test_a_body_that_is_too_long_has_its_type() -> None:
    with (
        served(max_body_bytes=1000) as server, client_of(server) as client,
        pytest.raises(anthropic.APIStatusError) as caught,
    ):  # fmt: skip
        client.messages.create(**ASKED, system="a" * 2000)
    assert caught.value.status_code == 413 and kind_of(caught.value) == "request_too_large"


def test_a_full_queue_and_a_server_that_ends_have_their_types() -> None:
    made_up = MockOptions(max_num_seqs=0, max_queue_len=0)
    with (
        served(made_up) as server, client_of(server) as client,
        pytest.raises(anthropic.RateLimitError) as full,
    ):  # fmt: skip
        client.messages.create(**ASKED)
    assert kind_of(full.value) == "rate_limit_error"
    with served() as server, client_of(server) as client:
        server.engine.is_draining = True
        with pytest.raises(anthropic.APIStatusError) as draining:
            client.messages.create(**ASKED)
        assert draining.value.status_code == 503
    assert kind_of(draining.value) == "overloaded_error"


def test_an_error_within_a_stream_is_an_event() -> None:
    made_up = MockOptions(text="a" * 10**6, tokens_per_s=50)
    with served(made_up) as server, client_of(server) as client:
        stream = client.messages.create(**{**ASKED, "max_tokens": 4000}, stream=True)
        for event in stream:
            if event.type == "content_block_delta":
                break
        for one in list(server.engine.streams.values()):
            one.abort()
        with pytest.raises(anthropic.APIStatusError) as caught:
            list(stream)
    assert kind_of(caught.value) == "overloaded_error"


def test_images_follow_the_rules_for_media(client: anthropic.Anthropic) -> None:
    sources = [
        {"type": "base64", "media_type": "image/png", "data": "aGVsbG8="},
        {"type": "url", "url": "https://example.com/a.png"},
    ]
    for source in sources:
        content = [{"type": "image", "source": source}, {"type": "text", "text": "What is this?"}]
        with pytest.raises(anthropic.BadRequestError, match="image"):
            client.messages.create(**{**ASKED, "messages": [{"role": "user", "content": content}]})
