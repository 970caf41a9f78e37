"""The phrasings of questions about pictures, and of those without. Slots are in braces."""

from __future__ import annotations

from collections.abc import Iterator

from tiny import wordings
from tiny.pictures import BACKGROUNDS, COLOURS, SHAPES

MODEL_NAME = "tiny-qwen3-vl"
ROW_NAMES = {2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
COLUMN_NAMES = {2: ("left", "right"), 3: ("left", "centre", "right")}
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
MAX_SUMMAND = 9
NUM_SUMS = 4  # phrasings of sums
NOTHING = "Nothing."

COLOUR = (
    "What colour is the {x}?",
    "What color is the {x}?",
    "Which colour does the {x} have?",
    "Tell me the colour of the {x}.",
)
SHAPE = (
    "What shape is {x}?",
    "Which shape is {x}?",
    "What is the {x} shape?",
    "Name the {x} shape.",
)
DIGIT = (
    "Which digit is shown?",
    "What digit is shown?",
    "Which digit do you see?",
    "What is the digit?",
)
COLOURED_DIGIT = ("Which digit is {x}?", "What is the {x} digit?", "What digit is {x}?")
COUNT = ("How many {x} are there?", "How many {x} do you see?", "Count the {x}.")
BESIDE = (
    "What is {side} the {x}?",
    "What do you see {side} the {x}?",
    "Tell me what is {side} the {x}.",
)
WHERE = ("Where is the {x}?", "Where do you see the {x}?", "Tell me where the {x} is.")
BACKGROUND = (
    "What colour is the background?",
    "What color is the background?",
    "Which colour does the background have?",
)
DESCRIBE = ("Describe the picture.", "What is in the picture?", "What do you see?")
SMALL_TALK = {
    answer.replace("tiny-qwen3", MODEL_NAME): kept
    for answer, kept in wordings.SMALL_TALK.items()
    if answer != wordings.ABILITIES
}
ABILITIES = "I can see shapes, colours and digits in pictures, and I know a few facts."
SMALL_TALK[ABILITIES] = ("see shapes", wordings.SMALL_TALK[wordings.ABILITIES][1])
FACTS = ("colour", "day_after", "day_before")


def every_text() -> Iterator[str]:
    """Texts with all words of questions and answers."""
    plurals = [plural(one) for one in SHAPES]
    names = [*SHAPES, *plurals, *COLOURS, *BACKGROUNDS, "digit", "things", "nothing"]
    for phrasing in (*COLOUR, *SHAPE, *COLOURED_DIGIT, *COUNT, *WHERE, *BACKGROUND, *DIGIT):
        yield from (phrasing.format(x=name) for name in names)
    for phrasing in (*BESIDE, *DESCRIBE):
        yield from (phrasing.format(x="", side=side) for side in SIDES)
    for rows, columns in ((ROW_NAMES[num], COLUMN_NAMES[num]) for num in ROW_NAMES):
        yield from (f"{row.capitalize()} {column}." for row in rows for column in columns)
    yield from (f"A {name}, {name}; {name}." for name in names)
    yield from (text for name in names for text in (name, name.capitalize()))
    for answer, (_, ways) in SMALL_TALK.items():
        yield from (answer, *ways, *(f"{way}?" for way in ways))
    for relation in (wordings.RELATIONS[name] for name in FACTS):
        for x, y in relation.pairs.items():
            yield from (phrasing.format(x=x) for phrasing in relation.phrasings)
            yield relation.answer.format(x=x, X=x[0].upper() + x[1:], y=y)
    yield from (phrasing.format(a=1, b=1) for phrasing in wordings.ADD[:NUM_SUMS])
    yield from ("1 + 1 = 2.", "user", "assistant", "system")


def plural(kind: str) -> str:
    return f"{kind}es" if kind == "cross" else f"{kind}s"
