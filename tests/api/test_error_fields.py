"""An error names its field, in whatever words its message is."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from nanovllm.api.errors import from_exception
from nanovllm.checks import InvalidValue, WrongType, checked
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.prompts import Prompt, PromptRefused, PromptTooLong
from nanovllm.replicas import messages
from nanovllm.replicas.messages import Outputs
from nanovllm.sampling import SamplingParams
from nanovllm.schedule import edit_limits
from nanovllm.schedule.outputs import FinishedOutput, OutputDelta
from nanovllm.schedule.plan import LogitEdits
from nanovllm.schedule.request import Request
from nanovllm.structured import library
from nanovllm.structured_params import StructuredOutputsParams
from tests.api.mock_api_server import MODEL, TEMPLATE, MockServer, served, tokenizer
from tests.api.test_http_clients import NEEDED, Refusing, refused


@pytest.fixture(scope="module")
def server() -> Iterator[MockServer]:
    with served(template=TEMPLATE) as one:
        yield one


@pytest.mark.parametrize(
    ("path", "ours", "param"),
    [("/v1/completions", "prompt", "prompt"), ("/v1/chat/completions", "prompt", "messages"),
     ("/v1/responses", "prompt", "input"), ("/v1/completions", "top_p", "top_p")],
)  # fmt: skip
@pytest.mark.parametrize("is_late", [False, True])
def test_the_field_of_an_error_is_its_param(
    server: MockServer, monkeypatch: pytest.MonkeyPatch, path: str, ours: str, param: str,
    is_late: bool,
) -> None:  # fmt: skip
    plain = server.engine.open

    async def opened(*args: Any, **options: Any) -> Any:
        if not is_late:
            raise InvalidValue(ours, "not so")
        return Refusing(await plain(*args, **options), "not so", ours)

    monkeypatch.setattr(server.engine, "open", opened)
    error = refused(server, path)
    assert (error["param"], error["message"]) == (param, "not so")


def test_words_at_the_beginning_of_a_message_are_no_param() -> None:
    assert from_exception(ValueError("temperature is unknown here")).param is None


def test_an_error_without_a_field_is_one_of_the_server(
    server: MockServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = server.engine.open

    async def opened(*args: Any, **options: Any) -> Any:
        return Refusing(await plain(*args, **options), "structured_outputs: not so", None)

    monkeypatch.setattr(server.engine, "open", opened)
    answer = server.http.post("/v1/completions", json=NEEDED["/v1/completions"])
    assert answer.status_code == 500


@pytest.mark.parametrize(
    ("path", "name"),
    [("/v1/completions", "max_tokens"), ("/v1/chat/completions", "max_tokens"),
     ("/v1/chat/completions", "max_completion_tokens"), ("/v1/responses", "max_output_tokens")],
)  # fmt: skip
@pytest.mark.parametrize("value", [0, -1])
def test_a_limit_of_tokens_names_itself(
    server: MockServer, path: str, name: str, value: int
) -> None:
    error = refused(server, path, **{name: value})
    assert error["param"] == name and error["message"].startswith(f"{name} is {value}")


def test_an_image_for_a_text_model_names_the_model(server: MockServer) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [{"role": "user", "content": [part]}]
    error = refused(server, "/v1/chat/completions", messages=messages)
    assert error["param"] == "messages" and MODEL in error["message"]


def test_a_template_that_refuses_messages_names_them() -> None:
    with served(template="{{ raise_exception('no') }}") as one:
        assert refused(one, "/v1/chat/completions")["param"] == "messages"


def test_a_bad_word_of_too_many_tokens_has_its_field() -> None:
    with pytest.raises(InvalidValue, match="99 tokens") as caught:
        edit_limits.check(LogitEdits({}, None, [[1] * 99]), 512)
    assert caught.value.field == "bad_words"


@pytest.mark.parametrize(
    ("given", "field"),
    [({"top_p": 3}, "top_p"), ({"n": "a"}, "n"), ({"logit_bias": {1: 1e9}}, "logit_bias"),
     ({"stop": [""]}, "stop"), ({"allowed_token_ids": []}, "allowed_token_ids"),
     ({"structured_outputs": {}}, "structured_outputs"), ({"best_of": 3}, "best_of"),
     ({"structured_outputs": {"regex": 3}}, "structured_outputs")],
)  # fmt: skip
def test_refused_parameters_have_their_field(given: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError) as caught:
        SamplingParams(**given)
    assert isinstance(caught.value, InvalidValue) and caught.value.field == field


def test_refused_prompts_and_edits_have_their_field() -> None:
    intake = InputProcessor(MODEL, tokenizer(), 512, 32, 16)
    with pytest.raises(PromptTooLong) as caught:
        intake.prompt_ids(Prompt(None, [1] * 16), SamplingParams())
    assert caught.value.field == "prompt"
    alone = InputProcessor(MODEL, None, 512, 32, 16)
    for given in ({"stop": "a"}, {"bad_words": ["a"]}):
        with pytest.raises(InvalidValue) as refusal:
            alone.check(SamplingParams(**given))
        assert refusal.value.field == next(iter(given))


def test_errors_survive_pickles_and_copies() -> None:
    with pytest.raises(WrongType) as caught:
        checked("x", lambda: None, int)  # a value that cannot be pickled
    for error in (InvalidValue("a", "b"), PromptRefused("b"), PromptTooLong("c"), caught.value):
        for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert isinstance(again, InvalidValue) and isinstance(again, ValueError)
            assert (again.field, str(again)) == (error.field, str(error))
    assert isinstance(pickle.loads(pickle.dumps(PromptTooLong("c"))), PromptTooLong)


def request_of(**given: Any) -> Request:
    params = SamplingParams(**given)
    edits = LogitEdits({}, params.allowed_token_ids, []) if params.has_edits else None
    return Request(1, [1, 2], params, 0, 5, frozenset([3]), edits=edits)


def test_a_request_that_forbids_all_tokens_is_at_fault_and_another_one_is_not() -> None:
    """Its error goes through the messages of processes with its field."""
    only_end = request_of(allowed_token_ids=[3], min_tokens=2)
    for request, field in (
        (only_end, "allowed_token_ids"),
        (request_of(min_tokens=2), "min_tokens"),
        (request_of(), None),
    ):
        found = FinishedOutput.of(request, "", "error", None, request.without_token)
        assert found.error_field == field and "no token can follow" in str(found.error)
        row = messages.row(1, OutputDelta(1, [], "", None, found), incremental=True)
        sent = messages.load_outputs(messages.dump(Outputs([], [], [row]))).rows[0].done
        assert sent is not None and (sent.error, sent.error_field) == (found.error, field)


def test_what_the_engine_refuses_keeps_its_field() -> None:
    done = messages.failed(1, InvalidValue("positions", "too many")).done
    assert done is not None and (done.error, done.error_field) == ("too many", "positions")
    done = messages.failed(1, KeyError("a")).done
    assert done is not None and done.error_field is None and "KeyError" in str(done.error)


def test_no_white_space_is_a_pattern_of_white_space() -> None:
    for given in (StructuredOutputsParams(json={}, whitespace_pattern=""),
                  StructuredOutputsParams(json={}, disable_any_whitespace=True)):  # fmt: skip
        found = library.with_options({}, given)
        assert found == {"x-guidance": {"whitespace_flexible": False}}
    with pytest.raises(InvalidValue, match="whitespace_pattern is set with regex"):
        StructuredOutputsParams(regex="a", whitespace_pattern="")
