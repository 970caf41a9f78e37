"""Renders conversations as prompts with a checkpoint's chat template."""

from __future__ import annotations

import functools
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from nanovllm.media import mm_inputs as media_given
from nanovllm.media.mm_inputs import MMInput
from nanovllm.prompts import Prompt, checked_text
from nanovllm.special_text import SpecialText
from nanovllm.templates import TemplateFacts, renderer
from nanovllm.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
THINKING = "message.thinking"  # read by templates whose name for reasoning_content it is
CONTENT_FORMATS = ("auto", "string", "openai")


class UnknownVariable(ValueError):
    """A variable that the chat template does not read. name: the variable."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


class CutArguments(str):
    """Arguments of a tool call in an assistant message that are not a JSON object, because the
    answer was cut off. The template writes them unchanged."""


@dataclass(frozen=True)
class ChatOptions:
    """Options of `LLM.chat`.

    chat_template: a template in place of the checkpoint's.
    chat_template_content_format: "string" passes contents as strings, "openai" as lists of parts,
        "auto" in the form that the template supports.
    add_generation_prompt: end with the beginning of the answer.
    continue_final_message: the answer continues the last message. It excludes
        add_generation_prompt.
    tools: descriptions of functions, for templates that read them.
    chat_template_kwargs: variables of the template, such as {"enable_thinking": False}.
    special_tokens_as_text: encode special tokens in user and tool messages as plain text, so that
        they cannot end a turn or stand for an image. Those in system and assistant messages stay
        special.
    mm_processor_kwargs: only None is supported.
    """

    chat_template: str | None = None
    chat_template_content_format: str = "auto"
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: Sequence[Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    special_tokens_as_text: bool = True
    mm_processor_kwargs: None = None

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> ChatOptions:
        """The options among `options`; all others are variables of the template."""
        known = {one.name for one in fields(cls)}
        given = {name: value for name, value in options.items() if name in known}
        others = {name: value for name, value in options.items() if name not in known}
        variables = given.get("chat_template_kwargs") or {}
        if not isinstance(variables, Mapping):
            raise ValueError(f"chat_template_kwargs is {variables!r}: it must be a dict")
        variables = {**others, **variables}
        # vLLM also takes options such as add_generation_prompt among the variables
        given |= {name: variables.pop(name) for name in known & variables.keys()}
        return cls(**{**given, "chat_template_kwargs": variables})

    def __post_init__(self) -> None:
        for name in ("add_generation_prompt", "continue_final_message", "special_tokens_as_text"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be True or False")
        if not isinstance(self.chat_template, (str, type(None))):
            raise ValueError(f"chat_template is {self.chat_template!r}: it must be text")
        if self.chat_template_content_format not in CONTENT_FORMATS:
            raise ValueError(
                f"chat_template_content_format is {self.chat_template_content_format!r}: it must "
                f"be one of {', '.join(CONTENT_FORMATS)}"
            )
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError("continue_final_message=True needs add_generation_prompt=False")
        if self.mm_processor_kwargs is not None:
            raise ValueError("mm_processor_kwargs is not supported: only None is")


def render(
    tokenizer: Tokenizer,
    messages: Any,
    options: ChatOptions,
    check: Callable[[Sequence[MMInput]], object] = tuple,
    max_chars: int | None = None,
    *,
    drops_variables: bool = False,
) -> list[Prompt]:
    """The prompts of one or several conversations. Raises ValueError for other objects, and for
    what the template or `check` (images and videos) refuses.

    max_chars: the limit on a rendered conversation, checked before tokenization.
    drops_variables: leave out variables that the template does not read instead of refusing them.
    """
    renderer.start()  # beside the import of transformers
    full = tokenizer.for_reading
    template, facts = _template(tokenizer, options)
    if drops_variables:
        options = _with_read_variables(facts.variables, options)
    _check_variables(facts.variables, options)
    several = _conversations(messages)
    as_parts = options.chat_template_content_format == "openai" or (
        options.chat_template_content_format == "auto" and not facts.writes_text
    )
    special = None
    if options.special_tokens_as_text:
        special = tokenizer.once("special text", lambda: SpecialText(tokenizer))
    prompts = []
    for conversation in several:
        bare, media = media_given.from_messages(conversation)
        check(media)
        if media and options.chat_template_content_format == "string":
            raise ValueError(
                f"the conversation has {media[0].name}: chat_template_content_format='string' has "
                "no place for it"
            )
        normal = [_message(message, as_parts or bool(media)) for message in bare]
        if THINKING in template:
            normal = list(map(_with_thinking, normal))
        others = (template, options.tools, options.chat_template_kwargs)
        marked = None if special is None else special.marked(normal, others)
        if special is not None and marked is not None:
            written = _written(full, template, marked.messages, options, max_chars)
            text = checked_text("the conversation", marked.text(written))
            token_ids: list[int] | None = special.encode(marked, written)
        else:
            text = _written(full, template, normal, options, max_chars)
            checked_text("the conversation", text)
            # the template writes the special tokens itself
            token_ids = None if media else tokenizer.encode(text, add_special_tokens=False)
        prompts.append(Prompt(text, token_ids, media=tuple(media), has_special_tokens=True))
    return prompts


def check_template(tokenizer: Tokenizer, options: ChatOptions) -> tuple[str, TemplateFacts]:
    """The template for these options, and its facts. Raises ValueError if there is none, and
    UnknownVariable."""
    template, facts = _template(tokenizer, options)
    _check_variables(facts.variables, options)
    return template, facts


def _template(tokenizer: Tokenizer, options: ChatOptions) -> tuple[str, TemplateFacts]:
    full = tokenizer.for_reading
    if not (options.chat_template or full.chat_template):
        raise ValueError("the tokenizer has no chat template: use generate() with plain prompts")
    # a tokenizer can have several templates, by name
    template = str(full.get_chat_template(options.chat_template or None, options.tools))
    return template, renderer.facts(template, full.special_tokens_map)


def _conversations(messages: Any) -> list[list[Mapping[str, Any]]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ValueError(f"messages is {messages!r}: it must be a list of messages")
    several = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
    for conversation in several:
        if not isinstance(conversation, Sequence) or isinstance(conversation, str):
            raise ValueError(f"the conversation is {conversation!r}: it must be a list of messages")
        for message in conversation:
            if not isinstance(message, Mapping) or "role" not in message:
                raise ValueError(f"the message is {message!r}: it must be a dict with a 'role'")
    return [list(conversation) for conversation in several]


def _message(message: Mapping[str, Any], as_parts: bool) -> dict[str, Any]:
    """The message with its content as one text or, with `as_parts`, as a list of parts. Without
    an empty list of calls, which some templates refuse or write as calls."""
    if not message.get("tool_calls", True):
        message = {key: value for key, value in message.items() if key != "tool_calls"}
    content = message.get("content")
    if content is None or (isinstance(content, str) and not as_parts):
        return dict(message)
    if not isinstance(content, (str, Sequence)):
        raise ValueError(f"the content is {content!r}: it must be text or a list of parts")
    parts = [content] if isinstance(content, str) else content
    if as_parts:
        return {**message, "content": [_part(part) for part in parts]}
    return {**message, "content": "\n".join(_part(part)["text"] for part in parts)}


def _with_thinking(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning as `thinking`. The template of gpt-oss takes one of that and
    content beside calls, and writes it to the channel of reasoning: both become one text."""
    reasoning, content = message.get("reasoning_content"), message.get("content")
    if not isinstance(reasoning, str) or not reasoning or "thinking" in message:
        return message
    others = {key: value for key, value in message.items() if key != "reasoning_content"}
    if not (message.get("tool_calls") and isinstance(content, str) and content):
        return {**others, "thinking": reasoning}
    return {**others, "thinking": f"{reasoning}\n{content}", "content": ""}


def _part(part: Any) -> dict[str, str]:
    """A part in the form that templates read: a text, or the placeholder of an image or video."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in media_given.KINDS:
        return {"type": str(kind)}
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ValueError(
            f"the content has a part of the type {kind!r}: it must be text or have one of the "
            f"types 'text', {', '.join(map(repr, media_given.TYPES))}"
        )
    return {"type": "text", "text": str(part["text"])}


def _written(
    full: Any,
    template: str,
    messages: list[dict[str, Any]],
    options: ChatOptions,
    max_chars: int | None,
) -> str:
    """Render the conversation with cut-off arguments as plain text. A template may write arguments
    as text, as JSON (which would quote the string), or read them as an object, which here has the
    text as its one member."""
    cut: dict[str, str] = {}

    def marked(text: CutArguments) -> str:
        mark = f"nanovllm-{secrets.token_hex(16)}"
        cut[mark] = text
        return mark

    has_calls = any("tool_calls" in one for one in messages)
    with_marks = _with_arguments(messages, marked) if has_calls else messages
    if not cut:
        return _apply(full, template, messages, options, max_chars)
    try:
        found = _apply(full, template, with_marks, options, max_chars)
    except ValueError:
        as_objects = _with_arguments(messages, lambda text: {"arguments": text})
        return _apply(full, template, as_objects, options, max_chars)
    for mark, text in cut.items():
        found = found.replace(f'"{mark}"', text).replace(mark, text)
    return found


def _with_arguments(
    messages: list[dict[str, Any]], replacement: Callable[[CutArguments], Any]
) -> list[dict[str, Any]]:
    """The messages with cut-off arguments replaced."""

    def call(one: Any) -> Any:
        function = one.get("function") if isinstance(one, Mapping) else None
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        if not isinstance(arguments, CutArguments):
            return one
        assert isinstance(function, Mapping)
        return {**one, "function": {**function, "arguments": replacement(arguments)}}

    return [
        {**one, "tool_calls": list(map(call, one["tool_calls"]))}
        if isinstance(one.get("tool_calls"), list)
        else one
        for one in messages
    ]


def _apply(
    full: Any,
    template: str,
    messages: Sequence[Mapping[str, Any]],
    options: ChatOptions,
    max_chars: int | None,
) -> str:
    variables = {
        "add_generation_prompt": options.add_generation_prompt,
        "continue_final_message": options.continue_final_message,
        "tools": options.tools and list(map(_tool, options.tools)),
        **options.chat_template_kwargs,
    }
    if not messages:
        raise ValueError("the conversation is empty: it must have at least one message")
    if _renders_itself(full):
        return _rendered_by(full, template, messages, variables)
    # as in transformers' apply_chat_template: many templates would write "None"
    given = [{key: one for key, one in m.items() if one is not None} for m in messages]
    return renderer.render(template, given, variables, full.special_tokens_map, max_chars)


def _renders_itself(full: Any) -> bool:
    """Whether the user has assigned a tokenizer with its own method for templates."""
    from transformers import PreTrainedTokenizerBase

    usual = PreTrainedTokenizerBase.apply_chat_template
    return getattr(type(full), "apply_chat_template", usual) is not usual


def _rendered_by(
    full: Any, template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> str:
    try:
        return str(
            full.apply_chat_template(messages, chat_template=template, tokenize=False, **variables)
        )
    except Exception as error:  # a template's code can raise any
        raise ValueError(f"the chat template refuses these messages: {error}") from error


def _tool(given: Any) -> Any:
    """The description of a tool, which may be a Python function."""
    if not callable(given):
        return given
    from transformers.utils.chat_template_utils import get_json_schema

    return get_json_schema(given)


def _with_read_variables(read: frozenset[str], options: ChatOptions) -> ChatOptions:
    given = options.chat_template_kwargs
    kept = {name: one for name, one in given.items() if name in read}
    for name in given.keys() - kept.keys():
        _note_unread(name[:64])
    return replace(options, chat_template_kwargs=kept)


@functools.lru_cache(maxsize=64)
def _note_unread(name: str) -> None:
    """Log a variable once."""
    logger.info("the chat template does not read the variable %r, which is left out", name)


def _check_variables(variables: frozenset[str], options: ChatOptions) -> None:
    read = variables - {"messages"}
    names = [*options.chat_template_kwargs, *(["tools"] if options.tools else [])]
    for name in names:
        if name not in read:
            raise UnknownVariable(
                name,
                f"{name!r} is neither an option of chat nor a variable of this chat template, "
                f"which reads {', '.join(sorted(read))}",
            )
