"""Results of tools, and the sentences that repeat them."""

from __future__ import annotations

import json
import random
from typing import Any, NamedTuple

from tiny import tasks, tool_wordings
from tiny.made_tools import Made
from tiny.tool_values import fill, word


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


class Result(NamedTuple):
    content: str
    sentence: str
    expected: tuple[str, ...]


def make_result(rng: random.Random, made: Made) -> Result:
    roll = rng.random()
    if roll < 0.5:
        return _object_result(rng, made)
    if roll < 0.7:
        text = fill(rng, tool_wordings.SENTENCES)
        return Result(text, text, (text.rstrip("."),))
    text = fill(rng, tool_wordings.TEXT_RESULTS)
    return Result(text, f"The result is {text}.", (text,))


def _object_result(rng: random.Random, made: Made) -> Result:
    """A JSON object; "The temperature is 21 and the sky is clear." """
    num = rng.choices((1, 2, 3), (55, 35, 10))[0]
    keys = list(dict.fromkeys(_result_key(rng, made) for _ in range(num)))
    if rng.random() < 0.06:
        values: dict[str, Any] = {"error": fill(rng, tool_wordings.ERRORS)}
    else:
        values = {key: _result_value(rng) for key in keys}
    shown = {key: one if isinstance(one, str) else as_json(one) for key, one in values.items()}
    parts = [f"the {key.replace('_', ' ')} is {value}" for key, value in shown.items()]
    listed = " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
    tight = rng.random() < 0.3
    content = json.dumps(
        values, ensure_ascii=False, separators=(",", ":") if tight else (", ", ": ")
    )
    return Result(content, f"{listed[0].upper()}{listed[1:]}.", tuple(shown.values()))


def _result_key(rng: random.Random, made: Made) -> str:
    roll = rng.random()
    if roll < 0.25:
        return word(rng)
    if roll < 0.35:
        return f"{word(rng)}_{word(rng)}"
    return rng.choice(made.skill.keys).format(**made.words)


def _result_value(rng: random.Random) -> Any:
    roll = rng.random()
    if roll < 0.4:
        return tasks.number(rng, 5) * (-1 if roll < 0.04 else 1)
    if roll < 0.5:
        return tasks.number(rng) + rng.randrange(1, 10) / 10
    if roll < 0.53:
        return rng.random() < 0.5
    return fill(rng, tool_wordings.TEXT_RESULTS)
