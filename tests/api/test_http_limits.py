"""Advisories of servers of language models: whatever a request names has a limit."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from contextlib import ExitStack
from typing import Any

import msgspec
import pytest

from nanovllm.api import logprobs
from nanovllm.api.chat_messages import checked_messages
from nanovllm.api.errors import ApiError
from nanovllm.api.fields import MAX_CONTAINERS, MAX_DEPTH, decoded
from nanovllm.api.generation import WholeAnswer
from nanovllm.api.http import MAX_BODIES, AccessRecord, BodyLimits, ClientGone, Exchange, Message
from nanovllm.api.schemas import ChatBody, CompletionBody
from nanovllm.chat import CutArguments
from nanovllm.schedule.logprobs import Logprob
from nanovllm.serving.async_engine import Delta
from scripts.bench.mock_engine import MockOptions
from tests.api.mock_api_server import TEMPLATE, MockServer, served
from tests.api.mock_api_server import tokenizer as made_tokenizer
from tests.api.security_cases import USER, ask, server
from tests.api.test_http_fuzz import HEAD, connect

__all__ = ["server"]  # a fixture
LONG_TOOL = {"type": "function", "function": {"name": "f", "description": "x" * 10**6}}
LONG_CALL = {
    "role": "assistant",
    "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": {"a": "x" * 10**6}}}
    ],
}


# unbounded fields ------------------------------------------------------------------------------


HUGE: dict[str, Any] = {
    "n": 10**9,
    "top_logprobs": 10**6,
    "prompt_logprobs": 10**6,
    "stop": ["x"] * 10**4,
    "logit_bias": {str(i): 1 for i in range(10**4)},
    "stop_token_ids": list(range(10**4)),
    "allowed_token_ids": [10**30],
    "bad_words": ["x" * 10**5],
    "tools": [{"type": "function", "function": {"name": "f"}}] * 1000,
    "messages": USER * 10**4,
    "priority": 10**30,
    "seed": 10**30,
    "top_k": 10**30,
    "request_id": "x" * 10**5,
    "model": "x" * 10**5,
    "temperature": 1e308 * 10,
}


@pytest.mark.parametrize("name", HUGE)
def test_unbounded_fields_are_bounded(server: MockServer, name: str) -> None:
    body: dict[str, Any] = {"messages": USER, "logprobs": True, name: HUGE[name]}
    start = time.process_time()
    if name == "temperature":  # JSON has no infinity
        kind = {"content-type": "application/json"}
        raw = b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": 1e400}'
        answer = server.http.post("/v1/chat/completions", content=raw, headers=kind)
    else:
        answer = ask(server, **body)
    assert answer.status_code in (400, 404), answer.text
    assert len(answer.content) < 1000 and time.process_time() - start < 2
    assert not server.engine.streams


@pytest.mark.parametrize("unit", ["[]", "{}", '{"a":[]}', '"[",[]'])
def test_unbounded_fields_a_body_of_many_small_values_is_not_decoded(
    monkeypatch: pytest.MonkeyPatch, unit: str
) -> None:
    """Ten million empty lists would take 700 MB and some seconds in the event loop."""
    data = b'{"messages": [%b]}' % ",".join([unit] * (MAX_CONTAINERS + 1)).encode()
    monkeypatch.setattr("msgspec.json.decode", None)
    with pytest.raises(ApiError, match=f"more than {MAX_CONTAINERS} lists"):
        decoded(data, ChatBody)


@pytest.mark.parametrize("unit", ["[", "{", '\\"[', "\\\\{"])
def test_unbounded_fields_brackets_in_a_text_are_text(unit: str) -> None:
    text = '"' + unit * (MAX_CONTAINERS + 1) + '"'
    assert decoded(b'{"prompt": %b}' % text.encode(), CompletionBody).prompt == json.loads(text)
    with pytest.raises(ApiError, match="not JSON"):
        decoded(b'{"prompt": %b' % text[:-1].encode(), CompletionBody)


def calls(*arguments: str) -> list[dict[str, Any]]:
    functions = ({"name": "f", "arguments": one} for one in arguments)
    made = [{"type": "function", "function": one} for one in functions]
    return [{"role": "assistant", "tool_calls": made}]


def test_unbounded_fields_arguments_of_calls_are_measured_before_they_are_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are text to the limits on a body."""
    most = 1 << 22
    half = json.dumps({"a": [[]] * (MAX_CONTAINERS // 2 - 2)})
    brackets = json.dumps({"a": "[" * MAX_CONTAINERS})
    for arguments in (half, brackets):
        clean, _ = checked_messages(calls(*[arguments] * 2), 9, most)
        found = [one["function"]["arguments"] for one in clean[0]["tool_calls"]]
        assert found == [json.loads(arguments)] * 2
    monkeypatch.setattr("msgspec.json.decode", None)
    with pytest.raises(ApiError, match=f"more than {MAX_CONTAINERS} lists and objects"):
        checked_messages(calls(half, half, "[[[[["), 9, most)
    with pytest.raises(ApiError, match="messages has 18 characters: at most 17 are allowed"):
        checked_messages(calls('{"a": [1]', "[1, 2, 3]"), 9, 17)


def test_unbounded_fields_arguments_that_are_too_deep_stay_text() -> None:
    for depth, kind in ((MAX_DEPTH - 1, dict), (MAX_DEPTH, CutArguments)):
        deep = '{"a": ' + "[" * depth + "]" * depth + "}"
        ((message,), _) = checked_messages(calls(deep), 9, 9999)
        assert type(message["tool_calls"][0]["function"]["arguments"]) is kind


def test_unbounded_fields_a_prompt_is_measured_before_it_is_encoded(
    server: MockServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*given: Any, **options: Any) -> list[int]:
        raise AssertionError("it was encoded")

    monkeypatch.setattr(server.engine.tokenizer, "encode", encode)
    for path, body in (
        ("/v1/completions", {"prompt": "x" * 10**6}),
        ("/v1/completions", {"prompt": ["x"] * 10**4}),
        ("/tokenize", {"prompt": "x" * 10**6}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 10**6}]}),
        ("/v1/chat/completions", {"messages": USER, "tools": [LONG_TOOL]}),
        ("/tokenize", {"messages": USER, "tools": [LONG_TOOL]}),
        ("/v1/chat/completions", {"messages": [{**USER[0], "name": "x" * 10**6}]}),
        ("/v1/chat/completions", {"messages": [*USER, LONG_CALL]}),
        ("/v1/chat/completions",
         {"messages": USER, "chat_template_kwargs": {"enable_thinking": "x" * 10**6}}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ["x" * 99] * 999}]}),
        # long because of the template: 99 characters for each message
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}] * 4096}),
    ):  # fmt: skip
        assert ask(server, path, **body).status_code == 400


def test_unbounded_fields_items_of_a_response_are_counted_before_they_are_joined(
    server: MockServer,
) -> None:
    item = {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "c"}
    start = time.process_time()
    answer = ask(server, "/v1/responses", input=[item] * 10**5)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "input"
    assert time.process_time() - start < 10


@pytest.mark.parametrize("name", ["guided_choice", "structured_outputs"])
def test_unbounded_fields_choices_are_counted_before_they_are_checked(
    server: MockServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def check(*given: Any) -> Any:
        raise AssertionError("they were checked")

    monkeypatch.setattr("nanovllm.structured_params.checked", check)
    choices = ["x"] * (1 << 18)
    value = choices if name == "guided_choice" else {"choice": choices}
    error = ask(server, "/v1/completions", prompt="a", **{name: value}).json()["error"]
    assert error["param"] == name
    assert error["message"] == f"{name} has 262144 choices: at most 65536 are allowed"


@pytest.mark.parametrize("field", ["content", "tool_calls"])
def test_unbounded_fields_the_parts_and_calls_of_a_message_are_counted(
    server: MockServer, field: str
) -> None:
    message = {"role": "assistant", "content": "a", field: [{}] * 10**5}
    error = ask(server, messages=[message]).json()["error"]
    assert error["param"] == f"messages[0].{field}"
    assert error["message"] == f"messages[0].{field} has 100000 entries: at most 4096 are allowed"


@pytest.mark.parametrize("strict", [False, True])
def test_unbounded_fields_schemas_of_tools_are_measured_before_a_grammar_is_built(
    server: MockServer, monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    def build(*given: Any, **options: Any) -> Any:
        raise AssertionError("it was built")

    for name in ("call_schema", "required_schema", "structural_tag"):
        monkeypatch.setattr(f"nanovllm.api.tools.{name}", build)
    names = {str(number): {"type": "string"} for number in range(10**5)}
    function = {"name": "f", "strict": strict, "parameters": {"properties": names}}
    for choice in (
        ["auto"] if strict else ["required", {"type": "function", "function": {"name": "f"}}]
    ):
        body = {"tools": [{"type": "function", "function": function}], "tool_choice": choice}
        error = ask(server, messages=USER, **body).json()["error"]
        assert error["param"] == "tools" and "at most 262144 are allowed" in error["message"]


def test_unbounded_fields_tokenize_checks_tools_as_chat_does(server: MockServer) -> None:
    for tools in ([{"type": "function", "function": {"name": "f"}}] * 129, [{"type": "function"}]):
        for path in ("/tokenize", "/v1/chat/completions"):
            answer = ask(server, path, messages=USER, tools=tools)
            assert answer.status_code == 400 and answer.json()["error"]["param"][:5] == "tools"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "a b " * 3000, "return_token_strs": True}),
        ("/tokenize", {"messages": [{"role": "user", "content": [""] * 4096}] * 2}),
        ("/detokenize", {"tokens": [5] * 9999}),
        ("/v1/completions", {"prompt": "a b " * 3000, "add_special_tokens": False}),
        ("/v1/chat/completions", {"messages": USER, "tools": [
            {"type": "function", "function": {"name": "f", "description": "a b " * 3000}}
        ]}),
    ],
    ids=range(5),
)  # fmt: skip
def test_unbounded_fields_long_texts_do_not_block_the_event_loop(
    server: MockServer, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    tokenizer, threads = server.engine.tokenizer, set()
    assert tokenizer is not None
    assert ask(server, messages=USER, max_tokens=1).status_code == 200, "the template is read"

    def noting(name: str) -> Any:
        work = getattr(tokenizer, name)

        def noted(*given: Any, **options: Any) -> Any:
            threads.add(threading.current_thread())
            return work(*given, **options)

        return noted

    for name in ("encode", "decode"):
        monkeypatch.setattr(tokenizer, name, noting(name))
    ask(server, path, **body)
    assert threads and server.thread not in threads


@pytest.mark.parametrize(
    "fields",
    [{"prompt": ["a b " * 50] * 24}, {"prompt": ["a b " * 50] * 24, "add_special_tokens": False},
     {"prompt": [[5] * 200] * 24, "echo": True}],
    ids=["texts", "bare", "echo"],
)  # fmt: skip
def test_unbounded_fields_short_prompts_are_counted_together(
    server: MockServer, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    """Each of them is short enough for the event loop, all of them are not."""
    tokenizer, threads = server.engine.tokenizer, []
    assert tokenizer is not None
    encode, decode = tokenizer.encode, tokenizer.decode

    def encoded(text: str, **options: Any) -> Any:
        threads.append(threading.current_thread())
        return encode(text, **options)

    def all_encoded(texts: list[str], **options: Any) -> Any:
        return [encoded(text, **options) for text in texts]

    def decoded(token_ids: list[int], *options: Any) -> str:
        if len(token_ids) > 1:  # else a token of an answer
            threads.append(threading.current_thread())
        return decode(token_ids, *options)

    for name, work in (("encode", encoded), ("encode_all", all_encoded), ("decode", decoded)):
        monkeypatch.setattr(tokenizer, name, work, raising=False)
    answer = ask(server, "/v1/completions", max_tokens=1, **fields)
    assert answer.status_code == 200, answer.text
    assert len(threads) == 24 and server.thread not in threads


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_unbounded_fields_many_log_probabilities_are_written_beside_the_event_loop(
    server: MockServer, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    threads, plain = [], logprobs.of_prompt

    def noted(found: Any) -> Any:
        threads.append(threading.current_thread())
        return plain(found)

    monkeypatch.setattr(logprobs, "of_prompt", noted)
    for text in ("a", "many words " * 30):
        given = {"prompt": text} if path == "/v1/completions" else {"messages": [
            {"role": "user", "content": text}
        ]}  # fmt: skip
        assert ask(server, path, **given, prompt_logprobs=20, max_tokens=1).status_code == 200
    assert [one is server.thread for one in threads] == [True, False]


@pytest.mark.parametrize("given", [{"prompt_logprobs": 4}, {"echo": True, "logprobs": 4}])
def test_log_probabilities_of_prompts_are_limited_in_all(given: dict[str, Any]) -> None:
    path = "/v1/completions"
    with served(max_prompt_logprobs=60) as server:
        for prompts, n, status in (
            ([[5] * 12], 1, 200), ([[5] * 13], 1, 400), ([[5] * 6] * 2, 1, 200),
            ([[5] * 6] * 3, 1, 400), ([[5] * 6], 2, 200), ([[5] * 6], 3, 400),
        ):  # fmt: skip
            answer = ask(server, path, prompt=prompts, n=n, max_tokens=1, **given)
            assert answer.status_code == status, answer.text
            if status == 400:
                num = sum(map(len, prompts)) * 5 * n
                assert f"are {num} log-probabilities: at most 60" in answer.text
        assert not server.engine.streams
        assert ask(server, path, prompt=[5] * 99, max_tokens=1, logprobs=4).status_code == 200


@pytest.mark.parametrize(
    ("prompts", "n", "max_tokens", "num"),
    [([[5]], 3, 4, 60), ([[5]], 4, 4, 80), ([[5]] * 3, 1, 4, 60), ([[5]] * 2, 2, 4, 80),
     ([[5] * 253], 4, 99, 60), ([[5] * 252], 4, 99, 80), ([[5]], 1, 99, 0)],
)  # fmt: skip
def test_log_probabilities_of_answers_are_limited_in_all(
    prompts: list[list[int]], n: int, max_tokens: int, num: int
) -> None:
    """A single answer has no limit of its own."""
    with served(MockOptions(max_model_len=256), max_answer_logprobs=60) as server:
        answer = ask(server, "/v1/completions", prompt=prompts, n=n, max_tokens=max_tokens,
                     logprobs=4)  # fmt: skip
        assert answer.status_code == (200 if num <= 60 else 400), answer.text
        if num > 60:
            assert f"are {num} log-probabilities: at most 60" in answer.text
            assert answer.json()["error"]["param"] == "logprobs"
        assert not server.engine.streams


def test_without_max_tokens_the_log_probabilities_of_several_answers_fill_the_context() -> None:
    with served(MockOptions(max_model_len=256), TEMPLATE, max_answer_logprobs=999) as server:
        for n, status in ((1, 200), (2, 400)):
            fields = {"messages": USER, "logprobs": True, "top_logprobs": 4, "n": n}
            assert ask(server, "/v1/chat/completions", **fields).status_code == status


def test_an_answer_in_many_parts_is_not_copied_for_each() -> None:
    top, whole = {65: Logprob(-0.5, 1, 65, None)}, WholeAnswer()
    whole.add(Delta(0, "A", [65], [top]))
    first = whole.logprobs
    whole.add(Delta(0, "A", [65], [top]))
    assert whole.logprobs == [top, top] and whole.logprobs is first


def test_each_position_of_a_prompt_is_encoded_alone() -> None:
    """msgspec lets no other thread run while it encodes."""
    top = {65: Logprob(-0.5, 1, 65, made_tokenizer()), 300: Logprob(float("-inf"), 2, 300, None)}
    found = logprobs.of_prompt([None, top])
    assert found[0] is None and isinstance(found[1], msgspec.Raw)
    whole = logprobs.of_completion([65, 65], [None, top], 2, True, 0)
    assert isinstance(whole["top_logprobs"][1], msgspec.Raw)
    shown = json.loads(msgspec.json.encode([found, whole["top_logprobs"]]))
    assert shown[0][1]["300"] == {"logprob": -9999.0, "rank": 2, "decoded_token": None}
    assert shown[1] == [None, {"token_id:65": -0.5, "token_id:300": -9999.0}]


def test_each_token_is_decoded_once_for_log_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = made_tokenizer()
    decoded: list[Any] = []
    plain = tokenizer._decode

    def noted(token_ids: Any, skips: bool) -> str:
        decoded.append(token_ids)
        return plain(token_ids, skips)

    for token_id in (65, 300):
        tokenizer.text_of(token_id)
    monkeypatch.setattr(tokenizer, "_decode", noted)
    found = [Logprob(-0.5, 1, token_id, tokenizer) for token_id in (65, 300) * 9]
    assert {one.decoded_token for one in found} == {plain([65], False), plain([300], False)}
    assert not decoded


def test_bodies_that_are_being_received_are_bounded_together() -> None:
    """Those that do not fit are refused; their bytes count until a body is complete."""
    most = 1000
    body = b'{"prompt": "a", "max_tokens": 1}'.rjust(most)
    head = HEAD + b"content-length: %d\r\n\r\n" % most
    with served(max_body_bytes=most) as one, ExitStack() as stack:
        limits = one.service.bodies
        socks = [stack.enter_context(connect(one)) for _ in range(MAX_BODIES)]
        for sock in socks:
            sock.sendall(head + body[:-1])
        while limits.num_held < MAX_BODIES * (most - 1):
            time.sleep(0.001)
        answer = ask(one, "/v1/completions", prompt="a" * 99)
        assert answer.status_code == 503 and answer.headers["retry-after"]
        words = "the bodies being received have 31968 bytes and .* at most 32000 are kept"
        assert re.match(words, answer.json()["error"]["message"])
        assert ask(one, "/v1/completions", prompt="a").status_code == 200, "it is short enough"
        socks[0].sendall(body[-1:])
        assert b" 200 " in socks[0].recv(1 << 16)
        assert ask(one, "/v1/completions", prompt="a" * 99).status_code == 200
        for sock in socks[1:]:
            sock.close()
        while limits.num_held:
            time.sleep(0.001)


@pytest.mark.parametrize("num_bytes", [99, 101, 399, 401])
@pytest.mark.parametrize("ends", ["complete", "late", "gone"])
def test_bytes_of_a_body_are_given_back_however_it_ends(num_bytes: int, ends: str) -> None:
    limits = BodyLimits(100, 0.01 if ends == "late" else 60.0)
    limits.num_held = limits.max_held - 50
    parts = [b"x" * 25] * (num_bytes // 25) + [b"x" * (num_bytes % 25)]

    async def receive() -> Message:
        if parts:
            more = len(parts) > 1 or ends != "complete"
            return {"type": "http.request", "body": parts.pop(0), "more_body": more}
        if ends == "late":
            await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        raise AssertionError("nothing is answered here")

    scope = {"headers": [(b"content-type", b"application/json")]}
    exchange = Exchange(scope, receive, send, AccessRecord("r"))
    with pytest.raises((ApiError, ClientGone)) as caught:
        asyncio.run(exchange.body(limits))
    assert limits.num_held == limits.max_held - 50 and not (ends == "complete" and parts)
    if num_bytes > 400:
        assert isinstance(caught.value, ApiError) and caught.value.status == 413
    elif ends == "gone":
        assert isinstance(caught.value, ClientGone)
    else:
        found = {"complete": 503 if num_bytes < 100 else 413, "late": 408}[ends]
        assert isinstance(caught.value, ApiError) and caught.value.status == found


def test_unbounded_fields_a_large_max_tokens_is_what_the_model_allows(server: MockServer) -> None:
    answer = ask(server, messages=USER, max_tokens=10**30, min_tokens=10**29).json()
    assert answer["usage"]["total_tokens"] == server.engine.max_model_len
