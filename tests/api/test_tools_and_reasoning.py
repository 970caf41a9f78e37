"""Calls of tools and reasoning as the official client reads them, whole and streamed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest

from scripts.bench.mock_engine import MockOptions
from tests.api.mock_api_server import MODEL, TEMPLATE, served

USER: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
NAMES = ("weather", "clock")
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in NAMES
]
CALL = {"type": "function", "function": {"name": "clock", "arguments": "{}"}}
HERMES = (
    '<think>\nTwo calls.\n</think>\n\nI look.\n<tool_call>\n{"name": "weather", "arguments": '
    '{"city": "Oslo"}}\n</tool_call>\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
)
REASONING = ("reasoning", "reasoning_content")  # vLLM's name, and the older one
CALLS = [("weather", {"city": "Oslo"}), ("clock", {})]


@contextmanager
def answering(text: str, **options: Any) -> Iterator[openai.OpenAI]:
    """A client of a server whose answers have this text."""
    with served(MockOptions(text=text), TEMPLATE, **options) as server, server.client() as client:
        yield client


@pytest.fixture(scope="module")
def hermes() -> Iterator[openai.OpenAI]:
    with answering(HERMES) as client:
        yield client


def calls_of(message: Any) -> list[tuple[str, Any]]:
    found = message.tool_calls or []
    assert all(call.id and call.type == "function" for call in found)
    return [(call.function.name, json.loads(call.function.arguments)) for call in found]


def test_the_parsers_are_those_that_the_template_shows(hermes: openai.OpenAI) -> None:
    done = hermes.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS)
    message = done.choices[0].message
    assert calls_of(message) == CALLS and message.content == "I look.\n"
    assert {(message.model_extra or {})[name] for name in REASONING} == {"Two calls."}
    assert done.choices[0].finish_reason == "tool_calls"


def test_streamed_parts_add_up_to_the_whole_message(hermes: openai.OpenAI) -> None:
    with hermes.chat.completions.stream(model=MODEL, messages=USER, tools=TOOLS) as stream:
        chunks = [event.chunk for event in stream if event.type == "chunk"]
        message = stream.get_final_completion().choices[0].message
    assert calls_of(message) == CALLS and message.content == "I look.\n"
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    for name in REASONING:
        reasoning = [(one.model_extra or {}).get(name, "") for one in deltas]
        assert "".join(reasoning) == "Two calls."
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    num_parts = sum(len(one.tool_calls or []) for one in deltas)
    assert num_parts > 10, "the arguments come in pieces"


def test_without_parallel_calls_only_the_first_is_given(hermes: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": USER, "tools": TOOLS, "parallel_tool_calls": False}
    done = hermes.chat.completions.create(**asked)
    assert calls_of(done.choices[0].message) == CALLS[:1]


def test_with_tool_choice_none_the_text_stays(hermes: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": USER, "tools": TOOLS, "tool_choice": "none"}
    message = hermes.chat.completions.create(**asked).choices[0].message
    assert message.tool_calls is None and "<tool_call>" in (message.content or "")


def test_reasoning_can_be_left_out(hermes: openai.OpenAI) -> None:
    extra = {"include_reasoning": False}
    done = hermes.chat.completions.create(model=MODEL, messages=USER, extra_body=extra)
    message = done.choices[0].message
    assert not message.model_extra or not message.model_extra.keys() & set(REASONING)
    assert (message.content or "").startswith("I look.")


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "clock"}}]
)
def test_a_demanded_call_is_read_from_json(choice: Any) -> None:
    text = '[{"name": "clock", "arguments": {"zone": "CET"}}]'
    with answering(text) as client:
        done = client.chat.completions.create(
            model=MODEL, messages=USER, tools=TOOLS, tool_choice=choice
        )
    message = done.choices[0].message
    assert calls_of(message) == [("clock", {"zone": "CET"})] and not message.content
    assert done.choices[0].finish_reason == "tool_calls"


# that of Mistral 7B v0.3 and Nemo, as far as it has calls
MISTRAL = """{% for m in messages %}{{ m.content }}{% if m.tool_calls %}[TOOL_CALLS][
{% for call in m.tool_calls %}{% if call.id is not defined or call.id | length != 9 %}
{{ raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}{% endif %}
{{ call.id }}{{ call.function | tojson }}{% endfor %}]{% endif %}{% endfor %}{{ tools }}"""


@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize("api", ["chat", "stream", "responses", "messages"])
def test_calls_of_mistral_can_be_sent_back(choice: str, api: str) -> None:
    text = '[{"name": "weather", "arguments": {}}, {"name": "clock", "arguments": {}}]'
    text = f"[TOOL_CALLS]{text}" if choice == "auto" else text
    with served(MockOptions(text=text), MISTRAL) as server:

        def answer(path: str, **asked: Any) -> Any:
            found = server.http.post(path, json={"model": MODEL, **asked})
            assert found.status_code == 200, found.text
            return found.json() if not asked.get("stream") else found.text

        if api == "messages":
            kind = {"type": "any" if choice == "required" else "auto"}
            tools = [{"name": name, "input_schema": {"type": "object"}} for name in NAMES]
            asked: Any = {"tools": tools, "tool_choice": kind, "max_tokens": 99}
            content = answer("/v1/messages", messages=USER, **asked)["content"]
            ids = [one["id"] for one in content]
            results = [{"type": "tool_result", "tool_use_id": one} for one in ids]
            turn = [{"role": "assistant", "content": content}, {"role": "user", "content": results}]
            answer("/v1/messages", messages=USER + turn, **asked)
        elif api == "responses":
            tools = [{"type": "function", "name": name, "parameters": {}} for name in NAMES]
            asked = {"tools": tools, "tool_choice": choice}
            output = answer("/v1/responses", input=USER, **asked)["output"]
            ids = [one["call_id"] for one in output]
            answer("/v1/responses", input=USER + output, **asked)
        else:
            path, asked = "/v1/chat/completions", {"tools": TOOLS, "tool_choice": choice}
            if api == "stream":
                found = answer(path, messages=USER, **asked, stream=True)
                ids = re.findall(r'"id":"([^"-]*)"', found)
                calls = [{**CALL, "id": one} for one in ids]
            else:
                calls = answer(path, messages=USER, **asked)["choices"][0]["message"]["tool_calls"]
                ids = [one["id"] for one in calls]
            turn = [{"role": "assistant", "tool_calls": calls}]
            answer(path, messages=USER + turn, **asked)
    assert len({*ids}) == 2 and all(re.fullmatch("[a-zA-Z0-9]{9}", one) for one in ids)


@pytest.mark.parametrize("given", ["abcDEF123", "call_1"])
def test_the_ids_that_a_model_writes_are_kept_if_its_template_takes_them(given: str) -> None:
    text = f"[TOOL_CALLS]clock[CALL_ID]{given}[ARGS]{{}}"
    with answering(text, tool_call_parser="mistral") as client:
        done = client.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS)
    (call,) = done.choices[0].message.tool_calls or []
    assert (call.id == given) == (len(given) == 9) and len(call.id) == 9


LISTED = '[{"name": "clock", "arguments": {"zone": "CET"}}, {"name": "weather", "arguments": {}}]'
FIRST = LISTED.index("}, {") + 1


@pytest.mark.parametrize("end", [0, 3, 12, 20, 34, FIRST, FIRST + 6, FIRST + 30, len(LISTED) - 2])
def test_a_demanded_call_that_is_cut_leaves_no_text(end: int) -> None:
    """Complete calls stay. The stream and the whole answer agree."""
    asked: Any = {
        "model": MODEL, "messages": USER, "tools": TOOLS, "tool_choice": "required",
        "max_tokens": end or 1,
    }  # fmt: skip
    with answering(LISTED) as client:
        choice = client.chat.completions.create(**asked).choices[0]
        chunks = list(client.chat.completions.create(**asked, stream=True))
    assert choice.message.content is None and choice.finish_reason == "length"
    calls = [(one.function.name, one.function.arguments) for one in choice.message.tool_calls or []]  # type: ignore[union-attr]
    if end >= FIRST:
        assert calls[0] == ("clock", '{"zone": "CET"}')
    deltas = [one.choices[0].delta for one in chunks]
    assert (
        not any(one.content for one in deltas) and chunks[-1].choices[0].finish_reason == "length"
    )
    streamed: dict[int, list[str]] = {}
    for delta in deltas:
        for one in delta.tool_calls or []:
            assert one.function is not None
            name = [one.function.name] if one.function.name else []
            streamed.setdefault(one.index, name).append(one.function.arguments or "")
    assert [(name, "".join(rest)) for name, *rest in streamed.values()] == calls


@pytest.mark.parametrize("end", [3, 34, FIRST, FIRST + 6, FIRST + 30, len(LISTED) - 2])
def test_the_items_of_a_cut_response_are_those_of_its_events(end: int) -> None:
    tools: Any = [{"type": "function", **one["function"]} for one in TOOLS]
    asked: Any = {
        "model": MODEL, "input": "Hi", "tools": tools, "tool_choice": "required",
        "max_output_tokens": end,
    }  # fmt: skip
    with answering(LISTED) as client:
        whole = client.responses.create(**asked)
        events = list(client.responses.create(**asked, stream=True))
    assert whole.status == "incomplete" and all(one.type == "function_call" for one in whole.output)
    facts = [(one.name, one.arguments, one.status) for one in whole.output]  # type: ignore[union-attr]
    done = [one.item for one in events if one.type == "response.output_item.done"]
    last = events[-1]
    assert last.type == "response.incomplete"
    for items in (done, last.response.output):
        assert [(one.name, one.arguments, one.status) for one in items] == facts  # type: ignore[union-attr]
    statuses = [status for _, _, status in facts]
    assert statuses == ["completed" if is_json(text) else "incomplete" for _, text, _ in facts]


def is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


@pytest.mark.parametrize("text", ["<think>Hm.</think>Yes, I", "<think>Hm"])
def test_the_texts_of_a_cut_response_have_one_status(text: str) -> None:
    with answering(text + "…") as client:
        asked: Any = {"model": MODEL, "input": "Hi", "max_output_tokens": len(text)}
        whole = client.responses.create(**asked)
        events = list(client.responses.create(**asked, stream=True))
    statuses = [one.status for one in whole.output]  # type: ignore[union-attr]
    assert statuses == [*["completed"] * (len(statuses) - 1), "incomplete"]
    done = [one.item for one in events if one.type == "response.output_item.done"]
    assert [one.status for one in done] == statuses  # type: ignore[union-attr]
    assert [one.status for one in events[-1].response.output] == statuses  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "clock"}}]
)
def test_a_demanded_call_may_be_asked_beside_a_form_of_text(choice: Any) -> None:
    form: Any = {"type": "json_object"}
    with noting('[{"name": "clock", "arguments": {}}]') as (client, forms):
        done = client.chat.completions.create(
            model=MODEL, messages=USER, tools=TOOLS, tool_choice=choice, response_format=form
        )
    assert calls_of(done.choices[0].message) == [("clock", {})]
    assert "minItems" in str(forms[0]), "the call is forced"


def test_a_response_has_the_reasoning_before_the_message() -> None:
    with answering("<think>Hm.</think>Yes.") as client:
        whole = client.responses.create(model=MODEL, input="Hi")
        events = list(client.responses.create(model=MODEL, input="Hi", stream=True))
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    assert whole.output_text == "Yes." and whole.status == "completed"
    reasoning = [one.delta for one in events if one.type == "response.reasoning_text.delta"]
    assert "".join(reasoning) == "Hm."
    last = events[-1]
    assert last.type == "response.completed" and last.response.output_text == "Yes."


@pytest.mark.parametrize(
    ("text", "num"),
    [("<think>Hm.</think>Yes.", 3), ("<think>Is 1 < 2?</think>Yes.", 9), ("Yes.", 0),
     ("<think>It is too lo", 12)],
)  # fmt: skip
def test_the_usage_has_the_tokens_of_the_reasoning(text: str, num: int) -> None:
    """An answer of the engine here has a token for each character."""
    with answering(text) as client:
        whole = client.responses.create(model=MODEL, input="Hi")
        *_, last = client.responses.create(model=MODEL, input="Hi", stream=True)
        asked: Any = {"model": MODEL, "messages": USER, "n": 2}
        chat = client.chat.completions.create(**asked).usage
        options: Any = {"include_usage": True}
        *_, chunk = client.chat.completions.create(**asked, stream=True, stream_options=options)
        hidden = client.chat.completions.create(**asked, extra_body={"include_reasoning": False})
    assert last.type == "response.completed"
    for usage in (whole.usage, last.response.usage):
        assert usage is not None and usage.output_tokens_details.reasoning_tokens == num
    for counts in (chat, chunk.usage, hidden.usage):
        assert counts is not None and counts.completion_tokens_details is not None
        assert counts.completion_tokens_details.reasoning_tokens == 2 * num


def test_the_types_of_xml_arguments_are_those_of_the_tools_in_the_request() -> None:
    text = "<tool_call>f\n<arg_key>code</arg_key>\n<arg_value>19</arg_value>\n</tool_call>"
    for type, value in (("string", "19"), ("integer", 19)):
        parameters = {"type": "object", "properties": {"code": {"type": type}}}
        tools: Any = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
        with answering(text, tool_call_parser="glm45") as client:
            done = client.chat.completions.create(model=MODEL, messages=USER, tools=tools)
        assert calls_of(done.choices[0].message) == [("f", {"code": value})]


def test_without_parsers_the_text_is_the_content() -> None:
    with answering(HERMES, tool_call_parser="none", reasoning_parser="none") as client:
        done = client.chat.completions.create(model=MODEL, messages=USER)
        assert done.choices[0].message.content == HERMES
        with pytest.raises(openai.BadRequestError, match="tool_call_parser"):
            client.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS)


def test_an_unknown_parser_is_refused_at_the_start() -> None:
    for name in ("tool_call_parser", "reasoning_parser"):
        with (
            pytest.raises(ValueError, match=f"{name}.*hermes2"),
            answering("", **{name: "hermes2"}),
        ):
            pass


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]},
         "tools[0].function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True,
                     "parameters": {"type": "object", "not": {}}}}]}, "tools"),
        ({"tools": TOOLS, "extra_body": {"guided_regex": "a+"}}, "tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
         "tool_choice"),
    ],
)  # fmt: skip
def test_wrong_tools_are_named(hermes: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    asked: Any = {"model": MODEL, "messages": USER, **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        hermes.chat.completions.create(**asked)
    assert caught.value.param == param


STRICT: Any = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]
FORM: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}


@contextmanager
def noting(text: str, **options: Any) -> Iterator[tuple[openai.OpenAI, list[Any]]]:
    """A client, and the forms that the engine gets."""
    forms: list[Any] = []
    with served(MockOptions(text=text), TEMPLATE, **options) as server, server.client() as client:
        plain = server.engine.open

        async def opened(prompt: Any, params: Any, **others: Any) -> Any:
            forms.append(params.structured_outputs)
            return await plain(prompt, params, **others)

        server.engine.open = opened  # type: ignore[method-assign]
        yield client, forms


def test_calls_of_strict_tools_match_their_schema() -> None:
    """tests/structured/test_tagged.py shows what the grammar allows."""
    asked: Any = {"model": MODEL, "messages": USER, "tools": STRICT}
    with noting(HERMES) as (client, forms):
        message = client.chat.completions.parse(**asked).choices[0].message
        assert calls_of(message) == CALLS and message.content == "I look.\n"
        assert (message.model_extra or {})["reasoning_content"] == "Two calls."
        client.chat.completions.create(**asked, tool_choice="none")
    assert '"const": "weather"' in forms[0].grammar and forms[1] is None


def test_tools_and_a_form_give_calls_or_the_form() -> None:
    asked: Any = {"model": MODEL, "messages": USER, "tools": TOOLS, "response_format": FORM}
    with noting(HERMES[HERMES.index("<tool_call>") :]) as (client, forms):
        assert calls_of(client.chat.completions.create(**asked).choices[0].message) == CALLS
        client.chat.completions.create(**asked, tool_choice="none")
    assert "form: %json" in forms[0].grammar and forms[1].json == {"type": "object"}
    with noting('{"a": 1}') as (client, _):
        message = client.chat.completions.create(**asked).choices[0].message
        assert message.content == '{"a": 1}' and message.tool_calls is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"tools": STRICT}, "tools[0].function.strict"),
     ({"tools": TOOLS, "response_format": FORM}, "tools")],
)  # fmt: skip
def test_what_a_parser_s_calls_cannot_be_held_to_is_refused(
    fields: dict[str, Any], param: str
) -> None:
    asked: Any = {"model": MODEL, "messages": USER, **fields}
    with answering("x", tool_call_parser="mistral") as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**asked)
        client.chat.completions.create(**asked, tool_choice="none")
    assert caught.value.param == param
