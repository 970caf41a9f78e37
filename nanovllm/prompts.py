"""The accepted forms of prompts, and `Prompt`: text or token ids, and media."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

from nanovllm.checks import InvalidValue, as_python
from nanovllm.media import mm_inputs as media_given
from nanovllm.media.mm_inputs import MMInput


class _Optional(TypedDict, total=False):
    cache_salt: str
    multi_modal_data: Mapping[str, Any]


class TextPrompt(_Optional):
    """A prompt as text. Prompts share cache blocks only with prompts of the same `cache_salt`.

    `multi_modal_data` has its images, videos and audio: {"image": one or a list, "video": one or a
    list, "audio": one or a list}. The prompt has the model's placeholder for each. See
    docs/media.md.
    """

    prompt: str


class TokensPrompt(_Optional):
    """A prompt as token ids."""

    prompt_token_ids: Sequence[int]


# keys of vLLM's prompts for which only None is accepted
NOT_SUPPORTED = (
    "multi_modal_uuids", "mm_processor_kwargs", "prompt_embeds", "token_type_ids",
    "encoder_prompt", "decoder_prompt",
)  # fmt: skip
KEYS = ("prompt", "prompt_token_ids", "multi_modal_data", "cache_salt")

BYTES = (bytes, bytearray, memoryview)  # iterables of numbers, but not token ids


PROMPT = "prompt"  # the field of errors about prompts of any form


class PromptRefused(InvalidValue):
    """A prompt that cannot be answered: it is empty, or has ids outside the vocabulary."""

    def __init__(self, message: str) -> None:
        super().__init__(PROMPT, message)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self),)


class PromptTooLong(PromptRefused):
    """A prompt that does not fit into max_model_len."""


def check_pooled(num_tokens: int, max_model_len: int) -> None:
    """Raises PromptTooLong for a prompt with more tokens than a model that pools takes."""
    if num_tokens > max_model_len:
        raise PromptTooLong(
            f"the prompt has {num_tokens} tokens: at most max_model_len ({max_model_len}) fit, or "
            "set truncate_prompt_tokens"
        )


@dataclass(frozen=True)
class Prompt:
    """A prompt. `token_ids` is None if `text` must be encoded first.

    `media` has the images, videos and audio of its placeholders, each kind in order. With
    `has_special_tokens` the text has all special tokens already. `second_at` is the token with
    which the second of two texts begins, for models whose tokens have types; 0 for one text.
    """

    text: str | None
    token_ids: list[Any] | None
    cache_salt: str | None = None
    media: tuple[MMInput, ...] = ()
    has_special_tokens: bool = False
    second_at: int = 0


# a text, token ids, or one of the dicts above
AnyPrompt = str | Iterable[int] | TextPrompt | TokensPrompt | Prompt
AnyPrompts = AnyPrompt | Iterable[AnyPrompt]


def prompt_list(prompts: Any, prompt_token_ids: Any = None) -> list[Prompt]:
    """The prompts of a call: one prompt, or an iterable of prompts. Raises ValueError for others.

    `prompt_token_ids` gives all prompts as token ids, beside or instead of their texts.
    """
    if prompt_token_ids is None:
        return _several(prompts)
    with_ids = _several(prompt_token_ids)
    if any(one.token_ids is None for one in with_ids):
        raise PromptRefused(
            f"prompt_token_ids is {prompt_token_ids!r}: it must be lists of token ids"
        )
    texts = [None] * len(with_ids) if prompts is None else [one.text for one in _several(prompts)]
    if len(texts) != len(with_ids):
        raise PromptRefused(
            f"{len(texts)} prompts and {len(with_ids)} prompt_token_ids: give one list of token "
            "ids for each prompt"
        )
    return [replace(one, text=text) for text, one in zip(texts, with_ids)]


def as_prompt(given: Any) -> Prompt:
    """One prompt. Raises ValueError for other objects, and for a text that is not Unicode."""
    if isinstance(given, Prompt):
        return given
    if isinstance(given, str):
        return Prompt(checked_text("the prompt", given), None)
    if isinstance(given, Mapping):
        return _of_mapping(given)
    if hasattr(given, "tolist") and hasattr(given, "ndim"):
        if given.ndim != 1:
            raise PromptRefused(
                f"the prompt has shape {list(given.shape)}: token ids have one dimension"
            )
        return Prompt(None, given.tolist())
    if isinstance(given, Iterable) and not isinstance(given, BYTES):
        return Prompt(None, list(given))
    raise PromptRefused(f"the prompt is {given!r}: it must be text or a list of token ids")


def _several(prompts: Any) -> list[Prompt]:
    return [as_prompt(one) for one in each_prompt(prompts)]


def each_prompt(prompts: Any) -> list[Any]:
    """The prompts of a call, one prompt or an iterable of prompts, each as it was given: see
    `as_prompt`."""
    if isinstance(prompts, (str, Mapping, Prompt, *BYTES)) or not isinstance(prompts, Iterable):
        return [prompts]
    if getattr(prompts, "ndim", 2) < 2:  # an array of token ids
        return [prompts]
    given = list(prompts)
    if given and isinstance(as_python(given[0]), numbers.Number):
        return [given]
    return given


def _of_mapping(given: Mapping[Any, Any]) -> Prompt:
    unknown = [key for key in given if key not in KEYS]
    refused = [key for key in unknown if key not in NOT_SUPPORTED or given[key] is not None]
    if refused:
        raise PromptRefused(
            f"the prompt has the key {refused[0]!r}, which is not supported: use 'prompt' or "
            "'prompt_token_ids', 'multi_modal_data' and 'cache_salt'"
        )
    text, token_ids, salt = (given.get(k) for k in ("prompt", "prompt_token_ids", "cache_salt"))
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise InvalidValue("cache_salt", f"cache_salt is {salt!r}: it must be text")
    if salt is not None:
        checked_text("cache_salt", salt, "cache_salt")
    data = given.get("multi_modal_data")
    media = () if data is None else tuple(media_given.from_data(data))
    if text is not None and not isinstance(text, str):
        raise PromptRefused(f"the prompt is {text!r}: the value of 'prompt' must be text")
    if token_ids is not None:
        if isinstance(token_ids, (str, Mapping)):
            raise PromptRefused(
                f"prompt_token_ids is {token_ids!r}: it must be a list of token ids"
            )
        return Prompt(text, as_prompt(token_ids).token_ids, salt, media)
    if text is None:
        raise PromptRefused(
            f"the prompt is {dict(given)!r}: it has no 'prompt' or 'prompt_token_ids'"
        )
    return Prompt(checked_text("the prompt", text), None, salt, media)


def checked_text(name: str, text: str, field: str = PROMPT) -> str:
    """The same text. Raises InvalidValue with the field if it is not Unicode."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidValue(
                field,
                f"{name} has {text[error.start]!r} at position {error.start}: half of a "
                "surrogate pair is not a character",
            ) from None
    return text
