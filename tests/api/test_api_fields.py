"""Every field of OpenAI's and Anthropic's API works or is refused by its name."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgspec
import pytest

from nanovllm.api.errors import ApiError
from nanovllm.api.fields import REFUSED as REFUSED_FIELDS
from nanovllm.api.fields import decoded
from nanovllm.api.openapi import POSTS
from tests.api.fields import CASES, ENDPOINTS, PAGE, TOOLS, Seen, names, page, refusals
from tests.api.mock_api_server import MODEL, PLAIN_TEMPLATE, TEMPLATE, MockServer, served

WORKING = [(endpoint, name) for endpoint, cases in CASES.items() for name in cases]
REFUSED = [(endpoint, name) for endpoint in ENDPOINTS for name in refusals(endpoint)]
VALUES: tuple[Any, ...] = ("something", 19, True, {"a": 1}, ["a"])


@pytest.fixture(scope="module")
def server() -> Iterator[MockServer]:
    with served(template=TEMPLATE) as one:
        yield one


@pytest.fixture
def opened(server: MockServer, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, int]]:
    """The prompts, parameters and priorities that reach the engine."""
    found: list[tuple[Any, Any, int]] = []
    plain = server.engine.open

    async def noting(prompt: Any, params: Any, **options: Any) -> Any:
        found.append((prompt, params, options["priority"]))
        return await plain(prompt, params, **options)

    monkeypatch.setattr(server.engine, "open", noting)
    return found


def body_of(endpoint: str) -> dict[str, Any]:
    if endpoint == "/v1/completions":
        return {"model": MODEL, "prompt": "hello", "max_tokens": 3}
    if endpoint == "/v1/responses":
        return {"model": MODEL, "input": "Hi", "max_output_tokens": 3}
    return {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}


def read(response: httpx.Response) -> Any:
    """The JSON of an answer, or of each of its events."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        return response.json()
    lines = [line for line in response.text.splitlines() if line.startswith("data: ")]
    texts = [line.removeprefix("data: ") for line in lines]
    return [text if text == "[DONE]" else json.loads(text) for text in texts]


@pytest.mark.parametrize(("endpoint", "name"), WORKING)
def test_a_field_that_works_has_its_effect(
    server: MockServer, opened: list[Any], caplog: pytest.LogCaptureFixture, endpoint: str,
    name: str,
) -> None:  # fmt: skip
    case = CASES[endpoint][name]
    body = {**body_of(endpoint), **case.others, name: case.value}
    if name == "max_completion_tokens":
        del body["max_tokens"]
    with caplog.at_level(logging.INFO, logger="nanovllm.api.access"):
        response = server.http.post(endpoint, json=body)
        assert response.status_code == 200, response.text
        while not caplog.messages:  # the server logs after its answer
            time.sleep(0.001)
    prompt, params, priority = opened[-1]
    log = json.loads(caplog.messages[-1])
    assert case.shows(Seen(params, prompt, priority, read(response), log)), name


@pytest.mark.parametrize(("endpoint", "name"), REFUSED)
def test_a_field_that_is_refused_is_named(
    server: MockServer, opened: list[Any], endpoint: str, name: str
) -> None:
    allowed = refusals(endpoint)[name].allowed
    for value in [one for one in VALUES if one not in allowed]:
        response = server.http.post(endpoint, json={**body_of(endpoint), name: value})
        assert response.status_code == 400, (name, value)
        error = response.json()["error"]
        if endpoint == "/v1/messages":  # its errors have no such member
            assert name in error["message"]
        else:
            assert error["param"] == name
    assert not opened
    for value in (*allowed, None):
        response = server.http.post(endpoint, json={**body_of(endpoint), name: value})
        assert response.status_code == 200, response.text


@pytest.mark.parametrize("kind", dict.fromkeys(POSTS.values()), ids=lambda kind: kind.__name__)
def test_a_field_that_is_unknown_is_named(kind: type[msgspec.Struct]) -> None:
    with pytest.raises(ApiError, match="there is no field 'speling'") as caught:
        decoded(b'{"speling": 1}', kind)
    assert (caught.value.status, caught.value.param) == (400, "speling")


def test_every_kind_of_body_is_in_the_table_of_refused_fields() -> None:
    assert set(REFUSED_FIELDS) == set(POSTS.values())


def test_tools_that_the_template_does_not_read_are_refused() -> None:
    with served(template=PLAIN_TEMPLATE) as plain:
        body = {**body_of("/v1/chat/completions"), "tools": TOOLS, "tool_choice": "required"}
        response = plain.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400 and response.json()["error"]["param"] == "tools"


@pytest.mark.parametrize("name", ["chat_template_kwargs", "reasoning_effort"])
def test_variables_that_the_template_does_not_read_fail_no_request(name: str) -> None:
    case = CASES["/v1/chat/completions"][name]
    with served() as plain:
        body = body_of("/v1/chat/completions")
        answers = [
            plain.http.post("/v1/chat/completions", json={**body, "seed": 1, **more}).json()
            for more in ({}, {name: case.value})
        ]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["usage"] == answers[1]["usage"]


@pytest.mark.parametrize(
    ("endpoint", "effort"),
    [("/v1/chat/completions", lambda one: {"reasoning_effort": one}),
     ("/v1/responses", lambda one: {"reasoning": {"effort": one}})],
)  # fmt: skip
def test_an_effort_of_none_turns_thinking_off(
    server: MockServer, opened: list[Any], endpoint: str, effort: Callable[[str], dict[str, Any]]
) -> None:
    def thinks(**fields: Any) -> bool:
        response = server.http.post(endpoint, json={**body_of(endpoint), **fields})
        assert response.status_code == 200, response.text
        return not opened[-1][0].text.endswith("<think></think>")

    assert not thinks(**effort("none")) and thinks(**effort("low")) and thinks()
    if endpoint == "/v1/chat/completions":  # the other has no such field
        assert thinks(**effort("none"), chat_template_kwargs={"enable_thinking": True})
        assert not thinks(**effort("low"), chat_template_kwargs={"enable_thinking": False})


def test_every_field_of_the_client_s_types_and_of_ours_is_in_the_table() -> None:
    for endpoint in ENDPOINTS:
        assert set(names(endpoint)) == {*CASES[endpoint], *refusals(endpoint)}


def test_the_page_is_that_of_the_tables() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.api.fields"
