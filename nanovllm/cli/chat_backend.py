"""Chat backends of `chat` and `run`: a model in this process, or one behind a server."""

from __future__ import annotations

import argparse
import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from nanovllm import env
from nanovllm.checks import hints
from nanovllm.cli import http
from nanovllm.cli.engine_options import add_engine_options, engine_options
from nanovllm.cli.watch import add_quiet
from nanovllm.flags import Parser, add_flag, documented, json_value
from nanovllm.sampling import SamplingParams

if TYPE_CHECKING:
    from nanovllm.llm import LLM
    from nanovllm.prompts import Prompt

# The parameters useful for one answer in a terminal. The seed is an engine option.
SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "max_tokens", "min_tokens", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "stop", "ignore_eos",
)  # fmt: skip
Messages = Sequence[Mapping[str, Any]]
Write = Callable[[str], None]


class Reply(NamedTuple):
    """A whole answer. num_prompt, num_output: numbers of tokens."""

    model: str
    text: str
    reasoning: str
    finish_reason: str | None
    num_prompt: int
    num_output: int

    def as_dict(self) -> dict[str, Any]:
        """As a dict, without an empty reasoning_content; usage as in OpenAI's API."""
        usage = {
            "prompt_tokens": self.num_prompt, "completion_tokens": self.num_output,
            "total_tokens": self.num_prompt + self.num_output,
        }  # fmt: skip
        reasoning = {"reasoning_content": self.reasoning} if self.reasoning else {}
        end = {"finish_reason": self.finish_reason, "usage": usage, "model": self.model}
        return {"text": self.text, **reasoning, **end}


class ChatBackend(Protocol):
    """A chat backend that streams answers."""

    def answer(self, messages: Messages, write: Write, think: Write) -> None:
        """Write the answer to a conversation, and a server's reasoning to `think`.

        Ctrl-C stops the answer and raises KeyboardInterrupt. Raises ValueError and OSError.
        """
        ...

    def complete(self, prompt: str, write: Write) -> None:
        """Write the continuation of a prompt."""
        ...

    def ask(self, asked: Messages | str) -> Reply:
        """The whole answer to a conversation, or the continuation of a prompt."""
        ...

    @property
    def has_template(self) -> bool: ...


def add_arguments(parser: Parser, *, positional: bool) -> None:
    """Add the options of both backends. `positional`: the first word is the model."""
    add = parser.add_argument
    add("--url", help="use the server at this URL, such as http://127.0.0.1:8000")
    add("--api-key", metavar="KEY", help="API key (default: the variable OPENAI_API_KEY)")
    template = 'variables of the chat template, such as {"enable_thinking": false}'
    add_quiet(parser)
    add("--chat-template-kwargs", type=json_value, metavar="JSON", default={}, help=template)
    sampling = parser.add_argument_group("sampling parameters", "The fields of SamplingParams.")
    texts, types = documented(SamplingParams), hints(SamplingParams)
    for name in SAMPLING:
        hint = Sequence[str] if name == "stop" else types[name]
        add_flag(sampling, name, hint, texts[name])
    add_engine_options(parser, positional=positional)


def open_model(args: argparse.Namespace) -> ChatBackend:
    """The backend for the arguments. Raises ValueError for conflicting options."""
    sampling = {name: value for name, value in vars(args).items() if name in SAMPLING}
    variables = args.chat_template_kwargs
    if not isinstance(variables, dict):
        raise ValueError(f"chat_template_kwargs is {variables!r}: it must be a JSON object")
    SamplingParams(**sampling)  # checked before anything is loaded
    model, options = engine_options(args)
    if args.url is None:
        if args.api_key is not None:
            raise ValueError("--api-key needs --url")
        from nanovllm.llm import LLM

        return LocalModel(LLM(model, **options), sampling, variables)
    if "seed" in options:
        sampling["seed"] = options.pop("seed")
    if options:
        flag = f"--{next(iter(options)).replace('_', '-')}"
        raise ValueError(f"{flag} is an engine option: not supported with --url")
    if variables:
        sampling["chat_template_kwargs"] = variables
    return ServedModel(args.url, args.api_key or env.api_key(), args.model, sampling)


class LocalModel:
    """A model in this process."""

    def __init__(self, llm: LLM, sampling: Mapping[str, Any], variables: Mapping[str, Any]) -> None:
        self.llm, self.variables = llm, variables
        self.params = llm.get_default_sampling_params()
        for name, value in {"max_tokens": None, **sampling}.items():
            setattr(self.params, name, value)

    @property
    def has_template(self) -> bool:
        tokenizer = self.llm.engine.tokenizer
        return tokenizer is not None and bool(tokenizer.for_reading.chat_template)

    def answer(self, messages: Messages, write: Write, think: Write) -> None:
        self._stream(self._rendered(messages), write)

    def complete(self, prompt: str, write: Write) -> None:
        self._stream(prompt, write)

    def ask(self, asked: Messages | str) -> Reply:
        prompt = asked if isinstance(asked, str) else self._rendered(asked)
        (found,) = self.llm.generate([prompt], self.params, use_tqdm=False)
        (answer,) = found.outputs
        if answer.error is not None:
            raise ValueError(answer.error)
        num_prompt, num_output = len(found.prompt_token_ids), len(answer.token_ids)
        model = self.llm.engine.config.model
        return Reply(model, answer.text, "", answer.finish_reason, num_prompt, num_output)

    def _rendered(self, messages: Messages) -> Prompt:
        from nanovllm.chat import ChatOptions, render

        engine = self.llm.engine
        assert engine.tokenizer is not None, "has_template"
        options = ChatOptions(chat_template_kwargs=self.variables)
        (prompt,) = render(engine.tokenizer, messages, options, engine.check_media)
        return prompt

    def _stream(self, prompt: Any, write: Write) -> None:
        with _ctrl_c() as stops, closing(self.llm.stream(prompt, self.params)) as pieces:  # type: ignore[type-var]
            for piece in pieces:
                write(piece.text)
                if piece.error is not None:
                    raise ValueError(piece.error)
                if stops():
                    raise KeyboardInterrupt


class ServedModel:
    """A model behind a server with OpenAI's API."""

    has_template = True  # else the server returns an error

    def __init__(
        self, url: str, api_key: str | None, model: str | None, params: Mapping[str, Any]
    ) -> None:
        """Gets the model's name from the server if there is none. Raises ValueError and OSError."""
        self.client, self.params = http.HttpClient(url, api_key), dict(params)
        self.params["model"] = model or http.run(first_model(self.client))
        self._finish_reason: str | None = None  # of the latest answer, like `_usage`
        self._usage: dict[str, int] = {}

    def answer(self, messages: Messages, write: Write, think: Write) -> None:
        def on_choice(choice: dict[str, Any]) -> None:
            delta = choice.get("delta", {})
            think(delta.get("reasoning") or delta.get("reasoning_content") or "")
            write(delta.get("content") or "")

        self._stream("/v1/chat/completions", {"messages": list(messages)}, on_choice)

    def complete(self, prompt: str, write: Write) -> None:
        def on_choice(choice: dict[str, Any]) -> None:
            write(choice.get("text") or "")

        # the default max_tokens of a completion is 16
        self._stream("/v1/completions", {"max_tokens": 4096, "prompt": prompt}, on_choice)

    def ask(self, asked: Messages | str) -> Reply:
        texts: list[str] = []
        thoughts: list[str] = []
        self.params["stream_options"] = {"include_usage": True}
        if isinstance(asked, str):
            self.complete(asked, texts.append)
        else:
            self.answer(asked, texts.append, thoughts.append)
        num_prompt, num_output = (
            self._usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens")
        )
        return Reply(
            self.params["model"], "".join(texts), "".join(thoughts), self._finish_reason,
            num_prompt, num_output,
        )  # fmt: skip

    def _stream(
        self, path: str, body: dict[str, Any], on_choice: Callable[[dict[str, Any]], None]
    ) -> None:
        errors: list[str] = []

        def on_event(data: bytes) -> None:
            event = json.loads(data)
            if "error" in event:
                errors.append(http.error_text(data))
            self._usage = event.get("usage") or self._usage
            for choice in event.get("choices", ()):
                self._finish_reason = choice.get("finish_reason") or self._finish_reason
                on_choice(choice)

        async def ask() -> None:
            try:
                request = self.client.request(path, {**body, **self.params, "stream": True})
                (await self.client.send(request, on_event)).checked()
            finally:
                self.client.close()  # the next answer uses a new event loop

        http.run(ask())
        if errors:
            raise ValueError(f"the server aborted the answer: {errors[0]}")


async def first_model(client: http.HttpClient) -> str:
    """The name of a server's first model."""
    try:
        return str((await client.get("/v1/models"))["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise ValueError("the server lists no model at /v1/models: use --model") from None
    finally:
        client.close()


@contextmanager
def _ctrl_c() -> Iterator[Callable[[], bool]]:
    """Returns whether Ctrl-C was pressed, which interrupts no step; pressing it twice does."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    pressed: list[int] = []

    def press(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
