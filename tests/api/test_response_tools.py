"""Calls of tools in /v1/responses, as the official client reads and sends them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from scripts.bench.mock_engine import MockOptions
from tests.api.mock_api_server import MODEL, MockServer, served
from tests.api.test_tools_and_reasoning import CALLS, HERMES

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}|{{ m.reasoning_content }}|{{ m.tool_calls }}|"
    "{{ m.tool_call_id }}|{{ m.content }}]{% endfor %}{% if tools %}<tool_call>{{ tools | tojson }}"
    "{% endif %}{% if enable_thinking is false %}<think></think>{% endif %}"
)
TOOLS: Any = [
    {"type": "function", "name": name, "parameters": {"type": "object"}, "strict": False}
    for name in ("weather", "clock")
]
ASKED: Any = {"model": MODEL, "input": "Hi", "tools": TOOLS}


@pytest.fixture(scope="module")
def server() -> Iterator[MockServer]:
    with served(MockOptions(text=HERMES), TEMPLATE) as one:
        yield one


@pytest.fixture(scope="module")
def client(server: MockServer) -> Iterator[openai.OpenAI]:
    with server.client() as one:
        yield one


def calls_of(response: Any) -> list[tuple[str, Any]]:
    calls = [item for item in response.output if item.type == "function_call"]
    assert all(one.call_id and one.status == "completed" for one in calls)
    return [(one.name, json.loads(one.arguments)) for one in calls]


def test_calls_are_items_of_the_output(client: openai.OpenAI) -> None:
    done = client.responses.create(**ASKED)
    kinds = [item.type for item in done.output]
    assert kinds == ["reasoning", "message", "function_call", "function_call"]
    assert calls_of(done) == CALLS and done.output_text == "I look.\n"
    assert done.tool_choice == "auto" and len(done.tools) == 2


def test_events_of_calls_add_up_to_the_whole_response(client: openai.OpenAI) -> None:
    with client.responses.stream(**ASKED) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert calls_of(final) == CALLS and final.output_text == "I look.\n"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    names = [event.type for event in events if getattr(event, "output_index", None) == 2]
    assert names[0] == "response.output_item.added" and names[-1] == "response.output_item.done"
    assert names[-2] == "response.function_call_arguments.done"
    assert set(names[1:-2]) == {"response.function_call_arguments.delta"}
    deltas: dict[int, str] = {}
    for event in events:
        if event.type == "response.function_call_arguments.delta":
            deltas[event.output_index] = deltas.get(event.output_index, "") + event.delta
    assert [json.loads(text) for text in deltas.values()] == [one for _, one in CALLS]


def test_without_parallel_calls_only_the_first_is_given(client: openai.OpenAI) -> None:
    done = client.responses.create(**ASKED, parallel_tool_calls=False)
    assert calls_of(done) == CALLS[:1] and done.parallel_tool_calls is False


def test_calls_and_their_results_can_be_sent_back(
    server: MockServer, client: openai.OpenAI
) -> None:
    first = client.responses.create(**ASKED)
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "5"}
        for item in first.output
        if item.type == "function_call"
    ]
    items: Any = [{"role": "user", "content": "Hi"}, *first.output, *results]
    second = client.responses.create(**{**ASKED, "input": items})
    ids = [one["call_id"] for one in results]
    calls = [
        {"id": one, "type": "function", "function": {"name": name, "arguments": arguments}}
        for one, (name, arguments) in zip(ids, CALLS)
    ]
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "I look.\n", "reasoning_content": "Two calls.",
         "tool_calls": calls},
        *({"role": "tool", "tool_call_id": one, "content": "5"} for one in ids),
    ]  # fmt: skip
    tools = [
        {"type": "function", "function": {k: tool[k] for k in ("name", "parameters", "strict")}}
        for tool in TOOLS
    ]
    counted = server.http.post("/tokenize", json={"messages": messages, "tools": tools})
    assert second.usage is not None
    assert second.usage.input_tokens == counted.json()["count"]


def test_a_demanded_call_is_read_from_json() -> None:
    class Weather(BaseModel):
        city: str

    text = '[{"name": "Weather", "arguments": {"city": "Oslo"}}]'
    with served(MockOptions(text=text), TEMPLATE) as server, server.client() as client:
        done = client.responses.parse(
            model=MODEL, input="Hi", tools=[openai.pydantic_function_tool(Weather)["function"]
            | {"type": "function"}], tool_choice={"type": "function", "name": "Weather"},
        )  # fmt: skip
    (call,) = done.output
    assert call.type == "function_call" and call.arguments == '{"city": "Oslo"}'


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"tools": [{"type": "web_search"}]}, "tools[0].type"),
     ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
     ({"tools": [{"type": "function", "name": "a", "filters": {}}]}, "tools[0].filters"),
     ({"tools": [], "tool_choice": "required"}, "tool_choice"),
     ({"tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
     ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
     ({"input": [{"type": "function_call_output", "call_id": "a"}]}, "input[0].output"),
     ({"input": [{"type": "function_call", "call_id": "a", "name": "b"}]}, "input[0].arguments"),
     ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
     ({"input": [{"type": "web_search_call"}]}, "input[0].type")],
)  # fmt: skip
def test_what_is_wrong_with_tools_is_named(
    client: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{**ASKED, **fields})
    assert caught.value.param == param


def test_auto_needs_no_tools(client: openai.OpenAI) -> None:
    done = client.responses.create(model=MODEL, input="Hi", tool_choice="auto", max_output_tokens=9)
    assert not calls_of(done)
