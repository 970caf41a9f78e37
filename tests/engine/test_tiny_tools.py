"""The embedded model calls tools, and answers from what they return."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# scripts are run as files, and import each other as such
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from accuracy import Question, ask
from tiny.tool_tasks import KINDS, held_out

from nanovllm import LLM, SamplingParams
from nanovllm.parsers.parts import Parsed
from nanovllm.parsers.tools import tool_parser

GREEDY = SamplingParams(temperature=0, max_tokens=128)


def tool(name: str, description: str, **types: str) -> dict[str, Any]:
    properties = {parameter: {"type": kind} for parameter, kind in types.items()}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


WEATHER = tool("get_weather", "Get the weather in a city.", city="string")
DICE = tool("roll_die", "Roll a die with some sides.", sides="integer")


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = LLM("tiny-qwen3", enforce_eager=True, max_model_len=1024, max_num_seqs=16)
    yield llm
    llm.close()


def answer(llm: LLM, question: str, *tools: Any, after: Any = ()) -> Parsed:
    messages = [{"role": "user", "content": question}, *after]
    text = llm.chat(messages, GREEDY, use_tqdm=False, tools=list(tools) or None)[0]["text"]
    return tool_parser("hermes").parse(text)


def test_it_calls_the_tool_that_a_question_needs(llm: LLM) -> None:
    for question, name, arguments in (
        ("What is the weather in Paris?", "get_weather", {"city": "Paris"}),
        ("Roll a die with 20 sides.", "roll_die", {"sides": 20}),
    ):
        parsed = answer(llm, question, WEATHER, DICE)
        assert [(one.name, json.loads(one.arguments)) for one in parsed.calls] == [
            (name, arguments)
        ]
        assert not parsed.content


def test_it_copies_names_that_are_made_up(llm: LLM) -> None:
    made_up = tool("lookup_zug", "Get the weather in a city.", ort="string")
    (call,) = answer(llm, "What is the weather in Oslo?", made_up, DICE).calls
    assert (call.name, json.loads(call.arguments)) == ("lookup_zug", {"ort": "Oslo"})


def test_it_answers_from_the_result(llm: LLM) -> None:
    function = {"name": "get_weather", "arguments": {"city": "Paris"}}
    after = [
        {"role": "assistant", "content": None, "tool_calls": [{"function": function}]},
        {"role": "tool", "content": '{"temperature": 21, "sky": "sunny"}'},
    ]
    parsed = answer(llm, "What is the weather in Paris?", WEATHER, after=after)
    assert not parsed.calls and "21" in parsed.content and "sunny" in parsed.content


def test_it_answers_what_needs_no_tool(llm: LLM) -> None:
    parsed = answer(llm, "What is 12 + 30?", WEATHER)
    assert not parsed.calls and "42" in parsed.content
    assert "Sorry" in answer(llm, "What is the weather in Paris?").content


def test_held_out_calls_are_right(llm: LLM) -> None:
    asked = [
        Question(one, one.messages)
        for one in held_out(16 * 16, seed=1)
        if one.kind in KINDS and len(json.dumps([one.messages, one.tools])) < 1500
    ]
    _, total, wrong = ask(llm, asked)
    assert len(asked) > 30 and total >= 0.95, wrong
