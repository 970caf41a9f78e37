"""Builds prompts from request bodies."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from nanovllm.api.chat_messages import checked_messages, num_chars_of, too_long
from nanovllm.api.config import ServerConfig
from nanovllm.api.errors import ApiError, invalid
from nanovllm.api.schemas import ChatBody, CompletionBody, TokenizeBody
from nanovllm.api.tools import check_tools
from nanovllm.chat import ChatOptions, UnknownVariable, check_template, render
from nanovllm.checks import InvalidValue
from nanovllm.prompts import Prompt, PromptRefused, checked_text
from nanovllm.schedule.logprobs import SHOW_SPECIAL
from nanovllm.serving.async_engine import AsyncEngine
from nanovllm.templates import renderer
from nanovllm.tokenizer import LONG_TEXT, Tokenizer

Result = TypeVar("Result")

CHARS_PER_TOKEN = 64
MAX_VARIABLES = 16
VARIABLES = "chat_template_kwargs"
# names that templates get from other fields
NO_VARIABLES = frozenset({"messages", *ChatOptions.__dataclass_fields__})

# fields of /tokenize that need messages
OF_MESSAGES = ("add_generation_prompt", "continue_final_message", "tools", VARIABLES)


class PromptMaker:
    """Builds the prompts of requests. Methods raise ValueError or ApiError."""

    def __init__(self, engine: AsyncEngine, config: ServerConfig) -> None:
        self._engine, self._config = engine, config
        self.max_chars = config.max_prompt_chars or CHARS_PER_TOKEN * engine.max_model_len
        self._variables = dict(config.default_chat_template_kwargs or {})
        if self._variables:
            check_defaults(engine.tokenizer, self._variables)
        self._is_warm = False

    async def of_completion(self, body: CompletionBody) -> list[Prompt]:
        """The prompts: one or several texts, or one or several lists of token ids."""
        given = body.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]  # type: ignore[list-item]
        if not given:
            raise invalid("prompt", "prompt is empty")
        kinds = {type(one) for one in given}
        if len(kinds) > 1 or kinds == {int}:
            raise invalid("prompt", "prompt mixes texts and token ids")
        most = self._config.max_prompts
        if len(given) > most:
            raise invalid("prompt", f"prompt has {len(given)} prompts: at most {most} are allowed")
        if kinds == {list}:
            return [Prompt(None, one, body.cache_salt) for one in given]  # type: ignore[arg-type]
        texts = [str(one) for one in given]
        several = await self._encoded(texts, body.add_special_tokens is not False)
        return [Prompt(*one, body.cache_salt) for one in zip(texts, several)]

    async def texts(self, several: Sequence[Sequence[int]]) -> list[str]:
        """The texts of prompts given as token ids."""
        tokenizer = self._engine.tokenizer
        if tokenizer is None:
            raise invalid("echo", "the model has no tokenizer: echo needs one")
        return await beside(lambda: list(map(tokenizer.decode, several)), sum(map(len, several)))

    def token_text(self, token_id: int) -> str:
        tokenizer = self._engine.tokenizer
        if tokenizer is None:
            return f"token_id:{token_id}"
        return tokenizer.decode([token_id], SHOW_SPECIAL)

    async def _encoded(self, texts: Sequence[str], has_special: bool) -> list[list[int]]:
        """The token ids of a request's texts, which are long or not together."""
        tokenizer = self._engine.tokenizer
        if tokenizer is None:
            raise invalid("prompt", "the model has no tokenizer: give token ids")
        for text in texts:
            self.check_length(text, "prompt")
            checked_text("prompt", text)
        encode = partial(tokenizer.encode_all, texts, add_special_tokens=has_special)
        return await beside(encode, sum(map(len, texts)))

    def check_length(self, text: str, name: str) -> None:
        """Refuse a text that is too long, before it is encoded."""
        if len(text) > self.max_chars:
            raise too_long(name, len(text), self.max_chars)

    async def warm(self) -> None:
        """Load in another thread what the first conversation needs."""
        with contextlib.suppress(ValueError):
            await self.conversation([{"role": "user", "content": "hello"}], None, None, None, {})

    async def of_chat(self, body: ChatBody) -> Prompt:
        """The conversation, rendered by the chat template."""
        variables = with_effort(body.reasoning_effort, body.chat_template_kwargs or {})
        tools = None if body.tool_choice == "none" else body.tools
        prompt = await self.conversation(
            body.messages, body.add_generation_prompt, body.continue_final_message, tools, variables
        )
        return replace(prompt, cache_salt=body.cache_salt)

    async def of_tokenize(self, body: TokenizeBody) -> list[int]:
        if body.messages is None:
            for name in OF_MESSAGES:
                if getattr(body, name) is not None:
                    raise invalid(name, f"{name} needs messages, not prompt")
            has_special = body.add_special_tokens is not False
            return (await self._encoded([body.prompt or ""], has_special))[0]
        if body.add_special_tokens:
            words = "add_special_tokens is true: the chat template adds them"
            raise invalid("add_special_tokens", words)
        check_tools(body.tools or [], self._config.max_tools)
        prompt = await self.conversation(
            body.messages, body.add_generation_prompt, body.continue_final_message, body.tools,
            dict(body.chat_template_kwargs or {}),
        )  # fmt: skip
        if prompt.token_ids is None or prompt.media:
            raise invalid("messages", "messages have images or sound: only text can be tokenized")
        return prompt.token_ids

    async def conversation(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool | None,
        continue_final_message: bool | None,
        tools: list[dict[str, Any]] | None,
        variables: dict[str, Any],
    ) -> Prompt:
        """Messages rendered by the chat template, as a prompt."""
        tokenizer = self._engine.tokenizer
        if tokenizer is None:
            raise invalid("messages", "the model has no tokenizer: chat needs one")
        clean, num_chars = checked_messages(messages, self._config.max_messages, self.max_chars)
        _check_variables(variables)
        variables = {**self._variables, **variables}
        for name, value in (("tools", tools), (VARIABLES, variables)):
            num = num_chars_of(value) if value else 0
            if num > self.max_chars:
                raise too_long(name, num, self.max_chars)
            num_chars += num
        # parts without text take time, too
        num_chars += sum(len(one["content"]) for one in clean if isinstance(one["content"], list))
        going_on = bool(continue_final_message)
        begins = not going_on if add_generation_prompt is None else add_generation_prompt
        options = ChatOptions(
            add_generation_prompt=begins, continue_final_message=going_on, tools=tools or None,
            chat_template_kwargs=variables,
            special_tokens_as_text=self._config.special_tokens_as_text,
        )  # fmt: skip
        args = (tokenizer, clean, options, self._engine.check_media, self.max_chars)
        try:
            work = partial(render, *args, drops_variables=True)
            # the first rendering waits for the renderer's process, and for other conversations
            size = num_chars if self._is_warm and renderer.is_ready else LONG_TEXT + 1
            prompt = (await beside(work, size))[0]
        except UnknownVariable as error:
            raise invalid(error.name, str(error)) from None
        except InvalidValue:
            raise
        except ValueError as error:
            raise PromptRefused(str(error)) from None
        self._is_warm = True
        return prompt


async def beside(work: Callable[[], Result], size: int) -> Result:
    """The result of work on a text or list of this size; runs in a thread if it would block the
    event loop for long."""
    return work() if size <= LONG_TEXT else await asyncio.to_thread(work)


def with_effort(effort: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a chat template, with those of a reasoning effort. As in vLLM, "none" turns
    thinking off unless `given` has it."""
    if effort is None:
        return dict(given)
    return {"enable_thinking": effort != "none", **given, "reasoning_effort": effort}


def check_defaults(tokenizer: Tokenizer | None, variables: Mapping[str, Any]) -> None:
    """Raises ValueError for default variables that all conversations of this model refuse."""
    name = "default_chat_template_kwargs"
    if tokenizer is None or not tokenizer.for_reading.chat_template:
        raise ValueError(f"{name} is {variables!r}, but the model has no chat template")
    try:
        _check_variables(variables)
        check_template(tokenizer, ChatOptions(chat_template_kwargs=variables))
    except (ValueError, ApiError) as error:
        raise ValueError(f"{name} is {variables!r}: {error}") from None


def _check_variables(variables: Mapping[str, Any]) -> None:
    if len(variables) > MAX_VARIABLES:
        words = f"{VARIABLES} has {len(variables)} variables: at most {MAX_VARIABLES} are allowed"
        raise invalid(VARIABLES, words)
    for name in variables:
        if name in NO_VARIABLES:
            words = f"{VARIABLES} has {name!r}, which is not a variable: use the field"
            raise invalid(VARIABLES, words)
