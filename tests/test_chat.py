"""Chat options: every accepted one works, and unknown ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Quick
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nanovllm.chat import ChatOptions, render
from nanovllm.checks import to_options
from nanovllm.config import EngineConfig
from nanovllm.prompts import Prompt
from nanovllm.replicas import child_config
from nanovllm.tokenizer import Tokenizer, load_full

TEXT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if tools %}({{ tools | length }} tools){% endif %}"
    "{% if add_generation_prompt %}[assistant]"
    "{% if enable_thinking is defined and not enable_thinking %}<nothink>{% endif %}{% endif %}"
)
PARTS_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
)
CONVERSATION = [{"role": "user", "content": "hi"}]


def tokenizer(template: str | None) -> Tokenizer:
    vocabulary = {word: i for i, word in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    quick = Quick(models.BPE(vocabulary, []))
    quick.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    full = PreTrainedTokenizerFast(tokenizer_object=quick)
    full.chat_template = template
    return Tokenizer(lambda: full)


def written(messages: Any, template: str | None = TEXT_TEMPLATE, **options: Any) -> str | None:
    (prompt,) = render(tokenizer(template), messages, ChatOptions.from_options(options))
    return prompt.text


def test_the_prompt_is_text_and_ids() -> None:
    one = tokenizer(TEXT_TEMPLATE)
    (prompt,) = render(one, CONVERSATION, ChatOptions())
    text = "[user]hi[assistant]"
    assert prompt == Prompt(text, one.encode(text), has_special_tokens=True)
    assert len(render(one, [CONVERSATION, CONVERSATION], ChatOptions())) == 2


def test_generation_prompt_and_continuation() -> None:
    assert written(CONVERSATION, add_generation_prompt=False) == "[user]hi"
    begun = [*CONVERSATION, {"role": "assistant", "content": "well"}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert written(begun, **options) == "[user]hi[assistant]well"


@pytest.mark.parametrize("content", ["well", [{"type": "text", "text": "well"}]])
@pytest.mark.parametrize("template", [TEXT_TEMPLATE, PARTS_TEMPLATE])
def test_an_empty_list_of_calls_is_no_calls(template: str, content: Any) -> None:
    calls = "{% for m in messages if 'tool_calls' in m %}{{ raise_exception('calls') }}{% endfor %}"
    answer = {"role": "assistant", "content": content}
    found = written([*CONVERSATION, {**answer, "tool_calls": []}], calls + template)
    assert found == written([*CONVERSATION, answer], template)


@pytest.mark.parametrize(
    "options", [{"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}]
)
def test_variables_of_the_template_reach_it(options: dict[str, Any]) -> None:
    assert written(CONVERSATION, **options) == "[user]hi[assistant]<nothink>"
    assert written(CONVERSATION, enable_thinking=True) == "[user]hi[assistant]"


def test_tools_and_another_template() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert written(CONVERSATION, tools=tools) == "[user]hi(1 tools)[assistant]"
    assert written(CONVERSATION, chat_template="{{ messages[0].content }}!") == "hi!"


@pytest.mark.parametrize("template", [TEXT_TEMPLATE, PARTS_TEMPLATE])
def test_text_and_parts_of_text_work_with_every_template(template: str) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    for messages in (CONVERSATION, parts):
        assert (written(messages, template) or "").startswith("[user]hi")


def test_parts_are_lines_of_a_text() -> None:
    content = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert written([{"role": "user", "content": content}]) == "[user]one\ntwo[assistant]"


@pytest.mark.parametrize(
    ("messages", "options", "match"),
    [
        (CONVERSATION, {"enable_thinkin": False}, "'enable_thinkin' is neither an option of chat"),
        (CONVERSATION, {"chat_template_kwargs": {"x": 1}}, "'x' is neither .* enable_thinking"),
        (CONVERSATION, {"chat_template_kwargs": 5}, "chat_template_kwargs is 5: it must be a dict"),
        (CONVERSATION, {"add_generation_prompt": "no"}, "add_generation_prompt is 'no'"),
        (CONVERSATION, {"continue_final_message": True}, "needs add_generation_prompt=False"),
        (CONVERSATION, {"chat_template_content_format": "x"}, "must be one of auto, string"),
        (CONVERSATION, {"mm_processor_kwargs": 1}, "mm_processor_kwargs is not supported"),
        (CONVERSATION, {"chat_template": 5}, "chat_template is 5: it must be text"),
        (CONVERSATION, {"chat_template": "{% for %}"}, "the chat template cannot be read"),
        (CONVERSATION, {"chat_template": "{{ 1 / 0 }}"}, "refuses these messages: division"),
        (CONVERSATION, {"chat_template_kwargs": {"messages": []}}, "'messages' is neither"),
        ([{"role": "user", "content": 5}], {}, "the content is 5: it must be text or a list"),
        ([{"role": "user", "content": {"type": "text"}}], {}, "the content is {'type': 'text'}"),
        ([{"role": "user", "content": "\ud83d"}], {}, "half of a surrogate pair"),
        ("hi", {}, "messages is 'hi': it must be a list of messages"),
        (["hi"], {}, "the conversation is 'hi'"),
        ([{"content": "hi"}], {}, "a dict with a 'role'"),
        (
            [{"role": "user", "content": [{"type": "sound", "sound": "x"}]}],
            {},
            "a part of the type 'sound': .* 'text', 'image_url'",
        ),
    ],
)
def test_mistakes_are_named(messages: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        written(messages, **options)


def test_what_a_template_refuses_is_a_value_error() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="refuses these messages: roles must alternate"):
        written(CONVERSATION, template, chat_template_content_format="string")
    with pytest.raises(ValueError, match="no chat template"):
        written(CONVERSATION, None)
    with pytest.raises(ValueError, match="'tools' is neither"):
        written(CONVERSATION, PARTS_TEMPLATE, tools=[{"type": "function"}])


def test_options_among_the_variables_are_options() -> None:
    assert written(CONVERSATION, chat_template_kwargs={"add_generation_prompt": False}) == (
        "[user]hi"
    )


def test_the_variables_of_named_templates_are_checked() -> None:
    named: Any = {"default": TEXT_TEMPLATE, "tool_use": "{{ tools | length }} tools"}
    assert written(CONVERSATION, named) == written(CONVERSATION)
    assert written(CONVERSATION, named, tools=[{"type": "function"}]) == "1 tools"
    assert written(CONVERSATION, named, chat_template="tool_use", tools=[{}, {}]) == "2 tools"
    with pytest.raises(ValueError, match="'enable_thinkin' is neither"):
        written(CONVERSATION, named, enable_thinkin=False)


# the option of an engine --------------------------------------------------------------------------


@pytest.mark.parametrize("is_file", [True, False])
def test_an_engine_may_have_another_chat_template(is_file: bool, tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(TEXT_TEMPLATE)
    config = EngineConfig("tiny-qwen3", chat_template=path if is_file else TEXT_TEMPLATE)
    for _ in range(2):  # from the checkpoint, and from the store
        found = child_config.tokenizer(config)
        assert found is not None
        (prompt,) = render(found, CONVERSATION, ChatOptions(chat_template_kwargs={}))
        assert prompt.text == "[user]hi[assistant]"
    options = to_options(child_config.with_full_paths(config))
    assert options["chat_template"] == TEXT_TEMPLATE, "it needs no file elsewhere"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chat_template": "missing.jinja"}, "'missing.jinja', neither a template nor a text file"),
        ({"chat_template": "EMPTY"}, "the file is empty"),
        ({"chat_template": "{{x}}", "skip_tokenizer_init": True}, "does not go with chat_template"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_before_anything_is_loaded(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").touch()
    with pytest.raises(ValueError, match=message):
        EngineConfig("tiny-qwen3", **options)


def test_a_tokenizer_with_code_of_its_own_is_refused_without_a_question(tmp_path: Path) -> None:
    found = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(found))
    (tmp_path / "config.json").write_text('{"model_type": "own"}')
    (tmp_path / "own.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match="needs custom code, which is not run"):
        load_full(tmp_path)
