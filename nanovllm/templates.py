"""Renders chat templates in a separate process (`template_process.py`). One process serves all
threads of this one. It starts on first use, and again after a template has ended it."""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import signal
import threading
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from nanovllm import programs
from nanovllm.confined import Confined
from nanovllm.prompts import PromptTooLong

CPU_S = 5.0  # processor time of a rendering; usual ones take less than a millisecond
MAX_TEMPLATES = 64  # kept by the process


class TemplateFacts(NamedTuple):
    """variables: those that a template reads. writes_text: it can write a content that is a text;
    some write only lists of parts."""

    variables: frozenset[str]
    writes_text: bool


class _Killed(ValueError):
    """The process of the templates ended for another reason, such as a lack of memory."""


class _TooSlow(ValueError):
    """A template has taken too much processor time."""


class Renderer:
    """Renders templates. Several threads can use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._program = Confined(lambda: programs.start_confined("nanovllm.template_process"))
        self._numbers: dict[str, int] = {}  # of templates that the process has
        self._facts: dict[str, TemplateFacts | _TooSlow] = {}

    @property
    def is_ready(self) -> bool:
        """Whether `render` begins at once, with a process that works."""
        return self._program.is_running and not self._lock.locked()

    def start(self) -> None:
        """Start the process, which takes some tenths of a second, beside other work."""
        with self._lock:
            self._start()

    def facts(self, template: str, tokens: Mapping[str, Any]) -> TemplateFacts:
        """The facts of a template. tokens: variables that it gets from the tokenizer. Raises
        ValueError if it is not a template, or takes too long."""
        found = self._facts.get(template)
        if found is None:
            with self._lock:
                if len(self._facts) >= MAX_TEMPLATES:
                    self._facts.clear()
                self._start()
                try:
                    found = self._define(template, tokens)
                except _TooSlow as error:  # a second try would be slow too
                    found = error
                self._facts[template] = found
        if isinstance(found, _TooSlow):
            raise _TooSlow(*found.args)
        return found

    def render(
        self,
        template: str,
        messages: list[dict[str, Any]],
        options: Mapping[str, Any],
        tokens: Mapping[str, Any],
        max_chars: int | None,
    ) -> str:
        """A conversation in a template. options: those of transformers' `apply_chat_template`, and
        variables. Raises ValueError, and PromptTooLong for more than `max_chars`."""
        request = {
            "messages": messages, "options": {**tokens, **options}, "max_chars": max_chars,
        }  # fmt: skip
        with self._lock:
            try:
                found = self._use(template, tokens, request)
            except _Killed:  # perhaps it was no fault of these messages
                found = self._use(template, tokens, request)
        if "text" in found:
            return str(found["text"])
        raise PromptTooLong(
            f"the conversation has {found['num_chars']} characters in its template: the limit is "
            f"{max_chars}"
        )

    def close(self) -> None:
        """End the process. It starts again if it is needed."""
        self._end()

    def forget(self) -> None:
        """After a fork: leave the process to the parent."""
        self.__init__()  # type: ignore[misc]

    def _start(self) -> None:
        if not self._program.is_running:
            self._end()
            self._program.start()

    def _end(self) -> int:
        """End the process, and return its exit status."""
        self._numbers.clear()
        return self._program.end()

    def _use(
        self, template: str, tokens: Mapping[str, Any], request: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The answer to a request to render a template."""
        self._start()
        if template not in self._numbers:
            self._define(template, tokens)
        return self._ask({**request, "template": self._numbers[template]})

    def _define(self, template: str, tokens: Mapping[str, Any]) -> TemplateFacts:
        """Send a template to the process."""
        if len(self._numbers) >= MAX_TEMPLATES:
            self._end()
            self._start()
        number = len(self._numbers)
        found = self._ask({"template": number, "source": template, "tokens": dict(tokens)})
        self._numbers[template] = number
        variables, writes_text = found["facts"]
        return TemplateFacts(frozenset(variables), bool(writes_text))

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request. Raises ValueError."""
        data = _as_json({**request, "cpu_s": CPU_S})
        try:
            self._program.send(data)
            found = self._program.receive()
        except BaseException:  # such as Ctrl-C: an answer may be left in the pipe
            self._end()
            raise
        if found is None:
            raise self._ending()
        if "error" in found:
            raise ValueError(found["error"])
        return dict(found)

    def _ending(self) -> ValueError:
        assert self._program.process is not None
        self._program.process.wait()
        status = self._end()
        if status == -getattr(signal, "SIGPROF", 0):
            return _TooSlow(
                f"the chat template takes longer than {CPU_S:g} s of processor time: it may loop "
                "for ever"
            )
        if status == -getattr(signal, "SIGKILL", 0):
            return _Killed(
                "the process of the chat template was killed: the machine may lack memory"
            )
        return ValueError("the chat template needs too much memory, or is nested too deeply")


renderer = Renderer()
atexit.register(renderer.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=renderer.forget)


def _as_json(request: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(request, ensure_ascii=False, default=_plain)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"the chat template cannot take the conversation: {error}") from error
    return text.encode("utf-8", "surrogatepass")


def _plain(value: Any) -> Any:
    """A value in a form that JSON has. Raises TypeError for others."""
    if isinstance(value, Mapping):
        return dict(value)
    if callable(dump := getattr(value, "model_dump", None)):
        return dump()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}
    if callable(as_list := getattr(value, "tolist", None)):
        return as_list()
    if isinstance(value, Iterable):
        return list(value)
    raise TypeError(f"it has a value of the type {type(value).__name__}, which JSON cannot hold")
