"""Conversations with gpt-oss: its template, and its answers as the official client reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest

from nanovllm.chat import ChatOptions, render
from scripts.bench.mock_engine import MockOptions
from tests.api.mock_api_server import MODEL, served
from tests.test_chat import tokenizer

# It writes turns as the template of the released checkpoints does.
TEMPLATE = """
{%- macro turn(header, text, end="<|end|>") -%}
<|start|>{{ header }}<|message|>{{ text }}{{ end }}
{%- endmacro -%}
{{- turn("system", "Reasoning: " ~ (reasoning_effort or "medium")) -}}
{%- if tools %}{{ turn("developer", tools | tojson) }}{% endif -%}
{%- for message in messages -%}
  {%- if message.role == "assistant" and message.tool_calls -%}
    {%- set call = message.tool_calls[0].function -%}
    {%- if message.content and message.thinking -%}{{ raise_exception("both") }}{%- endif -%}
    {%- if message.thinking -%}
      {{- turn("assistant<|channel|>analysis", message.thinking) -}}
    {%- endif -%}
    {{- turn("assistant to=functions." ~ call.name ~ "<|channel|>commentary json",
             call.arguments | tojson, "<|call|>") -}}
  {%- elif message.role == "assistant" -%}
    {{- turn("assistant<|channel|>final", message.content) -}}
  {%- elif message.role == "tool" -%}
    {{- turn("functions.f to=assistant<|channel|>commentary", message.content | tojson) -}}
  {%- else -%}
    {{- turn(message.role, message.content) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
"""
USER: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
]
ANALYSIS = "<|channel|>analysis<|message|>A call.<|end|><|start|>assistant"
CALL = (
    ANALYSIS + "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
    '{"city": "Oslo"}<|call|>'
)
TEXT = ANALYSIS + "<|channel|>final<|message|>It is sunny.<|return|>"


@contextmanager
def answering(text: str) -> Iterator[openai.OpenAI]:
    with served(MockOptions(text=text), TEMPLATE) as server, server.client() as client:
        yield client


def test_a_call_is_read_whole_and_streamed() -> None:
    asked: Any = {"model": MODEL, "messages": USER, "tools": TOOLS}
    with answering(CALL) as client:
        done = client.chat.completions.create(**asked).choices[0]
        with client.chat.completions.stream(**asked) as stream:
            streamed = stream.get_final_completion().choices[0].message
    assert done.finish_reason == "tool_calls" and not done.message.content
    assert (done.message.model_extra or {})["reasoning_content"] == "A call."
    for message in (done.message, streamed):
        (call,) = message.tool_calls or []
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments) == {"city": "Oslo"}


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["alone", "tools"])
def test_the_final_channel_is_the_content(tools: Any) -> None:
    with answering(TEXT) as client:
        extra = {} if tools is None else {"tools": tools}
        done = client.chat.completions.create(
            model=MODEL, messages=USER, reasoning_effort="high", **extra
        )
    message = done.choices[0].message
    assert message.content == "It is sunny."
    assert (message.model_extra or {})["reasoning_content"] == "A call."


def test_turns_with_calls_results_and_reasoning_are_written() -> None:
    function = {"name": "f", "arguments": {"a": 1}}
    call = {"type": "function", "id": "1", "function": function}
    conversation: list[dict[str, Any]] = [
        {"role": "user", "content": "Now?"},
        {"role": "assistant", "content": "", "reasoning_content": "So.", "tool_calls": [call]},
        {"role": "tool", "content": '{"b": 2}', "tool_call_id": "1"},
        {"role": "assistant", "content": "See.", "reasoning_content": "Hm.", "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
        {"role": "assistant", "content": "Yes.", "reasoning_content": "Left out."},
    ]  # fmt: skip
    options = ChatOptions.from_options({"reasoning_effort": "low", "tools": [call]})
    (prompt,) = render(tokenizer(TEMPLATE), conversation, options)
    assert prompt.text is not None
    assert prompt.text.startswith("<|start|>system<|message|>Reasoning: low<|end|>")
    assert "<|start|>developer<|message|>[{" in prompt.text
    assert prompt.text[prompt.text.index("<|start|>user") :] == (
        "<|start|>user<|message|>Now?<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>So.<|end|>"
        '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>'
        '<|start|>functions.f to=assistant<|channel|>commentary<|message|>"{\\"b\\": 2}"<|end|>'
        "<|start|>assistant<|channel|>analysis<|message|>Hm.\nSee.<|end|>"
        '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>'
        '<|start|>functions.f to=assistant<|channel|>commentary<|message|>"3"<|end|>'
        "<|start|>assistant<|channel|>final<|message|>Yes.<|end|>"
        "<|start|>assistant"
    )
