"""Options of the server with vLLM's names: what they do to requests."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from nanovllm.api.config import ServerConfig
from nanovllm.api.prompts import PromptMaker
from nanovllm.config import EngineConfig
from nanovllm.parsers import reasoning_parser, tool_parser
from scripts.bench.mock_engine import MockEngine
from tests.api.mock_api_server import TEMPLATE, served, tokenizer

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


def num_prompt_tokens(server: Any, body: dict[str, Any]) -> int:
    answer = server.http.post("/v1/chat/completions", json={**body, "max_tokens": 1})
    return int(answer.json()["usage"]["prompt_tokens"])


def test_variables_of_the_template_have_defaults_that_requests_override() -> None:
    false, true = ({"chat_template_kwargs": {"enable_thinking": one}} for one in (False, True))
    with served(template=TEMPLATE) as plain:
        with_marks, without = (num_prompt_tokens(plain, {**CHAT, **one}) for one in (false, true))
    assert with_marks > without
    defaults = {"enable_thinking": False}
    with served(template=TEMPLATE, default_chat_template_kwargs=defaults) as server:
        assert num_prompt_tokens(server, CHAT) == with_marks
        assert num_prompt_tokens(server, {**CHAT, **true}) == without
        of_text = server.http.post("/tokenize", json=CHAT).json()
        assert of_text["count"] == with_marks


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"thinking": False}, "'thinking' is neither an option of chat nor a variable"),
        ({"messages": []}, "has 'messages', which is not a variable"),
    ],
)
def test_defaults_that_the_template_does_not_read_are_refused_at_the_start(
    variables: dict[str, object], message: str
) -> None:
    engine = MockEngine(EngineConfig("tiny-qwen3"), tokenizer(TEMPLATE), None)
    with pytest.raises(ValueError, match=message) as raised:
        PromptMaker(engine, ServerConfig(default_chat_template_kwargs=variables))
    assert str(raised.value).startswith("default_chat_template_kwargs is {")


def test_paths_may_begin_with_the_root_path_of_a_proxy() -> None:
    with served(root_path="/models/a") as server:
        for path in ("/models/a/v1/models", "/v1/models", "/models/a/health", "/models/a/"):
            assert server.http.get(path).status_code == 200, path
        document = server.http.get("/models/a/openapi.json").json()
        assert document["servers"] == [{"url": "/models/a"}]
        for path in ("/models/ab/v1/models", "/models/v1/models", "/models/a/v1/model"):
            assert server.http.get(path).status_code == 404, path
    with served(root_path="/a", api_key=["k"]) as server:
        assert server.http.get("/a/v1/models").status_code == 401
        assert server.http.get("/a/health").status_code == 200


@pytest.mark.parametrize("path", ["a", "/", "/a/", "//a", "/a b", "/a?b"])
def test_a_root_path_is_a_path(path: str) -> None:
    with pytest.raises(ValueError, match=r"root_path is .*: it must be a path that begins with"):
        ServerConfig(root_path=path)


@pytest.mark.parametrize(
    ("options", "level"), [({}, logging.ERROR), ({"uvicorn_log_level": "info"}, logging.INFO)]
)
def test_the_level_of_uvicorn_s_log(options: dict[str, Any], level: int) -> None:
    with served(**options) as server:
        assert server.http.get("/health").status_code == 200
        assert logging.getLogger("uvicorn.error").level == level
    with pytest.raises(ValueError, match="uvicorn_log_level is 'loud': it must be one of trace"):
        ServerConfig(uvicorn_log_level="loud")


@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1", "glm45"])
def test_vllm_s_names_of_reasoning_parsers(name: str) -> None:
    assert ServerConfig(reasoning_parser=name).reasoning_parser == name
    assert reasoning_parser(name) is reasoning_parser("think")


@pytest.mark.parametrize(
    ("name", "own"),
    [("llama3_json", "llama3"), ("deepseek_v3", "deepseek"), ("deepseek_v31", "deepseek"),
     ("qwen3_xml", "qwen3_coder"), ("glm47", "glm45")],
)  # fmt: skip
def test_vllm_s_names_of_tool_parsers(name: str, own: str) -> None:
    assert ServerConfig(tool_call_parser=name).tool_call_parser == name
    assert tool_parser(name) is tool_parser(own)
