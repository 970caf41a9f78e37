"""Conversations with tools: calls, answers from their results, and questions that need no call.

Names, parameters and descriptions vary and are partly made up, so a model must copy them from the
prompt. A call's first value decides the split as in `tiny.tasks`: it is held out of all calls. The
words of closed sets (rooms, languages, currencies) are in both.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tiny import tasks, tool_wordings, wordings
from tiny.tasks import Message, Task, Tool, is_held_out
from tiny.tool_wordings import EXTRAS, GENERAL, GENERAL_SHARE, SKILLS, Skill

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


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def calls_text(calls: Sequence[Call]) -> str:
    """Calls as the answer has them, in the format `hermes`."""
    return "\n".join(
        f'<tool_call>\n{{"name": {as_json(name)}, "arguments": {as_json(arguments)}}}\n</tool_call>'
        for name, arguments in calls
    )


# values


def _made_up(rng: random.Random) -> str:
    """Two to four syllables."""
    syllables = (
        rng.choice("bcdfghjklmnprstvwyz")
        + rng.choice("aeiou")
        + rng.choice(("", "", "n", "r", "s"))
        for _ in range(rng.randint(2, 4))
    )
    return "".join(syllables)


def _capital_word(rng: random.Random) -> str:
    return _made_up(rng).capitalize()


def _or_made_up(known: Sequence[str], share: float = 0.3) -> Callable[[random.Random], str]:
    return lambda rng: _capital_word(rng) if rng.random() < share else rng.choice(known)


def _time(rng: random.Random) -> str:
    hour, minute = rng.randrange(24), rng.choice((0, 15, 30, 45, rng.randrange(60)))
    return rng.choice((f"{hour}:{minute:02}", f"{hour:02}:{minute:02}"))


def _word(rng: random.Random) -> str:
    return rng.choice(wordings.LETTER_WORDS) if rng.random() < 0.6 else _made_up(rng)


def _number(rng: random.Random) -> str:
    return str(tasks.number(rng, 4))


def _fill(rng: random.Random, texts: Sequence[str]) -> str:
    text = rng.choice(texts)
    if "{" not in text:
        return text
    return text.format(
        n=tasks.number(rng), d=rng.randrange(10), w=_word(rng), w2=_word(rng),
        t=_time(rng), X=_capital_word(rng), sky=rng.choice(tool_wordings.SKIES),
        name=rng.choice(tool_wordings.PEOPLE), city=rng.choice(tool_wordings.CITIES),
        status=rng.choice(tool_wordings.STATUS),
    )  # fmt: skip


def _any(rng: random.Random) -> str:
    roll = rng.random()
    if roll < 0.3:
        return _number(rng)
    if roll < 0.5:
        return _word(rng)
    if roll < 0.6:
        return f"{rng.choice(string.ascii_uppercase)}{rng.randrange(1000)}"
    return VALUES[rng.choice(("city", "country", "name", "title"))](rng)


VALUES: dict[str, Callable[[random.Random], str]] = {
    "city": _or_made_up(tool_wordings.CITIES),
    "country": _or_made_up(tool_wordings.COUNTRIES),
    "name": _or_made_up(tool_wordings.PEOPLE),
    "number": _number,
    "word": _word,
    "thing": lambda rng: rng.choice(tool_wordings.GOODS) if rng.random() < 0.7 else _word(rng),
    "time": _time,
    "text": lambda rng: _fill(rng, tool_wordings.TEXTS),
    "title": lambda rng: " ".join(_word(rng).capitalize() for _ in range(rng.randint(1, 3))),
    "language": lambda rng: rng.choice(tool_wordings.LANGUAGES),
    "currency": lambda rng: rng.choice(tool_wordings.CURRENCIES),
    "room": lambda rng: rng.choice(tool_wordings.ROOMS),
    "any": _any,
}


def _key(value: str) -> str:
    return f"tool {value.lower()}"


# tools


class _Made(NamedTuple):
    """A tool, the skill that it has, and the words that are its own."""

    tool: Tool
    skill_name: str
    words: dict[str, str]
    parameters: dict[str, str]  # the names of the parameters, by the slots of the skill

    @property
    def skill(self) -> Skill:
        return SKILLS[self.skill_name]

    @property
    def name(self) -> str:
        return str(self.tool["function"]["name"])

    def type_of(self, slot: str) -> str:
        properties = self.tool["function"]["parameters"]["properties"]
        return str(properties[self.parameters[slot]]["type"])


def _make_tool(rng: random.Random, skill_name: str, words: dict[str, str]) -> _Made:
    skill = SKILLS[skill_name]
    made_up = skill_name != GENERAL and rng.random() < 0.1
    name = _word(rng) if made_up else rng.choice(skill.names).format(**words)
    parameters: dict[str, str] = {}
    properties: dict[str, Any] = {}
    described = rng.random() < 0.3
    slots = list(skill.slots.items())
    if rng.random() < 0.25:
        rng.shuffle(slots)
    for slot_name, slot in slots:
        free = [one for one in slot.names if one.format(**words) not in properties]
        # a made-up name says nothing: with others it needs a description
        unnamed = rng.random() < 0.1 and (described or len(slots) == 1)
        parameter = _word(rng) if unnamed else rng.choice(free).format(**words)
        parameters[slot_name] = parameter
        properties[parameter] = {"type": _type(rng, slot.values)}
        if described:
            properties[parameter]["description"] = rng.choice(slot.descriptions).format(**words)
    extra = rng.choice(tuple(EXTRAS)) if rng.random() < 0.12 else None
    required = list(properties)
    if extra is not None and extra not in properties:
        properties[extra] = EXTRAS[extra]
    schema = {"type": "object", "properties": properties, "required": required}
    function: Tool = {"name": name, "parameters": schema}
    # without the name of the skill its description is all there is
    if made_up or rng.random() < 0.9:
        description = rng.choice(skill.descriptions).format(**words)
        function["description"] = description.rstrip(".") if rng.random() < 0.3 else description
    return _Made({"type": "function", "function": function}, skill_name, words, parameters)


def _type(rng: random.Random, values: str) -> str:
    if values == "any":
        return rng.choice(("string", "string", "string", "integer"))
    if values != "number":
        return "string"
    return rng.choice(("integer", "integer", "number", "string"))


def _make_tools(rng: random.Random, num: int) -> list[_Made]:
    """Different tools. Words of made-up ones begin differently."""
    tools: list[_Made] = []
    used: set[str] = set()
    while len(tools) < num:
        words = {}
        if rng.random() < GENERAL_SHARE:
            skill_name, noun, other = GENERAL, _word(rng), _word(rng)
            if noun[:2] == other[:2] or any(word[:2] in used for word in (noun, other)):
                continue
            used |= {noun[:2], other[:2]}
            words = {"noun": noun, "other": other, "Noun": noun.capitalize()}
        else:
            skill_name = rng.choice(_FIXED)
            if skill_name in used:
                continue
            used.add(skill_name)
        made = _make_tool(rng, skill_name, words)
        if made.name not in used:
            used.add(made.name)
            tools.append(made)
    return tools


_FIXED = tuple(name for name in SKILLS if name != GENERAL)


# questions


class _Asked(NamedTuple):
    question: str
    calls: tuple[Call, ...]
    content_key: str


def _values(rng: random.Random, made: _Made, held: bool) -> dict[str, str]:
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


def _ask(rng: random.Random, made: _Made, held: bool) -> _Asked:
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


def _argument(made: _Made, slot: str, value: str) -> str | int:
    return value if made.type_of(slot) == "string" else int(value)


# results


class _Result(NamedTuple):
    content: str
    sentence: str
    expected: tuple[str, ...]


def _result(rng: random.Random, made: _Made) -> _Result:
    roll = rng.random()
    if roll < 0.5:
        return _object_result(rng, made)
    if roll < 0.7:
        text = _fill(rng, tool_wordings.SENTENCES)
        return _Result(text, text, (text.rstrip("."),))
    text = _fill(rng, tool_wordings.TEXT_RESULTS)
    return _Result(text, f"The result is {text}.", (text,))


def _object_result(rng: random.Random, made: _Made) -> _Result:
    """A JSON object; "The temperature is 21 and the sky is clear." """
    num = rng.choices((1, 2, 3), (55, 35, 10))[0]
    keys = list(dict.fromkeys(_result_key(rng, made) for _ in range(num)))
    if rng.random() < 0.06:
        values: dict[str, Any] = {"error": _fill(rng, tool_wordings.ERRORS)}
    else:
        values = {key: _result_value(rng) for key in keys}
    shown = {key: one if isinstance(one, str) else as_json(one) for key, one in values.items()}
    parts = [f"the {key.replace('_', ' ')} is {value}" for key, value in shown.items()]
    listed = " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
    tight = rng.random() < 0.3
    content = json.dumps(
        values, ensure_ascii=False, separators=(",", ":") if tight else (", ", ": ")
    )
    return _Result(content, f"{listed[0].upper()}{listed[1:]}.", tuple(shown.values()))


def _result_key(rng: random.Random, made: _Made) -> str:
    roll = rng.random()
    if roll < 0.25:
        return _word(rng)
    if roll < 0.35:
        return f"{_word(rng)}_{_word(rng)}"
    return rng.choice(made.skill.keys).format(**made.words)


def _result_value(rng: random.Random) -> Any:
    roll = rng.random()
    if roll < 0.4:
        return tasks.number(rng, 5) * (-1 if roll < 0.04 else 1)
    if roll < 0.5:
        return tasks.number(rng) + rng.randrange(1, 10) / 10
    if roll < 0.53:
        return rng.random() < 0.5
    return _fill(rng, tool_wordings.TEXT_RESULTS)


class _Reported(NamedTuple):
    messages: tuple[Message, ...]  # the calls and their results
    answer: str
    expected: tuple[str, ...]


def _report(rng: random.Random, made: _Made, calls: Sequence[Call]) -> _Reported:
    results = [_result(rng, made) for _ in calls]
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


def _plain(rng: random.Random, made: Sequence[_Made], held: bool) -> Task:
    """A question that needs none of the tools: an ordinary one, or one for another tool."""
    names = {one.skill_name for one in made}
    if rng.random() < 0.25:
        while True:
            other = _make_tools(rng, 1)[0]
            if other.skill_name != GENERAL and other.skill_name not in names:
                break
        asked = _ask(rng, other, held)
        return Task(
            asked.question, wordings.SORRY, "plain", "phrase", ("Sorry",), asked.content_key
        )
    while True:
        kind = rng.choice([one for one in tasks.KINDS if one != "unknown"])
        task = tasks.held_out_task(rng, kind) if held else tasks.training_task(rng)
        if task.kind != "unknown":  # a tool may well know it
            return task


def _make(rng: random.Random, kind: str, *, held: bool, num_earlier: int) -> ToolTask:
    made = _make_tools(rng, rng.choices((1, 2, 3, 4), (52, 28, 14, 6))[0])
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


def _earlier(rng: random.Random, made: Sequence[_Made], held: bool) -> list[Message]:
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
