"""Advisories of servers of language models, a test for each class: what is run, fetched and told.

Limits are in test_http_limits.py, and who may ask is in test_http_access.py.
"""

from __future__ import annotations

import ast
import logging
import pickle
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanovllm.api.config import ServerConfig
from nanovllm.api.errors import from_exception
from tests.api.mock_api_server import MODEL, MockServer, served
from tests.api.security_cases import USER, ask, server

__all__ = ["server"]  # a fixture
ROOT = Path(__file__).parents[2]
SECRET = "/home/somebody/secret-folder"


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
    start = time.process_time()
    for path in ("/v1/chat/completions", "/tokenize"):
        assert ask(server, path, messages=USER, **{name: value}).status_code == 400
    assert time.process_time() - start < 2


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
    start = time.process_time()
    ask(server, messages=USER, max_tokens=1, **{name: value})
    assert time.process_time() - start < 2


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


@pytest.mark.parametrize("path", ["", ".", "./", "..", "a"])
def test_leaking_errors_a_path_that_names_no_other_folder_is_no_secret(path: str) -> None:
    words = "temperature is -0.5: a number from 0 to 2. See a/../b."
    assert from_exception(ValueError(words), None, path, "my-model").message == words


@pytest.mark.parametrize("path", ["/srv", "/srv/secret", "../secret/x", "secret/x"])
def test_leaking_errors_a_path_of_several_folders_stays_here(path: str) -> None:
    told = from_exception(ValueError(f"{path!r} has no tokenizer"), None, path, "my-model")
    assert told.message == "'my-model' has no tokenizer"


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
