"""Conversations with tools: the chat templates, the split, the checks, what the loss is on."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nanovllm.hub import EMBEDDED, resolve
from nanovllm.parsers.tools import tool_parser, tool_parser_for

# scripts are run as files, and import each other as such
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import accuracy
from tiny import tasks, tool_wordings
from tiny.chat_tokenizer import build_tokenizer
from tiny.corpus import build_corpus, conversation, render
from tiny.tool_tasks import KINDS, Call, ToolTask, calls_text, held_out, is_correct
from tiny.tool_tasks import training_examples as mixed_examples

USER = {"role": "user", "content": "Weather in Oslo?"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "The weather.", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'


@pytest.fixture(scope="module")
def training() -> list[ToolTask]:
    """Examples with tools, or with questions for tools that are not there."""
    some = islice(mixed_examples(seed=3), 9_899)
    return [task for task in some if isinstance(task, ToolTask)]


@pytest.fixture(scope="module")
def asked() -> list[ToolTask]:
    return [task for task in held_out(1_600, seed=3) if isinstance(task, ToolTask)]


@pytest.fixture(scope="module", params=EMBEDDED)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(resolve(request.param))


def called(arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


def calls_in(task: ToolTask) -> list[Call]:
    """Those of all turns, read back from the text of the conversation."""
    answers = [one for one in conversation(task, "tiny-qwen3") if one["role"] == "assistant"]
    parsed = [tool_parser("hermes").parse(render([one])) for one in answers]
    return [Call(one.name, json.loads(one.arguments)) for each in parsed for one in each.calls]


def test_the_template_shows_calls_that_a_parser_reads(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tool_parser_for(str(tokenizer.chat_template)) == "hermes"


def test_without_tools_a_conversation_is_chatml_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    for task in tasks.held_out(99, seed=0):
        expected = "".join(
            f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in task.messages
        )
        for tools in (None, []):
            assert tokenizer.apply_chat_template(task.messages, tools, tokenize=False) == expected


def test_tools_are_lines_of_the_system_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    line = 'weather: The weather. {"city": {"type": "string"}}'
    bare = {"type": "function", "function": {"name": "clock"}}
    for system, begin in (([], ""), ([{"role": "system", "content": "Be brief."}], "Be brief.\n")):
        text = tokenizer.apply_chat_template([*system, USER], [TOOL, bare], tokenize=False)
        turn = f"<|im_start|>system\n{begin}<tools>\n{line}\nclock {{}}\n</tools><|im_end|>\n"
        assert text == f"{turn}<|im_start|>user\nWeather in Oslo?<|im_end|>\n"
    flat = tokenizer.apply_chat_template([USER], [FUNCTION, bare], tokenize=False)
    assert flat == tokenizer.apply_chat_template([USER], [TOOL, bare], tokenize=False)


@pytest.mark.parametrize("arguments", [{"city": "Zürich"}, '{"city": "Zürich"}'])
def test_calls_are_written_as_the_parser_reads_them(
    tokenizer: PreTrainedTokenizerFast, arguments: Any
) -> None:
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [called(arguments)] * 2},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "Wait.", "tool_calls": [called(arguments)]},
    ]
    text = tokenizer.apply_chat_template(messages, [TOOL], tokenize=False)
    assert text.endswith(
        f"<|im_start|>assistant\n{CALL}\n{CALL}<|im_end|>\n<|im_start|>tool\n5<|im_end|>\n"
        f"<|im_start|>assistant\nWait.\n{CALL}<|im_end|>\n"
    )


def test_a_conversation_is_written_as_the_template_writes_it(training: list[ToolTask]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny-qwen3"))
    assert {task.kind for task in training[:99]} == set(KINDS)
    for task in training[:99]:
        messages, tools = conversation(task, "tiny-qwen3"), list(task.tools)
        written = tokenizer.apply_chat_template(messages, tools, tokenize=False)
        assert render(messages, tools) == written
        if task.calls:  # the answer is what the template writes for the calls
            functions = [{"function": one._asdict()} for one in task.calls]
            messages[-1] = {"role": "assistant", "content": None, "tool_calls": functions}
            assert tokenizer.apply_chat_template(messages, tools, tokenize=False) == written


def test_the_tokenizer_does_not_depend_on_tools(tmp_path: Path) -> None:
    build_tokenizer(seed=0).save_pretrained(tmp_path)
    built, shipped = tmp_path / "tokenizer.json", resolve("tiny-qwen3") / "tokenizer.json"
    assert built.read_bytes() == shipped.read_bytes()


def test_the_loss_is_on_all_turns_of_the_assistant() -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny-qwen3"))
    text = tokenizer.backend_tokenizer.to_str()
    options = {"with_tools": True, "seed": 5, "num_examples": 99, "num_workers": 1}
    corpus = build_corpus(text, "tiny-qwen3", **options)
    expected = [
        render([message]).removeprefix("<|im_start|>assistant\n").removesuffix("\n")
        for task in islice(mixed_examples("5.0"), 99)
        for message in conversation(task, "tiny-qwen3")
        if message["role"] == "assistant"
    ]
    assert any("<tool_call>" in one for one in expected)
    assert tokenizer.decode(corpus.tokens_T[corpus.is_answer_T]) == "".join(expected)


def test_a_held_out_value_is_no_calls_first_in_training(
    training: list[ToolTask], asked: list[ToolTask]
) -> None:
    closed = {*tool_wordings.ROOMS, *tool_wordings.LANGUAGES, *tool_wordings.CURRENCIES}
    trained = {str(value).lower() for task in training for call in calls_in(task)
               for value in call.arguments.values()}  # fmt: skip
    num_compared = 0
    for task in asked:
        for call in task.calls:
            # of a tool with several parameters, at least one value is
            new = [one for one in call.arguments.values() if str(one).lower() not in trained]
            if not closed & set(map(str, call.arguments.values())):
                assert new, call
                num_compared += 1
    assert num_compared > 50


def test_names_and_values_of_calls_can_be_copied(training: list[ToolTask]) -> None:
    num_calls = 0
    for task in training:
        for call in task.calls:
            properties = [
                tool["function"]["parameters"]["properties"]
                for tool in task.tools
                if tool["function"]["name"] == call.name
            ]
            assert len(properties) == 1 and set(call.arguments) <= set(properties[0])
            for name, value in call.arguments.items():
                assert str(value) in task.question
                is_text = properties[0][name]["type"] == "string"
                assert isinstance(value, str if is_text else int)
            num_calls += 1
    assert num_calls > 50


def test_reference_answers_are_correct(training: list[ToolTask], asked: list[ToolTask]) -> None:
    assert {task.kind for task in asked} == set(KINDS)
    for task in [*training, *asked]:
        assert is_correct(task, task.answer), task


@pytest.mark.parametrize(
    "wrong",
    [
        "The result is 5.",
        calls_text([Call("roll", {"sides": 6})]),
        calls_text([Call("dice", {"n": 6})]),
        calls_text([Call("dice", {"sides": "6"})]),
        calls_text([Call("dice", {"sides": 6.0})]),
        calls_text([Call("dice", {"sides": 6})] * 2),
        "OK. " + calls_text([Call("dice", {"sides": 6})]),
        calls_text([Call("dice", {"sides": 6})]).replace("6}", ""),
    ],
)
def test_only_the_same_calls_are_correct(wrong: str) -> None:
    call = Call("dice", {"sides": 6})
    task = ToolTask("?", calls_text([call]), "call", "phrase", (), "key", calls=(call,))
    assert is_correct(task, task.answer)
    assert is_correct(task, '<tool_call>{"name":"dice","arguments":{"sides":6}}</tool_call>')
    assert not is_correct(task, wrong)


def test_an_answer_that_needs_no_call_is_wrong_with_one() -> None:
    task = ToolTask("1 + 1", "1 + 1 = 2.", "plain", "last_number", ("2",), "key", tools=(TOOL,))
    assert is_correct(task, "1 + 1 = 2.")
    assert not is_correct(task, calls_text([Call("f", {"x": 2})]))


def test_the_questions_without_tools_stay_those_of_other_models() -> None:
    asked = held_out(160, seed=0)
    assert asked[:130] == tasks.held_out(130, seed=0)
    assert [task.kind for task in asked[130:]] == [KINDS[idx % 3] for idx in range(30)]


def test_a_server_is_asked_in_openais_form_and_its_calls_are_read(training: list[ToolTask]) -> None:
    task = next(one for one in training if one.kind == "result")
    sent = [accuracy._as_json(one) for one in task.messages]
    functions = [one["function"] for message in sent for one in message.get("tool_calls", ())]
    assert functions and all(isinstance(json.loads(one["arguments"]), dict) for one in functions)
    call = {"name": "f", "arguments": '{"x": 1}'}
    answer = {"content": None, "tool_calls": [{"function": call}] * 2}
    assert accuracy._as_text(answer) == calls_text([Call("f", {"x": 1})] * 2)
    assert accuracy._as_text({"content": "Hi!"}) == "Hi!"
