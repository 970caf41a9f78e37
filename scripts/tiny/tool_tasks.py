"""Conversations with tools: calls, answers from their results, and questions that need no call.

Names, parameters and descriptions vary and are partly made up, so a model must copy them from the
prompt. A call's first value decides the split as in `tiny.tasks`: it is held out of all calls. The
words of closed sets (rooms, languages, currencies) are in both.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tiny import tasks, wordings
from tiny.made_tools import Made, make_tools
from tiny.tasks import Message, Task, is_held_out
from tiny.tool_results import as_json, make_result
from tiny.tool_values import VALUES
from tiny.tool_wordings import GENERAL

KINDS = ("call", "result", "plain")
ARCHITECTURES = frozenset({"qwen3"})  # of the models that are trained with tools
TOOLS_SHARE = 0.12  # of the training conversations
_CLOSED = ("language", "currency", "room")


class Call(NamedTuple):
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class ToolTask(Task):
    """A task whose conversation has tools.

    earlier: messages before the question, in place of `history`. calls: those of the answer.
    answered: the calls of the question and their results, if the answer repeats them.
    """

    earlier: tuple[Message, ...] = ()
    calls: tuple[Call, ...] = ()
    answered: tuple[Message, ...] = ()

    @property
    def messages(self) -> list[Message]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        question = {"role": "user", "content": self.question}
        return [dict(one) for one in (*system, *self.earlier, question, *self.answered)]


def is_correct(task: Task, text: str) -> bool:
    """As `tasks.is_correct`; calls must have the names and the arguments of the task's."""
    from nanovllm.parsers.tools import tool_parser  # `scripts` finds the package after its imports

    parsed = tool_parser("hermes").parse(text)
    if not isinstance(task, ToolTask) or not task.calls:
        return not parsed.calls and tasks.is_correct(task, text)
    try:
        calls = [Call(one.name, json.loads(one.arguments)) for one in parsed.calls]
    except json.JSONDecodeError:
        return False
    return not parsed.content and _canonical(calls) == _canonical(task.calls)


def _canonical(calls: Sequence[Call]) -> str:
    """Equal for equal calls. Types count: 5 is neither 5.0 nor true."""
    return json.dumps(calls, sort_keys=True)


def calls_text(calls: Sequence[Call]) -> str:
    """Calls in the form of answers, in the format `hermes`."""
    return "\n".join(
        f'<tool_call>\n{{"name": {as_json(name)}, "arguments": {as_json(arguments)}}}\n</tool_call>'
        for name, arguments in calls
    )


def _key(value: str) -> str:
    return f"tool {value.lower()}"


# questions


class _Asked(NamedTuple):
    question: str
    calls: tuple[Call, ...]
    content_key: str


def _values(rng: random.Random, made: Made, held: bool) -> dict[str, str]:
    """A value a slot. The first one is held out, or none is."""
    found: dict[str, str] = {}
    for slot_name, slot in made.skill.slots.items():
        maker = VALUES[slot.values if made.type_of(slot_name) == "string" else "number"]
        while True:
            value = maker(rng)
            if value in found.values():
                continue
            is_open = slot.values not in _CLOSED
            if not is_open or is_held_out(_key(value)) == (held and not found):
                break
        found[slot_name] = value
    return found


def _ask(rng: random.Random, made: Made, held: bool) -> _Asked:
    values = [_values(rng, made, held)]
    if made.skill.several and rng.random() < 0.12:
        other = _values(rng, made, held)
        if other != values[0]:
            values.append(other)
    calls = tuple(
        Call(made.name, {name: _argument(made, slot, one[slot])
                         for slot, name in made.parameters.items()})
        for one in values
    )  # fmt: skip
    slots = values[0]
    if len(values) > 1:
        slots = {slot: f"{value} and {values[1][slot]}" for slot, value in slots.items()}
    question = tasks.phrase(rng, rng.choice(made.skill.phrasings), **slots, **made.words)
    return _Asked(question, calls, _key(next(iter(values[0].values()))))


def _argument(made: Made, slot: str, value: str) -> str | int:
    return value if made.type_of(slot) == "string" else int(value)


class _Reported(NamedTuple):
    messages: tuple[Message, ...]  # the calls and their results
    answer: str
    expected: tuple[str, ...]


def _report(rng: random.Random, made: Made, calls: Sequence[Call]) -> _Reported:
    results = [make_result(rng, made) for _ in calls]
    functions = [
        {"type": "function", "function": {"name": one.name, "arguments": one.arguments}}
        for one in calls
    ]
    messages = [{"role": "assistant", "content": None, "tool_calls": functions}]
    messages += [{"role": "tool", "content": one.content} for one in results]
    answer = " ".join(one.sentence for one in results)
    return _Reported(
        tuple(messages), answer, tuple(part for one in results for part in one.expected)
    )


# tasks


def _plain(rng: random.Random, made: Sequence[Made], held: bool) -> Task:
    """A question that needs none of the tools: an ordinary one, or one for another tool."""
    names = {one.skill_name for one in made}
    if rng.random() < 0.25:
        while True:
            other = make_tools(rng, 1)[0]
            if other.skill_name != GENERAL and other.skill_name not in names:
                break
        asked = _ask(rng, other, held)
        return Task(
            asked.question, wordings.SORRY, "plain", "phrase", ("Sorry",), asked.content_key
        )
    while True:
        kind = rng.choice([one for one in tasks.KINDS if one != "unknown"])
        task = tasks.held_out_task(rng, kind) if held else tasks.training_task(rng)
        if task.kind != "unknown":  # a tool may answer it
            return task


def _make(rng: random.Random, kind: str, *, held: bool, num_earlier: int) -> ToolTask:
    made = make_tools(rng, rng.choices((1, 2, 3, 4), (52, 28, 14, 6))[0])
    if kind == "plain" and rng.random() < 0.15:
        made = []  # the questions of tools are unknown without them
    tools = tuple(one.tool for one in made)
    earlier: list[Message] = []
    for _ in range(num_earlier):
        earlier += _earlier(rng, made, held)
    system = rng.choice(wordings.SYSTEMS) if rng.random() < 0.15 else None
    if kind == "plain":
        one = _plain(rng, made, held)
        return ToolTask(
            one.question, one.answer, kind, one.check, one.expected, one.content_key, (), system,
            tools=tools, earlier=tuple(earlier),
        )  # fmt: skip
    used = rng.choice(made)
    asked = _ask(rng, used, held)
    call = ToolTask(
        asked.question, calls_text(asked.calls), kind, "phrase", (), asked.content_key, (), system,
        tools=tools, earlier=tuple(earlier), calls=asked.calls,
    )  # fmt: skip
    if kind == "call":
        return call
    report = _report(rng, used, asked.calls)
    return replace(
        call, answer=report.answer, expected=report.expected, calls=(), answered=report.messages
    )


def _earlier(rng: random.Random, made: Sequence[Made], held: bool) -> list[Message]:
    """A turn before the question."""
    if made and rng.random() < 0.6:
        used = rng.choice(made)
        asked = _ask(rng, used, held)
        report = _report(rng, used, asked.calls)
        question, answer, between = asked.question, report.answer, report.messages
    else:
        task = _plain(rng, made, held)
        question, answer, between = task.question, task.answer, ()
    return [
        {"role": "user", "content": question},
        *between,
        {"role": "assistant", "content": answer},
    ]


def training_examples(seed: int | str) -> Iterator[Task]:
    """As `tasks.training_examples`, a part of them with tools.

    An example of the kind "result" trains its call as well.
    """
    rng = random.Random(f"tools {seed}")
    others = tasks.training_examples(seed)
    while True:
        if rng.random() >= TOOLS_SHARE:
            yield next(others)
            continue
        kind = rng.choices(KINDS, (5, 70, 25))[0]
        num_earlier = rng.choices((0, 1, 2), (70, 24, 6))[0]
        yield _make(rng, kind, held=False, num_earlier=num_earlier)


def held_out(num: int, seed: int) -> list[Task]:
    """`num` different tasks: the held-out ones of `tasks`, then those with tools.

    Each kind has an equal share.
    """
    num_with_tools = num * len(KINDS) // (len(KINDS) + len(tasks.KINDS))
    rng = random.Random(f"held out tools {seed}")
    found: dict[tuple[str, str], Task] = {}
    while len(found) < num_with_tools:
        kind = KINDS[len(found) % len(KINDS)]
        task = _make(rng, kind, held=True, num_earlier=int(rng.random() < 0.25))
        found.setdefault((task.question, as_json([task.messages, task.tools])), task)
    return [*tasks.held_out(num - num_with_tools, seed), *found.values()]
