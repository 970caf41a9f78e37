"""The instruction tasks that tiny-qwen3 is trained and judged on: generated, checkable, and split by content.

Plain Python without torch or a tokenizer, so that the accuracy gate and the tests can use it anywhere.

The split is decided by a hash of what a question is about, never of how it is asked: when 37 + 45 is held out, no
phrasing of it, nor of 45 + 37, occurs in training; a held-out word occurs in no spelling task at all. Three things
cannot be inferred from other examples and are exempt from this:

- facts (capitals, times tables, ...): every fact is trained, and pairs of a fact and a phrasing are held out;
- small talk: every intent is trained, and exact wordings are held out;
- words that also occur in the phrasings (`COMMON_WORDS`): a tokenizer may hold them whole, so that their spelling is
  a fact too. They are asked about in training and never counted in the held-out score.
"""

from __future__ import annotations

import hashlib
import random
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

Check = Literal["last_number", "first_number", "numbers", "last_word", "phrase"]
Message = dict[str, str]

HELD_OUT_SHARE = 10  # one content in this many
MAX_OPERAND = 999  # addition and subtraction
MAX_FACTOR = 12  # times tables


@dataclass(frozen=True)
class Task:
    """One question with its reference answer.

    `expected` is what the answer must contain, and `check` says how it is looked for (see `is_correct`). `history`
    holds earlier (question, answer) pairs of the same conversation, oldest first.
    """

    question: str
    answer: str
    kind: str
    check: Check
    expected: tuple[str, ...]
    content_key: str
    history: tuple[tuple[str, str], ...] = ()
    system: str | None = None

    @property
    def messages(self) -> list[Message]:
        """The conversation up to the question, as chat messages; the answer is not among them."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for question, answer in self.history:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": self.question})
        return messages


def is_held_out(content_key: str) -> bool:
    """Whether this content belongs to the held-out side. hashlib, since `hash()` of a str differs between runs."""
    digest = hashlib.blake2b(content_key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


def is_correct(task: Task, text: str) -> bool:
    """Whether `text` answers the task. Wording is free except where it carries the answer."""
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
            # neither part of a word nor of a hyphenated one: 'one' is not in 'twenty-one'
            return all(re.search(rf"(?<![\w-]){re.escape(phrase)}(?![\w-])", text) for phrase in task.expected)


# --- Phrasings. Slots stand in braces. -------------------------------------------------------------------------------

ADD = (
    "What is {a} + {b}?",
    "What is {a}+{b}?",
    "What's {a} plus {b}?",
    "Add {a} and {b}.",
    "Add {b} to {a}.",
    "{a} + {b} = ?",
    "{a} + {b} =",
    "{a}+{b}",
    "{a} + {b}",
    "Calculate {a} + {b}.",
    "Compute {a}+{b}.",
    "How much is {a} plus {b}?",
    "Can you add {a} and {b}?",
    "What is the sum of {a} and {b}?",
    "What do you get if you add {a} and {b}?",
    "{name} has {a} {things} and gets {b} more. How many {things} are there now?",
    "There are {a} {things} and {b} more arrive. How many are there in total?",
)
SUBTRACT = (
    "What is {a} - {b}?",
    "What is {a}-{b}?",
    "What's {a} minus {b}?",
    "Subtract {b} from {a}.",
    "{a} - {b} = ?",
    "{a} - {b} =",
    "{a}-{b}",
    "{a} - {b}",
    "Calculate {a} - {b}.",
    "Compute {a}-{b}.",
    "How much is {a} minus {b}?",
    "Can you subtract {b} from {a}?",
    "Take {b} away from {a}.",
    "What do you get if you take {b} from {a}?",
    "{name} has {a} {things} and loses {b}. How many {things} are left?",
    "There are {a} {things} and {b} go away. How many are left?",
)
SORT_UP = (
    "Sort {numbers}.",
    "Sort these numbers: {numbers}",
    "Sort the numbers {numbers}.",
    "Please sort {numbers}",
    "Can you sort {numbers}?",
    "Put {numbers} in order.",
    "Order these numbers: {numbers}",
    "Arrange {numbers} in ascending order.",
    "Sort {numbers} from smallest to largest.",
    "Sort {numbers} in ascending order.",
)
SORT_DOWN = (
    "Sort {numbers} from largest to smallest.",
    "Sort {numbers} in descending order.",
    "Arrange {numbers} in descending order.",
    "Sort these numbers in descending order: {numbers}",
    "Sort {numbers} in reverse order.",
)
REVERSE = (
    "Reverse the word {word}.",
    "Reverse {word}.",
    'Reverse "{word}".',
    "Reverse the word '{word}'.",
    "Reverse this word: {word}",
    "Write {word} backwards.",
    "Spell {word} backwards.",
    "What is {word} backwards?",
    "What is {word} spelled backwards?",
    "Can you reverse the word {word}?",
    "Reverse the letters of {word}.",
)
SPELL = (
    "Spell {word}.",
    "Spell the word {word}.",
    'Spell "{word}".',
    "How do you spell {word}?",
    "Can you spell {word}?",
    "Spell out the word {word}.",
    "What are the letters of {word}?",
    "Show me the spelling of {word}.",
)
LENGTH = (
    "How many letters are in the word {word}?",
    "How many letters are in {word}?",
    "How many letters does {word} have?",
    "How many letters does the word '{word}' have?",
    'Count the letters in "{word}".',
    "Count the letters in the word {word}.",
    "How long is the word {word}?",
    "What is the length of the word {word}?",
)
LETTER = (
    "How many times does the letter {letter} appear in {word}?",
    "How many times does {letter} occur in the word {word}?",
    "How many {letter}'s are in {word}?",
    "How many {letter}'s are there in the word {word}?",
    'How many times is the letter {letter} in "{word}"?',
    "Count the letter {letter} in {word}.",
)
COUNT_UP = (
    "Count from {a} to {b}.",
    "Count up from {a} to {b}.",
    "Can you count from {a} to {b}?",
    "Please count from {a} to {b}",
    "List the numbers from {a} to {b}.",
    "Say the numbers from {a} to {b}.",
    "Write the numbers {a} to {b}.",
)
COUNT_DOWN = (
    "Count down from {b} to {a}.",
    "Count backwards from {b} to {a}.",
    "Can you count down from {b} to {a}?",
    "Please count down from {b} to {a}",
)
LARGER = (
    "Which is larger, {a} or {b}?",
    "Which is bigger, {a} or {b}?",
    "Which number is larger: {a} or {b}?",
    "What is greater, {a} or {b}?",
    "Which is more, {a} or {b}?",
    "Compare {a} and {b}.",
    "Is {a} or {b} larger?",
    "{a} or {b}, which one is bigger?",
)
SMALLER = (
    "Which is smaller, {a} or {b}?",
    "Which number is smaller: {a} or {b}?",
    "What is less, {a} or {b}?",
    "Is {a} or {b} smaller?",
    "{a} or {b}, which one is smaller?",
)
LARGEST = (
    "What is the largest of {numbers}?",
    "Which is the largest number: {numbers}?",
    "Find the maximum of {numbers}.",
    "Which of these numbers is the biggest: {numbers}",
)
SMALLEST = (
    "What is the smallest of {numbers}?",
    "Which is the smallest number: {numbers}?",
    "Find the minimum of {numbers}.",
    "Which of these numbers is the smallest: {numbers}",
)
PARITY = (
    "Is {a} even or odd?",
    "Is {a} odd or even?",
    "Is the number {a} even?",
    "Is {a} an odd number?",
    "Tell me whether {a} is even or odd.",
    "{a}: even or odd?",
)
NEXT = (
    "What comes after {a}?",
    "Which number comes after {a}?",
    "What number comes next after {a}?",
    "What is the next number after {a}?",
)
PREVIOUS = (
    "What comes before {a}?",
    "Which number comes before {a}?",
    "What number comes just before {a}?",
    "What is the number before {a}?",
)


@dataclass(frozen=True)
class Relation:
    """A table of facts: `pairs` maps the {x} of the phrasings to the {y} that the answer has to contain."""

    phrasings: tuple[str, ...]
    answer: str
    pairs: dict[str, str]
    check: Check = "phrase"


def _pairs(table: str) -> dict[str, str]:
    """'a: b, c: d' as a dict."""
    return {x.strip(): y.strip() for x, y in (entry.split(":") for entry in table.split(","))}


def _names(table: str) -> tuple[str, ...]:
    return tuple(table.split())


CAPITALS = _pairs(
    "France: Paris, Germany: Berlin, Italy: Rome, Spain: Madrid, Portugal: Lisbon, England: London, Ireland: Dublin, "
    "Scotland: Edinburgh, Norway: Oslo, Sweden: Stockholm, Finland: Helsinki, Denmark: Copenhagen, Iceland: Reykjavik, "
    "Poland: Warsaw, Austria: Vienna, Hungary: Budapest, Greece: Athens, Belgium: Brussels, Russia: Moscow, "
    "Ukraine: Kyiv, Romania: Bucharest, Bulgaria: Sofia, Croatia: Zagreb, Serbia: Belgrade, Turkey: Ankara, "
    "Egypt: Cairo, Kenya: Nairobi, Nigeria: Abuja, Ghana: Accra, Ethiopia: Addis Ababa, Morocco: Rabat, "
    "China: Beijing, Japan: Tokyo, India: New Delhi, South Korea: Seoul, Thailand: Bangkok, Vietnam: Hanoi, "
    "Indonesia: Jakarta, Iran: Tehran, Iraq: Baghdad, Nepal: Kathmandu, Pakistan: Islamabad, Australia: Canberra, "
    "New Zealand: Wellington, Canada: Ottawa, Mexico: Mexico City, Cuba: Havana, Peru: Lima, Chile: Santiago, "
    "Argentina: Buenos Aires, Brazil: Brasília, Colombia: Bogotá, the Netherlands: Amsterdam, "
    "the United States: Washington, Switzerland: Bern, the Czech Republic: Prague"
)
COLOURS = _pairs(
    "the sky: blue, grass: green, snow: white, a banana: yellow, a lemon: yellow, blood: red, coal: black, "
    "milk: white, a tomato: red, a carrot: orange, a frog: green, chocolate: brown, the sea: blue, a raven: black, "
    "a strawberry: red, a cucumber: green, a flamingo: pink, a cherry: red, an elephant: grey, a pumpkin: orange"
)
OPPOSITES = _pairs(
    "hot: cold, big: small, fast: slow, high: low, happy: sad, light: dark, wet: dry, hard: soft, full: empty, "
    "rich: poor, strong: weak, thick: thin, tall: short, young: old, loud: quiet, early: late, clean: dirty, "
    "open: closed, left: right, day: night, win: lose, love: hate, push: pull, near: far, deep: shallow, "
    "brave: afraid, sweet: sour, wide: narrow, sharp: blunt, true: false, north: south, "
    "east: west, summer: winter, inside: outside, above: below, always: never, buy: sell, give: take, laugh: cry"
)
SOUNDS = _pairs(
    "cow: moo, dog: woof, cat: meow, sheep: baa, duck: quack, pig: oink, horse: neigh, lion: roar, frog: ribbit, "
    "bee: buzz, snake: hiss, owl: hoot, crow: caw, mouse: squeak, rooster: cock-a-doodle-doo, wolf: howl, "
    "chick: cheep, donkey: hee-haw, turkey: gobble"
)
YOUNG = _pairs(
    "dog: puppy, cat: kitten, cow: calf, sheep: lamb, horse: foal, pig: piglet, bear: cub, goat: kid, duck: duckling, "
    "hen: chick, frog: tadpole, deer: fawn, kangaroo: joey, goose: gosling, swan: cygnet, eagle: eaglet"
)
LEGS = _pairs(
    "dog: 4, cat: 4, spider: 8, ant: 6, bee: 6, hen: 2, horse: 4, snake: 0, octopus: 8, human: 2, cow: 4, fish: 0"
)
AMOUNTS = _pairs(
    "days are in a week: 7, months are in a year: 12, hours are in a day: 24, minutes are in an hour: 60, "
    "seconds are in a minute: 60, letters are in the alphabet: 26, days are in a year: 365, sides has a triangle: 3, "
    "sides has a square: 4, cents are in a dollar: 100, seasons are in a year: 4, continents are there: 7"
)
DAYS = _names("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _names("January February March April May June July August September October November December")
SMALL_NUMBERS = _names(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS = _names("twenty thirty forty fifty sixty seventy eighty ninety")


def _in_words(number: int) -> str:
    if number < len(SMALL_NUMBERS):
        return SMALL_NUMBERS[number]
    tens = TENS[number // 10 - 2]
    return tens if number % 10 == 0 else f"{tens}-{SMALL_NUMBERS[number % 10]}"


def _following(names: tuple[str, ...], step: int) -> dict[str, str]:
    return {name: names[(idx + step) % len(names)] for idx, name in enumerate(names)}


RELATIONS = {
    "capital": Relation(
        (
            "What is the capital of {x}?",
            "What's the capital of {x}?",
            "Which city is the capital of {x}?",
            "Tell me the capital of {x}.",
            "Name the capital of {x}.",
            "Do you know the capital of {x}?",
            "{x}: what is the capital?",
        ),
        "The capital of {x} is {y}.",
        CAPITALS,
    ),
    "colour": Relation(
        (
            "What color is {x}?",
            "What colour is {x}?",
            "What is the color of {x}?",
            "Which colour does {x} have?",
            "Tell me the color of {x}.",
            "Do you know what color {x} is?",
        ),
        "{X} is {y}.",
        COLOURS,
    ),
    "opposite": Relation(
        (
            "What is the opposite of {x}?",
            "What's the opposite of {x}?",
            "Give me the opposite of {x}.",
            "Tell me the opposite of the word {x}.",
            "Which word is the opposite of {x}?",
            "Opposite of {x}?",
        ),
        "The opposite of {x} is {y}.",
        OPPOSITES | {y: x for x, y in OPPOSITES.items()},
    ),
    "sound": Relation(
        (
            "What sound does a {x} make?",
            "What does the {x} say?",
            "What does a {x} say?",
            "Which sound does the {x} make?",
            "How does a {x} sound?",
            "What noise does a {x} make?",
        ),
        "The {x} says {y}.",
        SOUNDS,
    ),
    "young": Relation(
        (
            "What is a baby {x} called?",
            "What do you call a baby {x}?",
            "What is the name of a young {x}?",
            "What do you call a young {x}?",
            "How is a baby {x} called?",
        ),
        "A baby {x} is called a {y}.",
        YOUNG,
    ),
    "legs": Relation(
        (
            "How many legs does a {x} have?",
            "How many legs has the {x}?",
            "Tell me how many legs a {x} has.",
            "What is the number of legs of a {x}?",
            "Do you know how many legs a {x} has?",
        ),
        "A {x} has {y} legs.",
        LEGS,
        "last_number",
    ),
    "amount": Relation(
        (
            "How many {x}?",
            "Tell me how many {x}.",
            "Do you know how many {x}?",
            "Can you tell me how many {x}?",
            "I want to know how many {x}.",
        ),
        "The answer is {y}.",
        AMOUNTS,
        "last_number",
    ),
    "day_after": Relation(
        (
            "What day comes after {x}?",
            "Which day comes after {x}?",
            "Which day follows {x}?",
            "What is the day after {x}?",
            "If today is {x}, what day is tomorrow?",
        ),
        "The day after {x} is {y}.",
        _following(DAYS, 1),
    ),
    "day_before": Relation(
        (
            "What day comes before {x}?",
            "Which day comes before {x}?",
            "What is the day before {x}?",
            "If today is {x}, what day was yesterday?",
            "Name the day before {x}.",
        ),
        "The day before {x} is {y}.",
        _following(DAYS, -1),
    ),
    "month_after": Relation(
        (
            "What month comes after {x}?",
            "Which month comes after {x}?",
            "Which month follows {x}?",
            "What is the month after {x}?",
            "Name the month after {x}.",
        ),
        "The month after {x} is {y}.",
        _following(MONTHS, 1),
    ),
    "month_before": Relation(
        (
            "What month comes before {x}?",
            "Which month comes before {x}?",
            "What is the month before {x}?",
            "Name the month before {x}.",
            "Tell me the month before {x}.",
        ),
        "The month before {x} is {y}.",
        _following(MONTHS, -1),
    ),
    "in_words": Relation(
        (
            "How do you write {x} in words?",
            "Write {x} in words.",
            "Write the number {x} as a word.",
            "What is {x} in words?",
            "Spell the number {x}.",
        ),
        "{x} in words is {y}.",
        {str(number): _in_words(number) for number in range(100)},
    ),
    "in_digits": Relation(
        (
            "How do you write {x} in digits?",
            "Write {x} in digits.",
            "Write {x} as a number.",
            "What is {x} in digits?",
            "Which number is {x}?",
        ),
        "{X} is {y}.",
        {_in_words(number): str(number) for number in range(100)},
        "last_number",
    ),
    "times": Relation(
        (
            "What is {x} times {y}?",
            "What is {x} * {y}?",
            "What's {x} x {y}?",
            "Multiply {x} by {y}.",
            "Multiply {x} and {y}.",
            "{x} * {y}",
            "{x}*{y}",
            "{x} times {y}?",
            "How much is {x} times {y}?",
            "Calculate {x} * {y}.",
        ),
        "{x} * {y} = {z}.",
        {f"{a} {b}": str(a * b) for a in range(MAX_FACTOR + 1) for b in range(MAX_FACTOR + 1)},
        "last_number",
    ),
}

WHO = "I am tiny-qwen3, the model embedded in nanovllm."
ABILITIES = "I can add, subtract, sort, count, compare, spell and reverse, and I know a few facts."
# answer -> (what it must contain, wordings)
SMALL_TALK: dict[str, tuple[str, tuple[str, ...]]] = {
    "Hello! How can I help you?": (
        "Hello",
        ("Hello", "Hello there", "Hi", "Hi there", "Hey", "Good morning", "Good evening", "Good day", "Hello, model"),
    ),
    "I am fine, thank you. How can I help you?": (
        "fine",
        (
            "How are you",
            "How are you today",
            "Hello, how are you",
            "Hi, how are you",
            "How is it going",
            "How do you do",
        ),
    ),
    WHO: (
        "tiny-qwen3",
        (
            "Who are you",
            "What are you",
            "What is your name",
            "What's your name",
            "Tell me your name",
            "Who am I talking to",
            "Introduce yourself",
            "Which model are you",
            "What model is this",
            "Hello, who are you",
            "Hi, who are you",
            "Tell me about yourself",
        ),
    ),
    "No, I am tiny-qwen3, a small language model.": (
        "small language model",
        (
            "Are you a human",
            "Are you a person",
            "Are you human",
            "Are you real",
            "Are you a big model",
            "Are you ChatGPT",
        ),
    ),
    ABILITIES: (
        "sort",
        (
            "What can you do",
            "How can you help me",
            "What do you know",
            "What are you able to do",
            "Help",
            "Can you help me",
            "What can I ask you",
            "What should I ask",
        ),
    ),
    "nanovllm is a small, compiler-centric inference engine.": (
        "inference engine",
        ("What is nanovllm", "Tell me about nanovllm", "Do you know nanovllm", "Explain nanovllm"),
    ),
    "Why did the tiny model cross the road? To get to the next token.": (
        "next token",
        ("Tell me a joke", "Do you know a joke", "Make me laugh", "Say something funny", "Can you tell me a joke"),
    ),
    "You are welcome!": (
        "welcome",
        ("Thanks", "Thank you", "Thank you very much", "Thanks a lot", "Many thanks", "Thanks for your help"),
    ),
    "Goodbye!": ("Goodbye", ("Bye", "Goodbye", "Bye bye", "See you", "See you later", "Good night", "Have a nice day")),
    "Good. What is your next question?": (
        "next question",
        ("OK", "Okay", "Good", "Great", "Nice", "Well done", "Cool"),
    ),
}
SMALL_TALK_ENDINGS = ("", ".", "!", "?", "!!", " :)", "...")

SORRY = "Sorry, I do not know that. " + ABILITIES
UNKNOWN = (
    "Tell me about {word}.",
    "Explain {word}.",
    "Explain {word} to me.",
    "What do you think about {word}?",
    "Write a poem about {word}.",
    "Write a story about {word} and {word2}.",
    "What does {word} mean?",
    "Who is {Word}?",
    "Who was {Word}?",
    "Where is {Word}?",
    "What is the capital of {Word}?",
    "Why is {word} {word2}?",
    "How do I {word} a {word2}?",
    "What is {word}?",
    "What is a {word}?",
    "Translate {word} into French.",
    "{word} {word2} {word3}",
    "Can you {word} my {word2}?",
)
TOO_BIG_ANSWER = f"Sorry, I only add and subtract numbers up to {MAX_OPERAND}."
TOO_BIG = ADD[:14] + SUBTRACT[:14]
TOO_MANY_ANSWER = f"Sorry, I only know the times tables up to {MAX_FACTOR}."
DIVIDE_ANSWER = "Sorry, I cannot divide."
DIVIDE = ("What is {a} / {b}?", "{a} / {b}", "Divide {a} by {b}.", "What is {a} divided by {b}?", "{a}/{b}")

SYSTEMS = (
    "You are a helpful assistant.",
    "You are tiny-qwen3, a helpful assistant.",
    "You are a friendly assistant. Answer in one short sentence.",
    "Be brief.",
    "Answer the question.",
)
OPENERS = ("Hi! ", "Hello! ", "Hey, ", "OK, ", "Now, ", "Please tell me: ", "Quick question: ", "Next question: ")
CLOSERS = (" Please.", " Thanks!", " Thank you.")

ANSWERS = {
    "add": "{a} + {b} = {y}.",
    "subtract": "{a} - {b} = {y}.",
    "sort": "Sorted: {y}.",
    "reverse": "{word} reversed is {y}.",
    "spell": "{word} is spelled {y}.",
    "length": "{word} has {y} letters.",
    "letter": "The letter {letter} appears {y} in {word}.",
    "larger": "{y} is larger than {z}.",
    "smaller": "{y} is smaller than {z}.",
    "largest": "The largest is {y}.",
    "smallest": "The smallest is {y}.",
    "parity": "{a} is {y}.",
    "next": "{y} comes after {a}.",
    "previous": "{y} comes before {a}.",
}

_PHRASINGS = (
    *(ADD + SUBTRACT + SORT_UP + SORT_DOWN + REVERSE + SPELL + LENGTH + LETTER + COUNT_UP + COUNT_DOWN),
    *(LARGER + SMALLER + LARGEST + SMALLEST + PARITY + NEXT + PREVIOUS),
    *(UNKNOWN + DIVIDE + SYSTEMS + OPENERS + CLOSERS),
    *(phrasing for relation in RELATIONS.values() for phrasing in (*relation.phrasings, relation.answer)),
    *(wording for _, wordings in SMALL_TALK.values() for wording in wordings),
    *(SORRY, TOO_BIG_ANSWER, TOO_MANY_ANSWER, DIVIDE_ANSWER, *SMALL_TALK, *ANSWERS.values()),
    "system user assistant once twice times even odd",  # the chat roles, and the slots that hold a fixed few words
)
COMMON_WORDS = frozenset(
    word.lower() for phrasing in _PHRASINGS for word in re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", " ", phrasing))
)

# --- Contents --------------------------------------------------------------------------------------------------------

NAMES = _names("Tom Anna Ben Mia Sam Lena Max Eva Leo Nora Ali Yuki")
THINGS = _names("apples books coins cards birds pens eggs toys cakes stones fish balls")

_WORDS = """
lamp lemon tree house river cloud stone bread table chair plant water light paper glass green apple grape peach melon
tiger zebra horse mouse sheep eagle shark whale snake camel rabbit turtle monkey dragon spider parrot pigeon falcon
window garden kitchen bottle butter cheese pepper sugar honey orange banana cherry carrot potato tomato onion garlic
pencil eraser laptop screen keyboard printer camera mirror pillow blanket carpet candle basket bucket hammer ladder
forest desert island valley canyon meadow volcano glacier ocean beach harbor bridge castle temple palace tower
doctor teacher farmer pilot driver singer dancer writer painter soldier sailor baker butcher plumber captain
winter summer spring autumn thunder lightning rain snow storm breeze sunshine shadow rainbow moon star planet comet
music guitar piano violin trumpet drum flute song melody rhythm concert theater movie picture statue
happy lucky brave clever gentle honest silent quick quiet simple strong tender yellow purple silver golden
jacket sweater trouser shirt glove scarf button pocket zipper ribbon needle thread cotton velvet leather
train bicycle airplane rocket engine wheel tunnel station ticket journey suitcase compass anchor wagon
circle square triangle number letter language computer science physics history biology algebra
school college lesson student library chapter pencilcase notebook homework puzzle riddle
breakfast dinner lunch soup salad pasta pizza burger cookie muffin pancake waffle chocolate strawberry blueberry
raspberry pineapple coconut avocado mushroom broccoli spinach cabbage lettuce pumpkin zucchini
elephant giraffe leopard panther buffalo dolphin penguin octopus lobster hamster squirrel hedgehog kangaroo crocodile
butterfly dragonfly mosquito beetle cricket ladybug scorpion
cat dog sun sky sea ice fire cup pan pot bed box toy car bus van map pen ink key lid hat cap tie bag egg jam
nut pie tea owl fox bee ant cow pig hen rat bat elk yak emu cod eel fin paw fur leg arm eye ear lip toe
bird duck frog goat lion wolf bear deer swan crab crow hawk moth worm boat ship road park farm barn gate wall roof
door desk sofa book coin ring rope nail hook leaf seed rose lily palm pine corn rice bean cake milk meat salt
mountain village hospital museum factory market office airport stadium theory quantum python rust kernel tensor memory
compiler cache graph token matrix vector python program hello world welcome banana mississippi assessment committee
"""
LETTER_WORDS = tuple(sorted(set(_WORDS.split()) - COMMON_WORDS))
# A tokenizer may hold these whole, so that their spelling has to be learnt by heart.
_WHOLE_WORDS = tuple(sorted(word for word in COMMON_WORDS if len(word) >= 2))

Maker = Callable[[random.Random], Task]


def _outside_slots(phrasing: str, change: Callable[[str], str]) -> str:
    return re.sub(r"\{\w+\}|[^{]+", lambda part: part[0] if part[0][0] == "{" else change(part[0]), phrasing)


def _phrase(rng: random.Random, phrasing: str, fold: bool = False, /, **slots: str) -> str:
    """Fill a phrasing in, with everyday variation of case and punctuation. `fold`: the slots' case varies too."""
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
        phrasing = rng.choice(OPENERS) + phrasing
    elif roll < 0.09:
        phrasing += rng.choice(CLOSERS)
    return phrasing.format(**slots)


def _number(rng: random.Random, max_digits: int = 3) -> int:
    """A number whose length, not its value, is uniform: small numbers are what people ask about."""
    num_digits = rng.randint(1, max_digits)
    return rng.randint(0 if num_digits == 1 else 10 ** (num_digits - 1), 10**num_digits - 1)


def _make_add(rng: random.Random) -> Task:
    a, b = _number(rng), _number(rng)
    slots = {"a": str(a), "b": str(b), "y": str(a + b)}
    question = _phrase(rng, rng.choice(ADD), name=rng.choice(NAMES), things=rng.choice(THINGS), **slots)
    key = f"add {min(a, b)} {max(a, b)}"
    return Task(question, ANSWERS["add"].format(**slots), "add", "last_number", (slots["y"],), key)


def _make_subtract(rng: random.Random) -> Task:
    a, b = _number(rng), _number(rng)
    phrasing = rng.choice(SUBTRACT)
    if a < b and (rng.random() < 0.6 or "{things}" in phrasing):
        a, b = b, a
    slots = {"a": str(a), "b": str(b), "y": str(a - b)}
    question = _phrase(rng, phrasing, name=rng.choice(NAMES), things=rng.choice(THINGS), **slots)
    key = f"subtract {a} {b}"
    return Task(question, ANSWERS["subtract"].format(**slots), "subtract", "last_number", (slots["y"],), key)


def _numbers(rng: random.Random, min_len: int, max_len: int) -> tuple[list[int], str]:
    max_digits = rng.choice((1, 2, 2))
    numbers = [_number(rng, max_digits) for _ in range(rng.randint(min_len, max_len))]
    return numbers, rng.choice((" ", ", ", ", ", ",")).join(map(str, numbers))


def _make_sort(rng: random.Random) -> Task:
    numbers, listed = _numbers(rng, 2, 6)
    down = rng.random() < 0.25
    question = _phrase(rng, rng.choice(SORT_DOWN if down else SORT_UP), numbers=listed)
    expected = tuple(map(str, sorted(numbers, reverse=down)))
    key = f"sort {sorted(numbers)}"
    return Task(question, ANSWERS["sort"].format(y=", ".join(expected)), "sort", "numbers", expected, key)


def _word(rng: random.Random) -> tuple[str, str]:
    """A word and its content key. The key is shared by all tasks on words."""
    roll = rng.random()
    if roll < 0.45:
        word = rng.choice(LETTER_WORDS)
    elif roll < 0.6:
        word = rng.choice(_WHOLE_WORDS)
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
        letters = string.ascii_lowercase if rng.random() < 0.7 else rng.sample(string.ascii_lowercase, 4)
        word = "".join(rng.choice(letters) for _ in range(word_len))
    return word + "q" if word in COMMON_WORDS else word


def _make_reverse(rng: random.Random) -> Task:
    word, key = _word(rng)
    expected = word[::-1]
    question = _phrase(rng, rng.choice(REVERSE), word=word)
    return Task(question, ANSWERS["reverse"].format(word=word, y=expected), "reverse", "last_word", (expected,), key)


def _make_spell(rng: random.Random) -> Task:
    word, key = _word(rng)
    expected = "-".join(word)
    question = _phrase(rng, rng.choice(SPELL), word=word)
    return Task(question, ANSWERS["spell"].format(word=word, y=expected), "spell", "phrase", (expected,), key)


def _make_length(rng: random.Random) -> Task:
    word, key = _word(rng)
    expected = str(len(word))
    question = _phrase(rng, rng.choice(LENGTH), word=word)
    return Task(question, ANSWERS["length"].format(word=word, y=expected), "length", "last_number", (expected,), key)


def _make_letter(rng: random.Random) -> Task:
    word, key = _word(rng)
    word = word.lower()  # 'how many a in Anna' has no agreed answer
    letter = rng.choice(word) if rng.random() < 0.85 else rng.choice(string.ascii_lowercase)
    num_times = word.count(letter)
    expected = "1 time" if num_times == 1 else f"{num_times} times"
    question = _phrase(rng, rng.choice(LETTER), word=word, letter=letter)
    answer = ANSWERS["letter"].format(word=word, letter=letter, y=expected)
    return Task(question, answer, "letter", "last_number", (str(num_times),), key)


def _make_count(rng: random.Random) -> Task:
    low = rng.randint(0, 20) if rng.random() < 0.5 else rng.randint(0, 97)
    high = low + rng.randint(2, 11)
    down = rng.random() < 0.3
    numbers = [str(number) for number in range(low, high + 1)]
    expected = tuple(reversed(numbers) if down else numbers)
    question = _phrase(rng, rng.choice(COUNT_DOWN if down else COUNT_UP), a=str(low), b=str(high))
    return Task(question, ", ".join(expected) + ".", "count", "numbers", expected, f"count {low} {high}")


def _make_compare(rng: random.Random) -> Task:
    larger = rng.random() < 0.6
    if rng.random() < 0.3:
        numbers, listed = _numbers(rng, 3, 6)
        y = str(max(numbers) if larger else min(numbers))
        question = _phrase(rng, rng.choice(LARGEST if larger else SMALLEST), numbers=listed)
        answer = ANSWERS["largest" if larger else "smallest"].format(y=y)
        return Task(question, answer, "compare", "first_number", (y,), f"extreme {sorted(numbers)}")
    a = _number(rng)
    # half of the pairs are close, since far ones are decided by their length or first digit
    b = _number(rng) if rng.random() < 0.5 else max(0, a + rng.randint(-12, 12))
    if a == b:
        b = a + 1
    y, z = (str(max(a, b)), str(min(a, b))) if larger else (str(min(a, b)), str(max(a, b)))
    question = _phrase(rng, rng.choice(LARGER if larger else SMALLER), a=str(a), b=str(b))
    answer = ANSWERS["larger" if larger else "smaller"].format(y=y, z=z)
    return Task(question, answer, "compare", "first_number", (y,), f"compare {min(a, b)} {max(a, b)}")


def _make_number(rng: random.Random) -> Task:
    a = _number(rng)
    kind = rng.choice(("parity", "next", "previous") if a > 0 else ("parity", "next"))
    if kind == "parity":
        y = "odd" if a % 2 else "even"
        question = _phrase(rng, rng.choice(PARITY), a=str(a))
        answer = ANSWERS["parity"].format(a=a, y=y)
        return Task(question, answer, "number", "last_word", (y,), f"parity {a}")
    y = str(a + 1 if kind == "next" else a - 1)
    question = _phrase(rng, rng.choice(NEXT if kind == "next" else PREVIOUS), a=str(a))
    answer = ANSWERS[kind].format(a=a, y=y)
    return Task(question, answer, "number", "first_number", (y,), f"{kind} {a}")


def _make_fact(rng: random.Random) -> Task:
    # the larger tables get more of the questions, though less than in proportion
    name = rng.choices(list(RELATIONS), [len(relation.pairs) ** 0.5 for relation in RELATIONS.values()])[0]
    relation = RELATIONS[name]
    x = rng.choice(list(relation.pairs))
    y = relation.pairs[x]
    phrasing_idx = rng.randrange(len(relation.phrasings))
    phrasing = relation.phrasings[phrasing_idx]
    if name == "times":
        a, b = x.split()
        question = _phrase(rng, phrasing, x=a, y=b)
        answer = relation.answer.format(x=a, y=b, z=y)
    else:
        question = _phrase(rng, phrasing, True, x=x)
        answer = relation.answer.format(x=x, X=x[0].upper() + x[1:], y=y)
    return Task(question, answer, "fact", relation.check, (y,), f"fact {name} {x} {phrasing_idx}")


def _make_chat(rng: random.Random) -> Task:
    answer = rng.choice(list(SMALL_TALK))
    expected, wordings = SMALL_TALK[answer]
    question = rng.choice(wordings)
    roll = rng.random()
    question = question.lower() if roll < 0.3 else question.upper() if roll < 0.35 else question
    question += rng.choice(SMALL_TALK_ENDINGS)
    return Task(question, answer, "chat", "phrase", (expected,), f"chat {question}")


def _make_unknown(rng: random.Random) -> Task:
    roll = rng.random()
    if roll < 0.7:
        words: list[str] = []
        while len(words) < 3:
            word = rng.choice(LETTER_WORDS) if rng.random() < 0.6 else _random_word(rng)
            # a word that is known from the facts would make some of these questions answerable
            if word.capitalize() not in CAPITALS and word not in words:
                words.append(word)
        slots = {"word": words[0], "word2": words[1], "word3": words[2], "Word": words[0].capitalize()}
        question = _phrase(rng, rng.choice(UNKNOWN), **slots)
        return Task(question, SORRY, "unknown", "phrase", ("Sorry",), f"word {words[0]}")
    if roll < 0.85:
        a, b = _number(rng, 6), rng.randint(MAX_OPERAND + 1, 999_999)
        if rng.random() < 0.5:
            a, b = b, a
        question = _phrase(rng, rng.choice(TOO_BIG), a=str(a), b=str(b))
        return Task(question, TOO_BIG_ANSWER, "unknown", "phrase", ("Sorry",), f"too big {a} {b}")
    if roll < 0.95:
        a, b = _number(rng), rng.randint(MAX_FACTOR + 1, 999)
        if rng.random() < 0.5:
            a, b = b, a
        question = _phrase(rng, rng.choice(RELATIONS["times"].phrasings), x=str(a), y=str(b))
        return Task(question, TOO_MANY_ANSWER, "unknown", "phrase", ("Sorry",), f"times {a} {b}")
    a, b = _number(rng), _number(rng)
    question = _phrase(rng, rng.choice(DIVIDE), a=str(a), b=str(b))
    return Task(question, DIVIDE_ANSWER, "unknown", "phrase", ("Sorry",), f"divide {a} {b}")


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
_WEIGHTS = [weight for _, weight in _MAKERS.values()]
_WHOLE_WORD_KEYS = frozenset(f"word {word}" for word in _WHOLE_WORDS)


def _training_task(rng: random.Random) -> Task:
    maker = _MAKERS[rng.choices(KINDS, _WEIGHTS)[0]][0]
    while True:
        task = maker(rng)
        if task.content_key in _WHOLE_WORD_KEYS or not is_held_out(task.content_key):
            return task


def _held_out_task(rng: random.Random, kind: str) -> Task:
    maker = _MAKERS[kind][0]
    while True:
        task = maker(rng)
        if task.content_key not in _WHOLE_WORD_KEYS and is_held_out(task.content_key):
            return task


def training_examples(seed: int | str) -> Iterator[Task]:
    """Endless training conversations, the same for the same seed; all their turns are of the training split.

    Two in five have earlier turns, so that a chat's history does not disturb an answer.
    """
    rng = random.Random(f"train {seed}")
    while True:
        num_earlier = rng.choices((0, 1, 2, 3, 4, 5, 6), (60, 24, 8, 4, 2, 1, 1))[0]
        turns = [_training_task(rng) for _ in range(num_earlier + 1)]
        system = rng.choice(SYSTEMS) if rng.random() < 0.12 else None
        yield replace(turns[-1], history=tuple((turn.question, turn.answer) for turn in turns[:-1]), system=system)


def held_out(num: int, seed: int) -> list[Task]:
    """`num` different tasks with held-out content, the kinds in turn.

    One in four has an earlier turn, one in ten a system prompt.
    """
    rng = random.Random(f"held out {seed}")
    tasks: dict[tuple[object, ...], Task] = {}
    while len(tasks) < num:
        task = _held_out_task(rng, KINDS[len(tasks) % len(KINDS)])
        if rng.random() < 0.25:
            earlier = _held_out_task(rng, rng.choice(KINDS))
            task = replace(task, history=((earlier.question, earlier.answer),))
        if rng.random() < 0.1:
            task = replace(task, system=rng.choice(SYSTEMS))
        tasks.setdefault((task.question, task.history, task.system), task)
    return list(tasks.values())
