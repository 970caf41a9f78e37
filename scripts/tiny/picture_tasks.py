"""Questions about pictures, and some without: training data and held-out ones.

A hash of what lies in which cell of a picture decides the split (`Picture.key`): no picture with
held-out content occurs in training, in whatever sizes, places within cells, shades or wording. Of
questions without a picture, the exact wordings are held out, as in `tasks`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from tiny import wordings
from tiny.picture_wordings import (
    BACKGROUND,
    BESIDE,
    COLOUR,
    COLOURED_DIGIT,
    COLUMN_NAMES,
    COUNT,
    DESCRIBE,
    DIGIT,
    FACTS,
    MAX_SUMMAND,
    MODEL_NAME,
    NOTHING,
    NUM_SUMS,
    ROW_NAMES,
    SHAPE,
    SIDES,
    SMALL_TALK,
    WHERE,
    plural,
)
from tiny.pictures import BACKGROUNDS, COLOURS, GRIDS, SHAPES, Picture, Thing, compose, draw
from tiny.tasks import Task, is_held_out

PICTURE_KINDS = (
    *("colour", "shape", "digit", "count", "beside", "where", "background", "describe"),
)
KINDS = (*PICTURE_KINDS, "text")


@dataclass(frozen=True)
class PictureTask:
    """A question with its picture; None for a question without one."""

    picture: Picture | None
    task: Task

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as chat messages; a picture (PIL) comes before its question."""
        if self.picture is None:
            return [dict(one) for one in self.task.messages]
        image = Image.fromarray(draw([self.picture])[0])
        text = {"type": "text", "text": self.task.question}
        return [{"role": "user", "content": [{"type": "image", "image": image}, text]}]


Maker = Callable[[random.Random, Picture], Task | None]


def _task(
    kind: str, question: str, answer: str, expected: str, key: str, check: wordings.Check = "phrase"
) -> Task:
    return Task(question, answer, kind, check, (expected,), key)


def _names(picture: Picture, thing: Thing) -> list[str]:
    """Ways to name a thing that fit no other one: 'square', 'red square', 'digit'."""
    others = [one for one in picture.things if one is not thing]
    found = []
    if all(one.kind != thing.kind for one in others):
        found.append(thing.kind)
    if thing.is_digit and not any(one.is_digit for one in others):
        found.append("digit")
    if all((one.kind, one.colour) != (thing.kind, thing.colour) for one in others):
        found.append(f"{thing.colour} {thing.kind}")
    return found


def _named(rng: random.Random, picture: Picture) -> tuple[Thing, str] | None:
    """A thing and a name for it."""
    named = [(one, names) for one in picture.things if (names := _names(picture, one))]
    if not named:
        return None
    thing, names = rng.choice(named)
    return thing, rng.choice(names)


def _colour(rng: random.Random, picture: Picture) -> Task | None:
    named = [
        (one, names)
        for one in picture.things
        if (names := [name for name in _names(picture, one) if " " not in name])
    ]
    if not named:
        return None
    thing, names = rng.choice(named)
    question = rng.choice(COLOUR).format(x=rng.choice(names))
    return _task(
        "colour", question, f"{thing.colour.capitalize()}.", thing.colour.capitalize(), picture.key
    )


def _alone_in_colour(picture: Picture, *, digits: bool) -> list[Thing]:
    """Things whose colour no other shape (with `digits`: no other digit) has."""
    group = [one for one in picture.things if one.is_digit == digits]
    return [one for one in group if sum(other.colour == one.colour for other in group) == 1]


def _shape(rng: random.Random, picture: Picture) -> Task | None:
    found = _alone_in_colour(picture, digits=False)
    if not found:
        return None
    thing = rng.choice(found)
    question = rng.choice(SHAPE).format(x=thing.colour)
    return _task(
        "shape", question, f"{thing.kind.capitalize()}.", thing.kind.capitalize(), picture.key
    )


def _digit(rng: random.Random, picture: Picture) -> Task | None:
    digits = [one for one in picture.things if one.is_digit]
    found = _alone_in_colour(picture, digits=True)
    if len(digits) == 1 and rng.random() < 0.8:
        thing, question = digits[0], rng.choice(DIGIT)
    elif found:
        thing = rng.choice(found)
        question = rng.choice(COLOURED_DIGIT).format(x=thing.colour)
    else:
        return None
    return _task("digit", question, f"{thing.kind}.", thing.kind, picture.key, "first_number")


def _count(rng: random.Random, picture: Picture) -> Task:
    shapes = [one for one in picture.things if not one.is_digit]
    kind = rng.choice(shapes).kind if shapes and rng.random() < 0.8 else rng.choice(SHAPES)
    colour = rng.choice(picture.things).colour if rng.random() < 0.8 else rng.choice(list(COLOURS))
    several = plural(kind)
    choice = rng.random()
    if choice < 0.5:
        name, found = several, [one for one in shapes if one.kind == kind]
    elif choice < 0.7:
        name, found = f"{colour} things", [one for one in picture.things if one.colour == colour]
    elif choice < 0.85:
        name = f"{colour} {several}"
        found = [one for one in shapes if (one.kind, one.colour) == (kind, colour)]
    else:
        name, found = "things", list(picture.things)
    number = str(len(found))
    question = rng.choice(COUNT).format(x=name)
    return _task("count", question, f"{number}.", number, picture.key, "first_number")


def _beside(rng: random.Random, picture: Picture) -> Task | None:
    """The neighbour cell; nothing only if no cell on that side has a thing."""
    named = _named(rng, picture)
    if named is None:
        return None
    thing, name = named
    side = rng.choice(list(SIDES))
    down, right = SIDES[side]
    row, column = thing.row + down, thing.column + right
    found = picture.at(row, column)
    if found is None:
        beyond = picture.at(row + down, column + right)
        if beyond is not None or rng.random() < 0.75:
            return None
    answer = NOTHING if found is None else f"A {found.colour} {found.kind}."
    expected = "Nothing" if found is None else f"{found.colour} {found.kind}"
    question = rng.choice(BESIDE).format(side=side, x=name)
    return _task("beside", question, answer, expected, picture.key)


def _where(rng: random.Random, picture: Picture) -> Task | None:
    named = _named(rng, picture)
    if named is None:
        return None
    thing, name = named
    row = ROW_NAMES[picture.num_rows][thing.row]
    place = f"{row.capitalize()} {COLUMN_NAMES[picture.num_columns][thing.column]}"
    return _task("where", rng.choice(WHERE).format(x=name), f"{place}.", place, picture.key)


def _background(rng: random.Random, picture: Picture) -> Task:
    colour = picture.background.capitalize()
    return _task("background", rng.choice(BACKGROUND), f"{colour}.", colour, picture.key)


def _describe(rng: random.Random, picture: Picture) -> Task:
    """All cells in the order of reading."""
    rows = []
    for row in range(picture.num_rows):
        cells = [picture.at(row, column) for column in range(picture.num_columns)]
        rows.append(", ".join(f"{one.colour} {one.kind}" if one else "nothing" for one in cells))
    answer = "; ".join(rows)
    return _task("describe", rng.choice(DESCRIBE), f"{answer}.", answer, picture.key)


# kind -> (maker, weight in training). Harder kinds get more.
_MAKERS: dict[str, tuple[Maker, float]] = {
    "colour": (_colour, 2.0),
    "shape": (_shape, 2.0),
    "digit": (_digit, 3.0),
    "count": (_count, 4.0),
    "beside": (_beside, 5.0),
    "where": (_where, 2.0),
    "background": (_background, 0.5),
    "describe": (_describe, 1.0),
}
_WEIGHTS = [weight for _, weight in _MAKERS.values()]


def picture_task(rng: random.Random, picture: Picture, kind: str | None = None) -> Task | None:
    """A question about a picture; None if it does not allow one of the kind."""
    chosen = kind or rng.choices(PICTURE_KINDS, _WEIGHTS)[0]
    return _MAKERS[chosen][0](rng, picture)


def _text_task(rng: random.Random) -> Task:
    choice = rng.random()
    if choice < 0.45:
        answer = rng.choice(list(SMALL_TALK))
        expected, ways = SMALL_TALK[answer]
        question = rng.choice(ways) + rng.choice(("", ".", "!", "?"))
        expected = expected.replace("tiny-qwen3", MODEL_NAME)
        return _task("text", question, answer, expected, f"chat {question}")
    if choice < 0.75:
        name = rng.choice(FACTS)
        relation = wordings.RELATIONS[name]
        x = rng.choice(list(relation.pairs))
        phrasing_idx = rng.randrange(len(relation.phrasings))
        question = relation.phrasings[phrasing_idx].format(x=x)
        y = relation.pairs[x]
        answer = relation.answer.format(x=x, X=x[0].upper() + x[1:], y=y)
        return _task("text", question, answer, y, f"fact {name} {x} {phrasing_idx}")
    a, b = rng.randint(0, MAX_SUMMAND), rng.randint(0, MAX_SUMMAND)
    phrasing_idx = rng.randrange(NUM_SUMS)
    question = wordings.ADD[phrasing_idx].format(a=a, b=b)
    answer = f"{a} + {b} = {a + b}."
    # a table of sums cannot be inferred from the others: of each, one phrasing is held out
    return _task("text", question, answer, str(a + b), f"sum {a} {b} {phrasing_idx}", "last_number")


def text_task(rng: random.Random, *, of_test: bool = False) -> Task:
    """A question without a picture, of the training side or of the held-out one."""
    while True:
        task = _text_task(rng)
        if is_held_out(task.content_key) == of_test:
            return task


def random_picture(
    rng: random.Random,
    grid: tuple[int, int],
    *,
    max_things: int | None = None,
    backgrounds: Sequence[str] = tuple(BACKGROUNDS),
    of_test: bool = False,
) -> Picture:
    """A picture of the training side or of the held-out one."""
    while True:
        picture = compose(rng, grid, max_things, backgrounds)
        if is_held_out(picture.key) == of_test:
            return picture


def held_out(num: int, seed: int) -> Iterator[PictureTask]:
    """`num` questions about held-out pictures, and without; kinds and sizes in turn."""
    rng = random.Random(f"held out pictures {seed}")
    for idx in range(num):
        kind = KINDS[idx % len(KINDS)]
        if kind == "text":
            yield PictureTask(None, text_task(rng, of_test=True))
            continue
        grid = GRIDS[idx // len(KINDS) % len(GRIDS)]
        while True:
            picture = random_picture(rng, grid, of_test=True)
            if (task := picture_task(rng, picture, kind)) is not None:
                yield PictureTask(picture, task)
                break
