"""Formats of tool calls with JSON arguments, one function each. XML formats are in xml_calls.py.

They follow the models' chat templates, which render earlier calls in the format that the model was
trained on. Text that begins like a call but is not one stays content. Arguments that are not JSON
are passed through up to the end of the call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from nanovllm.parsers.json_calls import Outcome, read_arguments, read_call, read_calls
from nanovllm.parsers.parts import Sink
from nanovllm.parsers.reader import AnswerReader, Wait, ignore

TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
GRANITE_CALL = "<|tool_call|>"
TOOL_CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END, CALL_SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
FENCE, FENCE_JSON = "```", "```json"

AFTER_OBJECT = re.compile(r"[\s}]+")  # small models write extra brackets
SEPARATORS = re.compile(r"[\s;,]+")
NAME = re.compile(r"[^\s\[{<`]+")
ID = re.compile(r"[\w-]+")


def hermes(reader: AnswerReader, sink: Sink) -> Wait[None]:
    """<tool_call>{"name": …, "arguments": {…}}</tool_call>, possibly several.

    Templates of Hermes 2 Pro and 3, Qwen 2.5, Qwen 3, SmolLM 3.
    """
    while (yield from reader.until((TOOL_CALL,), sink.content)):
        reader.keep(TOOL_CALL)
        yield from reader.spaces()
        outcome = yield from read_call(reader, sink)
        if outcome is Outcome.NO_CALL:
            sink.content(reader.kept())
            continue
        if outcome is Outcome.BROKEN:
            yield from reader.until((END_TOOL_CALL,), sink.arguments)
        else:
            yield from reader.run(AFTER_OBJECT, ignore)
            yield from reader.accept(END_TOOL_CALL)
        yield from reader.spaces()


def llama3(reader: AnswerReader, sink: Sink) -> Wait[None]:
    """{"name": …, "parameters": {…}} as the whole answer, or after <|python_tag|> anywhere.

    Several calls are separated by semicolons. Templates of Llama 3.1, 3.2 and 3.3.
    """
    reader.keep()
    yield from reader.spaces()
    yield from reader.accept(PYTHON_TAG)
    while True:
        yield from reader.spaces()
        outcome = yield from read_call(reader, sink)
        if outcome is Outcome.DONE:
            yield from reader.run(SEPARATORS, ignore)
            reader.keep()
            continue
        if outcome is Outcome.BROKEN:
            yield from reader.rest(sink.arguments)
        sink.content(reader.kept())
        if not (yield from reader.until((PYTHON_TAG,), sink.content)):
            return
        reader.keep(PYTHON_TAG)


def mistral(reader: AnswerReader, sink: Sink) -> Wait[None]:
    """[TOOL_CALLS] [{"name": …, "arguments": {…}}, …], or for each call
    [TOOL_CALLS]name[CALL_ID]id[ARGS]{…}, where [CALL_ID]id and [ARGS] are optional.

    Templates of Mistral 7B v0.3, Nemo, Small, Devstral, Ministral 3.
    """
    yield from _after_marks(reader, sink, (TOOL_CALLS,), _mistral_calls)


def _mistral_calls(reader: AnswerReader, sink: Sink) -> Wait[Outcome]:
    is_list = (yield from reader.peek()) == "["
    return (yield from (read_calls if is_list else _named_call)(reader, sink))


def granite(reader: AnswerReader, sink: Sink) -> Wait[None]:
    """<|tool_call|>[{"name": …, "arguments": {…}}, …]. Some versions write <tool_call> as text.

    Templates of Granite 3.0 to 3.3.
    """
    yield from _after_marks(reader, sink, (GRANITE_CALL, TOOL_CALL), read_calls)


def _after_marks(
    reader: AnswerReader,
    sink: Sink,
    marks: Sequence[str],
    read: Callable[[AnswerReader, Sink], Wait[Outcome]],
) -> Wait[None]:
    """Content, and after each mark the calls that `read` parses."""
    mark = yield from reader.until(marks, sink.content)
    while mark:
        reader.keep(mark)
        yield from reader.spaces()
        outcome = yield from read(reader, sink)
        if outcome is Outcome.BROKEN:
            mark = yield from reader.until(marks, sink.arguments)
            continue
        if outcome is Outcome.NO_CALL:
            sink.content(reader.kept())
        else:
            reader.kept()
            yield from reader.spaces()
        mark = yield from reader.until(marks, sink.content)


def _named_call(reader: AnswerReader, sink: Sink) -> Wait[Outcome]:
    name: list[str] = []
    call_id: list[str] = []
    if not (yield from reader.run(NAME, name.append)):
        return Outcome.NO_CALL
    if (yield from reader.accept(CALL_ID)):
        yield from reader.run(ID, call_id.append)
    has_mark = yield from reader.accept(ARGS)
    yield from reader.spaces()
    if not has_mark and (yield from reader.peek()) != "{":
        return Outcome.NO_CALL
    reader.kept()
    sink.call("".join(name), "".join(call_id) or None)
    is_json = yield from read_arguments(reader, sink.arguments)
    return Outcome.DONE if is_json else Outcome.BROKEN


def deepseek(reader: AnswerReader, sink: Sink) -> Wait[None]:
    """<｜tool▁calls▁begin｜>, calls, <｜tool▁calls▁end｜>. A call is <｜tool▁call▁begin｜>, then
    name<｜tool▁sep｜>{…} (V3.1) or function<｜tool▁sep｜>name and the arguments in a fence (V3,
    R1), then <｜tool▁call▁end｜>."""
    while marker := (yield from reader.until((CALLS_BEGIN, CALL_BEGIN), sink.content)):
        reader.keep(marker)
        has_call = marker == CALL_BEGIN
        while True:
            yield from reader.spaces()
            has_call = has_call or (yield from reader.accept(CALL_BEGIN))
            if not has_call:
                yield from reader.accept(CALLS_END)
                break
            has_call = False
            outcome = yield from _deepseek_call(reader, sink)
            if outcome is Outcome.NO_CALL:
                break
            if outcome is Outcome.BROKEN:
                yield from reader.until((CALL_END,), sink.arguments)
            reader.keep()
        sink.content(_unmarked(reader.kept()))
        yield from reader.spaces()


def _unmarked(kept: str) -> str:
    """ "" if only the markers around calls were kept."""
    bare = kept.replace(CALLS_BEGIN, "").replace(CALLS_END, "")
    return kept if bare.strip() else ""


def _deepseek_call(reader: AnswerReader, sink: Sink) -> Wait[Outcome]:
    name: list[str] = []
    yield from reader.run(NAME, name.append)
    if not (yield from reader.accept(CALL_SEP)):
        return Outcome.NO_CALL
    yield from reader.spaces()
    if (yield from reader.peek()) != "{":  # the previous word was the type of the call
        name.clear()
        yield from reader.run(NAME, name.append)
        yield from reader.spaces()
        if not (yield from reader.accept(FENCE_JSON)):
            return Outcome.NO_CALL
        yield from reader.spaces()
    if not name:
        return Outcome.NO_CALL
    reader.kept()
    sink.call("".join(name))
    if not (yield from read_arguments(reader, sink.arguments)):
        return Outcome.BROKEN
    yield from reader.spaces()
    yield from reader.accept(FENCE)
    yield from reader.spaces()
    yield from reader.accept(CALL_END)
    return Outcome.DONE


def json_list(reader: AnswerReader, sink: Sink) -> Wait[None]:
    """[{"name": …, "arguments": {…}}, …] and nothing else, as `required_schema` allows."""
    reader.keep()
    yield from reader.spaces()
    outcome = yield from read_calls(reader, sink)
    if outcome is Outcome.NO_CALL:
        sink.content(reader.kept())
    reader.kept()
    if outcome is Outcome.DONE:
        yield from reader.spaces()
    yield from reader.rest(sink.arguments if outcome is Outcome.BROKEN else sink.content)
