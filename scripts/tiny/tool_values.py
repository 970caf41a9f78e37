"""The values of calls and results: known ones, and made-up ones."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence

from tiny import tasks, tool_wordings, wordings


def made_up_word(rng: random.Random) -> str:
    """Two to four syllables."""
    syllables = (
        rng.choice("bcdfghjklmnprstvwyz")
        + rng.choice("aeiou")
        + rng.choice(("", "", "n", "r", "s"))
        for _ in range(rng.randint(2, 4))
    )
    return "".join(syllables)


def _capital_word(rng: random.Random) -> str:
    return made_up_word(rng).capitalize()


def _or_made_up(known: Sequence[str], share: float = 0.3) -> Callable[[random.Random], str]:
    return lambda rng: _capital_word(rng) if rng.random() < share else rng.choice(known)


def _time(rng: random.Random) -> str:
    hour, minute = rng.randrange(24), rng.choice((0, 15, 30, 45, rng.randrange(60)))
    return rng.choice((f"{hour}:{minute:02}", f"{hour:02}:{minute:02}"))


def word(rng: random.Random) -> str:
    return rng.choice(wordings.LETTER_WORDS) if rng.random() < 0.6 else made_up_word(rng)


def _number(rng: random.Random) -> str:
    return str(tasks.number(rng, 4))


def fill(rng: random.Random, texts: Sequence[str]) -> str:
    text = rng.choice(texts)
    if "{" not in text:
        return text
    return text.format(
        n=tasks.number(rng), d=rng.randrange(10), w=word(rng), w2=word(rng),
        t=_time(rng), X=_capital_word(rng), sky=rng.choice(tool_wordings.SKIES),
        name=rng.choice(tool_wordings.PEOPLE), city=rng.choice(tool_wordings.CITIES),
        status=rng.choice(tool_wordings.STATUS),
    )  # fmt: skip


def _any(rng: random.Random) -> str:
    roll = rng.random()
    if roll < 0.3:
        return _number(rng)
    if roll < 0.5:
        return word(rng)
    if roll < 0.6:
        return f"{rng.choice(string.ascii_uppercase)}{rng.randrange(1000)}"
    return VALUES[rng.choice(("city", "country", "name", "title"))](rng)


VALUES: dict[str, Callable[[random.Random], str]] = {
    "city": _or_made_up(tool_wordings.CITIES),
    "country": _or_made_up(tool_wordings.COUNTRIES),
    "name": _or_made_up(tool_wordings.PEOPLE),
    "number": _number,
    "word": word,
    "thing": lambda rng: rng.choice(tool_wordings.GOODS) if rng.random() < 0.7 else word(rng),
    "time": _time,
    "text": lambda rng: fill(rng, tool_wordings.TEXTS),
    "title": lambda rng: " ".join(word(rng).capitalize() for _ in range(rng.randint(1, 3))),
    "language": lambda rng: rng.choice(tool_wordings.LANGUAGES),
    "currency": lambda rng: rng.choice(tool_wordings.CURRENCIES),
    "room": lambda rng: rng.choice(tool_wordings.ROOMS),
    "any": _any,
}
