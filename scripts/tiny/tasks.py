"""The tasks that train and test the embedded models, in training and held-out content.

Plain Python without torch or a tokenizer, so that accuracy.py and the tests can use it anywhere.

A hash of a question's content decides the split, never its wording: if 37 + 45 is held out, no
phrasing of it, nor of 45 + 37, occurs in training. A held-out word occurs in no spelling task at
all. Three things cannot be inferred from other examples and are split differently:

- facts (capitals, times tables, ...): every fact is trained; pairs of fact and phrasing are held
  out;
- small talk: every intent is trained; exact wordings are held out;
- words that also occur in the phrasings (`wordings.COMMON_WORDS`): a tokenizer may hold them whole,
  so their spelling is a fact too. They occur in training and never count in the held-out score.
"""

from __future__ import annotations

import hashlib
import random
import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tiny import wordings
from tiny.wordings import Check

Message = dict[str, Any]
Tool = dict[str, Any]  # as in OpenAI's API

HELD_OUT_SHARE = 10  # one content in this many


@dataclass(frozen=True)
class Task:
    """One question with its reference answer.

    The answer must contain `expected`; `check` is how that is tested (see `is_correct`).
    `history` holds earlier (question, answer) pairs of the conversation, oldest first.
    """

    question: str
    answer: str
    kind: str
    check: Check
    expected: tuple[str, ...]
    content_key: str
    history: tuple[tuple[str, str], ...] = ()
    system: str | None = None
    tools: tuple[Tool, ...] = ()  # of the conversation

    @property
    def messages(self) -> list[Message]:
        """The conversation as chat messages, up to the question; without the answer."""
        messages: list[Message]
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for question, answer in self.history:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": self.question})
        return messages


def is_held_out(content_key: str) -> bool:
    """True for content of the held-out side. `hash()` of a str would differ between runs."""
    digest = hashlib.blake2b(content_key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


def is_correct(task: Task, text: str) -> bool:
    """True if `text` answers the task. The wording is free except for the answer itself."""
    numbers = re.findall(r"-?\d+", text)
    words = re.findall(r"[^\W\d_]+", text)
    match task.check:
        case "last_number":
            return numbers[-1:] == list(task.expected)
        case "first_number":
            return numbers[:1] == list(task.expected)
        case "numbers":
            return numbers == list(task.expected)
        case "last_word":
            return words[-1:] == list(task.expected)
        case "phrase":
            # whole words only, and hyphenated words are whole: 'one' is not in 'twenty-one'
            return all(
                re.search(rf"(?<![\w-]){re.escape(phrase)}(?![\w-])", text)
                for phrase in task.expected
            )


Maker = Callable[[random.Random], Task]


def _outside_slots(phrasing: str, change: Callable[[str], str]) -> str:
    return re.sub(
        r"\{\w+\}|[^{]+", lambda part: part[0] if part[0][0] == "{" else change(part[0]), phrasing
    )


def phrase(rng: random.Random, phrasing: str, fold: bool = False, /, **slots: str) -> str:
    """Fill in a phrasing, and vary case and punctuation. `fold`: vary the slots' case too."""
    roll = rng.random()
    if roll < 0.12:
        phrasing = _outside_slots(phrasing, str.lower)
        if fold and rng.random() < 0.6:
            slots = {name: value.lower() for name, value in slots.items()}
    elif roll < 0.14:
        phrasing = _outside_slots(phrasing, str.upper)
        if fold:
            slots = {name: value.upper() for name, value in slots.items()}
    roll = rng.random()
    if roll < 0.15:
        phrasing = phrasing.rstrip(".?!")
    elif roll < 0.18:
        phrasing = phrasing.rstrip(".?!") + rng.choice(("!", "??", " ?", "..."))
    roll = rng.random()
    if roll < 0.06:
        phrasing = rng.choice(wordings.OPENERS) + phrasing
    elif roll < 0.09:
        phrasing += rng.choice(wordings.CLOSERS)
    return phrasing.format(**slots)


def number(rng: random.Random, max_digits: int = 3) -> int:
    """A number of uniform length, not of uniform value: people ask about small numbers."""
    num_digits = rng.randint(1, max_digits)
    return rng.randint(0 if num_digits == 1 else 10 ** (num_digits - 1), 10**num_digits - 1)


def _make_add(rng: random.Random) -> Task:
    a, b = number(rng), number(rng)
    slots = {"a": str(a), "b": str(b), "y": str(a + b)}
    question = phrase(
        rng,
        rng.choice(wordings.ADD),
        name=rng.choice(wordings.NAMES),
        things=rng.choice(wordings.THINGS),
        **slots,
    )
    key = f"add {min(a, b)} {max(a, b)}"
    return Task(
        question, wordings.ANSWERS["add"].format(**slots), "add", "last_number", (slots["y"],), key
    )


def _make_subtract(rng: random.Random) -> Task:
    a, b = number(rng), number(rng)
    phrasing = rng.choice(wordings.SUBTRACT)
    if a < b and (rng.random() < 0.6 or "{things}" in phrasing):
        a, b = b, a
    slots = {"a": str(a), "b": str(b), "y": str(a - b)}
    question = phrase(
        rng, phrasing, name=rng.choice(wordings.NAMES), things=rng.choice(wordings.THINGS), **slots
    )
    key = f"subtract {a} {b}"
    return Task(
        question,
        wordings.ANSWERS["subtract"].format(**slots),
        "subtract",
        "last_number",
        (slots["y"],),
        key,
    )


def _numbers(rng: random.Random, min_len: int, max_len: int) -> tuple[list[int], str]:
    max_digits = rng.choice((1, 2, 2))
    numbers = [number(rng, max_digits) for _ in range(rng.randint(min_len, max_len))]
    return numbers, rng.choice((" ", ", ", ", ", ",")).join(map(str, numbers))


def _make_sort(rng: random.Random) -> Task:
    numbers, listed = _numbers(rng, 2, 6)
    down = rng.random() < 0.25
    question = phrase(
        rng, rng.choice(wordings.SORT_DOWN if down else wordings.SORT_UP), numbers=listed
    )
    expected = tuple(map(str, sorted(numbers, reverse=down)))
    key = f"sort {sorted(numbers)}"
    return Task(
        question,
        wordings.ANSWERS["sort"].format(y=", ".join(expected)),
        "sort",
        "numbers",
        expected,
        key,
    )


def _word(rng: random.Random) -> tuple[str, str]:
    """A word and its content key. The key is shared by all tasks on words."""
    roll = rng.random()
    if roll < 0.45:
        word = rng.choice(wordings.LETTER_WORDS)
    elif roll < 0.6:
        word = rng.choice(wordings.WHOLE_WORDS)
    else:
        word = _random_word(rng)
    key = f"word {word}"
    roll = rng.random()
    if roll < 0.08:
        word = word.capitalize()
    elif roll < 0.1:
        word = word.upper()
    return word, key


def _random_word(rng: random.Random) -> str:
    """Letters at random, half of them pronounceable; letters repeat more often than by chance."""
    word_len = rng.randint(2, 12)
    if rng.random() < 0.5:
        pairs = (rng.choice("bcdfghklmnprstvwz") + rng.choice("aeiou") for _ in range(word_len))
        word = "".join(pairs)[:word_len]
    else:
        letters = (
            string.ascii_lowercase if rng.random() < 0.7 else rng.sample(string.ascii_lowercase, 4)
        )
        word = "".join(rng.choice(letters) for _ in range(word_len))
    return word + "q" if word in wordings.COMMON_WORDS else word


def _make_reverse(rng: random.Random) -> Task:
    word, key = _word(rng)
    expected = word[::-1]
    question = phrase(rng, rng.choice(wordings.REVERSE), word=word)
    return Task(
        question,
        wordings.ANSWERS["reverse"].format(word=word, y=expected),
        "reverse",
        "last_word",
        (expected,),
        key,
    )


def _make_spell(rng: random.Random) -> Task:
    word, key = _word(rng)
    expected = "-".join(word)
    question = phrase(rng, rng.choice(wordings.SPELL), word=word)
    return Task(
        question,
        wordings.ANSWERS["spell"].format(word=word, y=expected),
        "spell",
        "phrase",
        (expected,),
        key,
    )


def _make_length(rng: random.Random) -> Task:
    word, key = _word(rng)
    expected = str(len(word))
    question = phrase(rng, rng.choice(wordings.LENGTH), word=word)
    return Task(
        question,
        wordings.ANSWERS["length"].format(word=word, y=expected),
        "length",
        "last_number",
        (expected,),
        key,
    )


def _make_letter(rng: random.Random) -> Task:
    word, key = _word(rng)
    word = word.lower()  # 'how many a in Anna' has no agreed answer
    letter = rng.choice(word) if rng.random() < 0.85 else rng.choice(string.ascii_lowercase)
    num_times = word.count(letter)
    expected = "1 time" if num_times == 1 else f"{num_times} times"
    question = phrase(rng, rng.choice(wordings.LETTER), word=word, letter=letter)
    answer = wordings.ANSWERS["letter"].format(word=word, letter=letter, y=expected)
    return Task(question, answer, "letter", "last_number", (str(num_times),), key)


def _make_count(rng: random.Random) -> Task:
    low = rng.randint(0, 20) if rng.random() < 0.5 else rng.randint(0, 97)
    high = low + rng.randint(2, 11)
    down = rng.random() < 0.3
    numbers = [str(number) for number in range(low, high + 1)]
    expected = tuple(reversed(numbers) if down else numbers)
    question = phrase(
        rng, rng.choice(wordings.COUNT_DOWN if down else wordings.COUNT_UP), a=str(low), b=str(high)
    )
    return Task(
        question, ", ".join(expected) + ".", "count", "numbers", expected, f"count {low} {high}"
    )


def _make_compare(rng: random.Random) -> Task:
    larger = rng.random() < 0.6
    if rng.random() < 0.3:
        numbers, listed = _numbers(rng, 3, 6)
        y = str(max(numbers) if larger else min(numbers))
        question = phrase(
            rng, rng.choice(wordings.LARGEST if larger else wordings.SMALLEST), numbers=listed
        )
        answer = wordings.ANSWERS["largest" if larger else "smallest"].format(y=y)
        return Task(question, answer, "compare", "first_number", (y,), f"extreme {sorted(numbers)}")
    a = number(rng)
    # half of the pairs are close: for others the length or the first digit decides
    b = number(rng) if rng.random() < 0.5 else max(0, a + rng.randint(-12, 12))
    if a == b:
        b = a + 1
    y, z = (str(max(a, b)), str(min(a, b))) if larger else (str(min(a, b)), str(max(a, b)))
    question = phrase(
        rng, rng.choice(wordings.LARGER if larger else wordings.SMALLER), a=str(a), b=str(b)
    )
    answer = wordings.ANSWERS["larger" if larger else "smaller"].format(y=y, z=z)
    return Task(
        question, answer, "compare", "first_number", (y,), f"compare {min(a, b)} {max(a, b)}"
    )


def _make_number(rng: random.Random) -> Task:
    a = number(rng)
    kind = rng.choice(("parity", "next", "previous") if a > 0 else ("parity", "next"))
    if kind == "parity":
        y = "odd" if a % 2 else "even"
        question = phrase(rng, rng.choice(wordings.PARITY), a=str(a))
        answer = wordings.ANSWERS["parity"].format(a=a, y=y)
        return Task(question, answer, "number", "last_word", (y,), f"parity {a}")
    y = str(a + 1 if kind == "next" else a - 1)
    question = phrase(
        rng, rng.choice(wordings.NEXT if kind == "next" else wordings.PREVIOUS), a=str(a)
    )
    answer = wordings.ANSWERS[kind].format(a=a, y=y)
    return Task(question, answer, "number", "first_number", (y,), f"{kind} {a}")


def _make_fact(rng: random.Random) -> Task:
    # larger tables get more questions, but less than in proportion to their size
    name = rng.choices(
        list(wordings.RELATIONS),
        [len(relation.pairs) ** 0.5 for relation in wordings.RELATIONS.values()],
    )[0]
    relation = wordings.RELATIONS[name]
    x = rng.choice(list(relation.pairs))
    y = relation.pairs[x]
    phrasing_idx = rng.randrange(len(relation.phrasings))
    phrasing = relation.phrasings[phrasing_idx]
    if name == "times":
        a, b = x.split()
        question = phrase(rng, phrasing, x=a, y=b)
        answer = relation.answer.format(x=a, y=b, z=y)
    else:
        question = phrase(rng, phrasing, True, x=x)
        answer = relation.answer.format(x=x, X=x[0].upper() + x[1:], y=y)
    return Task(question, answer, "fact", relation.check, (y,), f"fact {name} {x} {phrasing_idx}")


def _make_chat(rng: random.Random) -> Task:
    answer = rng.choice(list(wordings.SMALL_TALK))
    expected, ways_to_ask = wordings.SMALL_TALK[answer]
    question = rng.choice(ways_to_ask)
    roll = rng.random()
    question = question.lower() if roll < 0.3 else question.upper() if roll < 0.35 else question
    question += rng.choice(wordings.SMALL_TALK_ENDINGS)
    return Task(question, answer, "chat", "phrase", (expected,), f"chat {question}")


def _make_unknown(rng: random.Random) -> Task:
    roll = rng.random()
    if roll < 0.7:
        words: list[str] = []
        while len(words) < 3:
            word = rng.choice(wordings.LETTER_WORDS) if rng.random() < 0.6 else _random_word(rng)
            # words of the facts would make some of these questions answerable
            if word.capitalize() not in wordings.CAPITALS and word not in words:
                words.append(word)
        slots = {
            "word": words[0],
            "word2": words[1],
            "word3": words[2],
            "Word": words[0].capitalize(),
        }
        question = phrase(rng, rng.choice(wordings.UNKNOWN), **slots)
        return Task(question, wordings.SORRY, "unknown", "phrase", ("Sorry",), f"word {words[0]}")
    if roll < 0.85:
        a, b = number(rng, 6), rng.randint(wordings.MAX_OPERAND + 1, 999_999)
        if rng.random() < 0.5:
            a, b = b, a
        question = phrase(rng, rng.choice(wordings.TOO_BIG), a=str(a), b=str(b))
        return Task(
            question, wordings.TOO_BIG_ANSWER, "unknown", "phrase", ("Sorry",), f"too big {a} {b}"
        )
    if roll < 0.95:
        a, b = number(rng), rng.randint(wordings.MAX_FACTOR + 1, 999)
        if rng.random() < 0.5:
            a, b = b, a
        question = phrase(
            rng, rng.choice(wordings.RELATIONS["times"].phrasings), x=str(a), y=str(b)
        )
        return Task(
            question, wordings.TOO_MANY_ANSWER, "unknown", "phrase", ("Sorry",), f"times {a} {b}"
        )
    a, b = number(rng), number(rng)
    question = phrase(rng, rng.choice(wordings.DIVIDE), a=str(a), b=str(b))
    return Task(
        question, wordings.DIVIDE_ANSWER, "unknown", "phrase", ("Sorry",), f"divide {a} {b}"
    )


# kind -> (maker, weight in training). Harder kinds get more.
_MAKERS: dict[str, tuple[Maker, float]] = {
    "add": (_make_add, 3.0),
    "subtract": (_make_subtract, 4.0),
    "sort": (_make_sort, 3.0),
    "reverse": (_make_reverse, 2.0),
    "spell": (_make_spell, 1.0),
    "length": (_make_length, 1.5),
    "letter": (_make_letter, 2.0),
    "count": (_make_count, 1.0),
    "compare": (_make_compare, 1.5),
    "number": (_make_number, 0.7),
    "fact": (_make_fact, 2.5),
    "chat": (_make_chat, 0.6),
    "unknown": (_make_unknown, 1.0),
}
KINDS = tuple(_MAKERS)
# of the model that is small enough to be trained on a CPU; the others are trained on all kinds
KINDS_OF = {"qwen3_5": ("spell", "count", "compare", "number")}
_WHOLE_WORD_KEYS = frozenset(f"word {word}" for word in wordings.WHOLE_WORDS)


def kinds_of(arch: str) -> tuple[str, ...]:
    """The kinds that a model is trained on, by a key of `architectures.MODEL_NAMES` or by the
    `model_type` of its config."""
    return KINDS_OF.get(arch.removesuffix("_text"), KINDS)


def training_task(rng: random.Random, kinds: Sequence[str] = KINDS) -> Task:
    maker = _MAKERS[rng.choices(kinds, [_MAKERS[kind][1] for kind in kinds])[0]][0]
    while True:
        task = maker(rng)
        if task.content_key in _WHOLE_WORD_KEYS or not is_held_out(task.content_key):
            return task


def held_out_task(rng: random.Random, kind: str) -> Task:
    maker = _MAKERS[kind][0]
    while True:
        task = maker(rng)
        if task.content_key not in _WHOLE_WORD_KEYS and is_held_out(task.content_key):
            return task


def training_examples(seed: int | str, kinds: Sequence[str] = KINDS) -> Iterator[Task]:
    """Endless training conversations, the same for the same seed. All turns are training content.

    Two in five have earlier turns: a chat's history must not disturb an answer.
    """
    rng = random.Random(f"train {seed}")
    while True:
        num_earlier = rng.choices((0, 1, 2, 3, 4, 5, 6), (60, 24, 8, 4, 2, 1, 1))[0]
        turns = [training_task(rng, kinds) for _ in range(num_earlier + 1)]
        system = rng.choice(wordings.SYSTEMS) if rng.random() < 0.12 else None
        yield replace(
            turns[-1],
            history=tuple((turn.question, turn.answer) for turn in turns[:-1]),
            system=system,
        )


def held_out(num: int, seed: int, kinds: Sequence[str] = KINDS) -> list[Task]:
    """`num` different tasks with held-out content, the kinds in turn.

    One in four has an earlier turn, one in ten a system prompt.
    """
    rng = random.Random(f"held out {seed}")
    tasks: dict[tuple[object, ...], Task] = {}
    while len(tasks) < num:
        task = held_out_task(rng, kinds[len(tasks) % len(kinds)])
        if rng.random() < 0.25:
            earlier = held_out_task(rng, rng.choice(kinds))
            task = replace(task, history=((earlier.question, earlier.answer),))
        if rng.random() < 0.1:
            task = replace(task, system=rng.choice(wordings.SYSTEMS))
        tasks.setdefault((task.question, task.history, task.system), task)
    return list(tasks.values())
