"""A test for each class of advisories that servers of language models have had."""

from __future__ import annotations

import ast
import json
import logging
import pickle
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from nanovllm.api import logprobs
from nanovllm.api.app import ROUTES
from nanovllm.api.config import ALWAYS_OPEN, ServerConfig
from nanovllm.api.errors import ApiError
from nanovllm.api.fields import MAX_CONTAINERS, decoded
from nanovllm.api.page import files
from nanovllm.api.schemas import ChatBody, CompletionBody
from nanovllm.schedule.logprobs import Logprob
from scripts.bench.mock_engine import MockOptions
from tests.api.mock_api_server import MODEL, TEMPLATE, MockServer, served
from tests.api.mock_api_server import tokenizer as made_tokenizer

ROOT = Path(__file__).parents[2]
KEYS = ["first-key", "second-key"]
LONG_TOOL = {"type": "function", "function": {"name": "f", "description": "x" * 10**6}}
LONG_CALL = {
    "role": "assistant",
    "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": {"a": "x" * 10**6}}}
    ],
}
USER: Any = [{"role": "user", "content": "Hi"}]
UNPICKLING = ("pickle", "cloudpickle", "dill", "marshal", "shelve", "zmq")
SECRET = "/home/somebody/secret-folder"


@pytest.fixture(scope="module")
def server() -> Iterator[MockServer]:
    with served(MockOptions(max_model_len=256), TEMPLATE) as one:
        yield one


@pytest.fixture(scope="module")
def locked() -> Iterator[MockServer]:
    with served(api_key=KEYS) as one:
        yield one


def ask(server: MockServer, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    return server.http.post(path, json=body)


# unpickling on sockets -----------------------------------------------------------------------


def test_unpickling_on_sockets_nothing_of_the_server_can_unpickle() -> None:
    for folder in ("api", "serving", "parsers"):
        for path in (ROOT / "nanovllm" / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names = [str(node.module)]
                for name in names:
                    top = name.split(".")[0]
                    assert top not in (
                        "pickle",
                        "cloudpickle",
                        "dill",
                        "marshal",
                        "shelve",
                        "zmq",
                    ), f"{path} imports {name}"


def test_unpickling_on_sockets_a_pickle_as_a_body_is_not_run(
    server: MockServer, tmp_path: Path
) -> None:
    trace = tmp_path / "it-ran"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trace,)

    for kind in ("application/json", "application/octet-stream", "application/x-pickle"):
        answer = server.http.post(
            "/v1/completions", content=pickle.dumps(Bomb()), headers={"content-type": kind}
        )
        assert answer.status_code in (400, 415)
    assert not trace.exists()


# templates and regular expressions -------------------------------------------------------------


@pytest.mark.parametrize("name", ["chat_template", "chat_template_kwargs"])
def test_template_denial_of_service_no_template_comes_from_a_request(
    server: MockServer, name: str
) -> None:
    loop = "{% for i in range(10**12) %}{% endfor %}"
    value = loop if name == "chat_template" else {"chat_template": loop}
    start = time.monotonic()
    for path in ("/v1/chat/completions", "/tokenize"):
        assert ask(server, path, messages=USER, **{name: value}).status_code == 400
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    "variables",
    [{"tokenize": True}, {"messages": []}, {"add_generation_prompt": False}, {"tools": []},
     {"return_tensors": "pt"}, {"self": 1}, {"conversation": 1}, {f"v{i}": i for i in range(99)}],
    ids=str,
)  # fmt: skip
def test_template_denial_of_service_variables_replace_no_options(
    server: MockServer, variables: dict[str, Any]
) -> None:
    """Those that the template does not read are left out."""
    plain = ask(server, "/tokenize", messages=USER).json()
    answer = ask(server, "/tokenize", messages=USER, chat_template_kwargs=variables)
    if variables.keys() & {"tokenize", "return_tensors", "self", "conversation"}:
        assert answer.json()["tokens"] == plain["tokens"]
    else:
        assert answer.status_code == 400, answer.text


def test_template_denial_of_service_contents_are_not_templates(server: MockServer) -> None:
    given = "{{ ''.__class__.__mro__ }}{% for i in range(10**9) %}x{% endfor %}"
    content = [{"role": "user", "content": given}]
    found = ask(server, "/tokenize", messages=content).json()
    assert given in ask(server, "/detokenize", tokens=found["tokens"]).json()["prompt"]


@pytest.mark.parametrize("name", ["structured_outputs", "guided_grammar", "guided_regex"])
def test_regex_denial_of_service_texts_of_requests_are_not_run_here(
    server: MockServer, name: str
) -> None:
    """The form goes to the engine, which compiles it with limits (tests/structured)."""
    bomb = "(" * 2000 + "a+" + ")+" * 2000
    value = {"regex": bomb} if name == "structured_outputs" else bomb
    start = time.monotonic()
    ask(server, messages=USER, max_tokens=1, **{name: value})
    assert time.monotonic() - start < 2


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
    start = time.monotonic()
    if name == "temperature":  # JSON has no infinity
        kind = {"content-type": "application/json"}
        raw = b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": 1e400}'
        answer = server.http.post("/v1/chat/completions", content=raw, headers=kind)
    else:
        answer = ask(server, **body)
    assert answer.status_code in (400, 404), answer.text
    assert len(answer.content) < 1000 and time.monotonic() - start < 2
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
    start = time.monotonic()
    answer = ask(server, "/v1/responses", input=[item] * 10**5)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "input"
    assert time.monotonic() - start < 10


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


def test_unbounded_fields_a_large_max_tokens_is_what_the_model_allows(server: MockServer) -> None:
    answer = ask(server, messages=USER, max_tokens=10**30, min_tokens=10**29).json()
    assert answer["usage"]["total_tokens"] == server.engine.max_model_len


# fetching of URLs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme", ["http", "https", "file", "ftp", "", "data:image/png;base64,iVBORw0KGgo="]
)
def test_url_fetching_a_request_opens_no_connection_and_no_file(
    server: MockServer, scheme: str, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        url = scheme if "," in scheme else f"{scheme}://{address}/x"
        if scheme in ("file", ""):
            url = f"{scheme}{'://' if scheme else ''}{tmp_path}/x.png"
        for kind in ("image_url", "video_url", "audio_url"):
            part = {"type": kind, kind: {"url": url}}
            content = [{"role": "user", "content": [part]}]
            assert ask(server, messages=content).status_code == 400
        with pytest.raises(TimeoutError):
            listener.accept()


# missing authentication ---------------------------------------------------------------------------

PATHS = [*ROUTES, "/v1/models/x", "/v1/unknown", "/unknown", "/docs", *files()]


@pytest.mark.parametrize(
    "header", [None, "Bearer", "Bearer wrong", "Bearer first-ke", "Bearer first-keyy", "first-key",
               "Basic Zmlyc3Q="],
)  # fmt: skip
def test_missing_auth_every_path_but_health_needs_a_key(
    locked: MockServer, header: str | None
) -> None:
    headers = {} if header is None else {"authorization": header}
    for path in set(PATHS) - set(ALWAYS_OPEN):
        for method in ("GET", "POST", "HEAD", "OPTIONS", "DELETE"):
            answer = locked.http.request(method, path, headers=headers)
            assert answer.status_code == 401, (method, path)


SPELLINGS = (
    "//v1/models", "/v1/../v1/models", "/V1/models", "/health/", "/health/../metrics",
    "/%68ealth/../metrics", "/health%2f",
)  # fmt: skip


@pytest.mark.parametrize("path", SPELLINGS)
def test_missing_auth_no_spelling_of_a_path_goes_around_the_key(
    locked: MockServer, path: str
) -> None:
    with socket.create_connection((locked.host, locked.port)) as sock:
        sock.sendall(
            f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()
        )
        assert b" 401 " in sock.recv(1 << 16)


def test_missing_auth_each_key_opens_and_health_needs_none(locked: MockServer) -> None:
    for key in KEYS:
        headers = {"authorization": f"Bearer {key}"}
        assert locked.http.get("/metrics", headers=headers).status_code == 200
    for path in ALWAYS_OPEN:
        assert locked.http.get(path).status_code == 200


def test_missing_auth_keys_are_not_in_texts_of_the_options() -> None:
    config = ServerConfig(api_key=KEYS)
    assert not any(key in f"{config} {config!r}" for key in KEYS)
    with pytest.raises(ValueError, match="secret") as caught:
        ServerConfig(api_key="a single text\n")  # type: ignore[arg-type]
    assert "single" not in str(caught.value)


def test_missing_auth_pages_of_other_origins_read_nothing(server: MockServer) -> None:
    origin = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    for method in ("GET", "OPTIONS", "POST"):
        answer = server.http.request(method, "/v1/models", headers=origin)
        assert not any(name.startswith("access-control") for name in answer.headers)
    # without a content type that a browser must ask about, a page could at least send
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = server.http.post(
            "/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": kind}
        )
        assert answer.status_code == 415


def test_missing_auth_an_allowed_origin_alone_may_read() -> None:
    with served(allowed_origins=["https://good.example"]) as open_one:
        for origin, allowed in (("https://good.example", True), ("https://evil.example", False)):
            answer = open_one.http.get("/v1/models", headers={"origin": origin})
            assert ("access-control-allow-origin" in answer.headers) is allowed


# what the npm package openai sends from a browser
STAINLESS = (
    "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,"
    "x-stainless-package-version,x-stainless-retry-count,x-stainless-runtime,"
    "x-stainless-runtime-version,x-stainless-timeout"
)


@pytest.mark.parametrize("origins", [["https://good.example"], ["*"]])
def test_missing_auth_scripts_of_an_allowed_origin_send_headers_of_their_own(
    origins: list[str],
) -> None:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": STAINLESS}
    with served(allowed_origins=origins, api_key=["a-key"]) as one:
        for origin in ("https://good.example", "https://evil.example"):
            is_allowed = origin in origins or "*" in origins
            headers = {"origin": origin, **asked}
            answer = one.http.options("/v1/chat/completions", headers=headers)
            assert (answer.status_code == 200) is is_allowed
            if is_allowed:
                given = answer.headers["access-control-allow-headers"]
                assert set(STAINLESS.split(",")) <= set(given.replace(" ", "").split(","))
                answer = one.http.get("/v1/models", headers={"origin": origin})
                assert answer.status_code == 401 and "x-request-id" in answer.headers
                exposed = answer.headers["access-control-expose-headers"]
                assert "x-request-id" in exposed and "retry-after" in exposed


# DNS rebinding --------------------------------------------------------------------------------

LOCAL = (
    "localhost", "LocalHost:8000", "localhost.", "127.0.0.1", "127.9.9.9:1", "[::1]:8000",
    "[::ffff:127.0.0.1]",
)  # fmt: skip
FOREIGN = (
    "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example",
    "evil.example@localhost", "localhost:8000@evil.example", "localhost evil.example", "192.0.2.1",
    "0.0.0.0", "[2001:db8::1]", "[::1", "::1", "", "*", "a" * 10_000,
)  # fmt: skip


def raw(server: MockServer, path: str, hosts: Sequence[str]) -> tuple[int, bytes]:
    """The status and the answer of a request with these headers Host."""
    lines = [f"GET {path} HTTP/1.1", *(f"Host: {one}" for one in hosts), "Connection: close"]
    with socket.create_connection((server.host, server.port), timeout=20) as sock:
        sock.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        with sock.makefile("rb") as file:
            answer = file.read()
    return int(answer.split()[1]), answer


@pytest.mark.parametrize("path", sorted({*PATHS} - {*ALWAYS_OPEN}))
def test_dns_rebinding_on_loopback_every_path_refuses_a_foreign_host(
    server: MockServer, path: str
) -> None:
    """The error is the server's usual one and names the option."""
    status, answer = raw(server, path, ["evil.example:8000"])
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert status == 421 and error.get("code", "unknown_host") == "unknown_host"
    assert "'evil.example:8000'" in error["message"] and "allowed_hosts" in error["message"]


def test_dns_rebinding_no_spelling_of_a_foreign_host_is_taken_for_a_local_one(
    server: MockServer,
) -> None:
    for host in FOREIGN:
        assert raw(server, "/v1/models", [host])[0] == 421, host
    for hosts in ([], ["localhost", "evil.example"], ["evil.example", "localhost"]):
        assert raw(server, "/v1/models", hosts)[0] == 421, hosts


def test_dns_rebinding_names_of_loopback_stay_allowed_with_any_port(server: MockServer) -> None:
    for host in LOCAL:
        assert raw(server, "/v1/models", [host])[0] == 200, host


def test_dns_rebinding_probes_of_health_may_use_any_address_or_none(server: MockServer) -> None:
    for path in ALWAYS_OPEN:
        for hosts in (["10.1.2.3:8000"], ["evil.example"], []):
            assert raw(server, path, hosts)[0] == 200, (path, hosts)


@pytest.mark.parametrize(
    ("options", "allowed", "refused"),
    [
        ({"allowed_hosts": ["Api.example.org", "[2001:db8::1]"]},
         ["api.example.org", "API.example.org.:443", "[2001:DB8::1]:8000", "localhost"],
         ["example.org", "x.api.example.org"]),
        ({"allowed_hosts": ["2001:db8:0:0::1"]}, ["[2001:db8::1]"], ["[2001:db8::2]"]),
        ({"allowed_hosts": ["."]}, ["localhost"], ["", ".", "localhost evil.example"]),
        ({"allowed_hosts": ["*"]}, ["evil.example", ""], []),
        ({"host": "0.0.0.0"}, ["evil.example", "192.0.2.1:8000"], []),
        ({"host": "0.0.0.0", "allowed_hosts": ["api.example.org"]},
         ["api.example.org", "0.0.0.0:8000", "127.0.0.1"], ["evil.example", "192.0.2.1"]),
        ({"host": "127.0.0.2"}, ["127.0.0.2"], ["evil.example"]),
        ({"host": "localhost"}, ["localhost"], ["evil.example"]),
    ],
    ids=str,
)  # fmt: skip
def test_dns_rebinding_hosts_are_those_of_the_option_and_of_the_address(
    options: dict[str, Any], allowed: list[str], refused: list[str]
) -> None:
    with served(**options) as one:
        for host in allowed:
            assert raw(one, "/v1/models", [host])[0] == 200, host
        for host in refused:
            assert raw(one, "/v1/models", [host])[0] == 421, host


# messages that leak -------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyError, OSError, MemoryError, RecursionError])
def test_leaking_errors_a_mistake_of_ours_tells_neither_paths_nor_prompts(
    server: MockServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    error: type[Exception],
) -> None:  # fmt: skip
    async def fail(prompt: Any, *given: Any, **options: Any) -> Any:
        raise error(f"{SECRET}: {prompt}")

    monkeypatch.setattr(server.engine, "open", fail)
    with caplog.at_level(logging.DEBUG):
        answer = ask(server, "/v1/completions", prompt="my confession")
    assert answer.status_code == 500
    for text in (answer.text, caplog.text):
        assert SECRET not in text and "confession" not in text and "/nanovllm/" not in text
    assert error.__name__ in caplog.text, "the log says what has happened, and where"


def test_leaking_errors_the_path_of_the_model_stays_here(
    server: MockServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name by which clients know the model takes its place."""
    path = "/srv/secret/checkpoint"

    async def fail(*given: Any, **options: Any) -> Any:
        raise ValueError(f"{path!r} has no tokenizer")

    monkeypatch.setattr(server.engine, "open", fail)
    monkeypatch.setattr(server.engine, "config", replace(server.engine.config, model=path))
    answer = ask(server, "/v1/completions", prompt="a")
    assert answer.status_code == 400 and "secret" not in answer.text
    assert answer.json()["error"]["message"] == f"{MODEL!r} has no tokenizer"


def test_leaking_errors_a_folder_s_path_is_not_the_model_s_name(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert ServerConfig().model_names(str(folder)) == ("my-model",)


def test_leaking_errors_prompts_are_logged_only_if_asked(caplog: pytest.LogCaptureFixture) -> None:
    for asked in (False, True):
        caplog.clear()
        with caplog.at_level(logging.DEBUG), served(log_prompts=asked) as one:
            ask(one, "/v1/completions", prompt="my confession\n{}", user="x\nstatus: 200")
        assert ("confession" in caplog.text) is asked
        lines = [text for text in caplog.messages if '"path"' in text]
        assert len(lines) == 1 and "\n" not in lines[0]


def test_leaking_errors_answers_say_nothing_of_the_software(server: MockServer) -> None:
    for path in ("/health", "/unknown"):
        answer = server.http.get(path)
        assert "server" not in answer.headers and "Traceback" not in answer.text
