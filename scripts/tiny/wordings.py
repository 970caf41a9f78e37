"""The phrasings of the embedded models' questions and answers, and what they are about.

Slots of phrasings are in braces.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Check = Literal["last_number", "first_number", "numbers", "last_word", "phrase"]

MAX_OPERAND = 999  # addition and subtraction
MAX_FACTOR = 12  # times tables

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
    """A table of facts: `pairs` maps the {x} of phrasings to the {y} that answers must contain."""

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
    "France: Paris, Germany: Berlin, Italy: Rome, Spain: Madrid, Portugal: Lisbon, "
    "England: London, Ireland: Dublin, Scotland: Edinburgh, Norway: Oslo, Sweden: Stockholm, "
    "Finland: Helsinki, Denmark: Copenhagen, Iceland: Reykjavik, Poland: Warsaw, Austria: Vienna, "
    "Hungary: Budapest, Greece: Athens, Belgium: Brussels, Russia: Moscow, Ukraine: Kyiv, "
    "Romania: Bucharest, Bulgaria: Sofia, Croatia: Zagreb, Serbia: Belgrade, Turkey: Ankara, "
    "Egypt: Cairo, Kenya: Nairobi, Nigeria: Abuja, Ghana: Accra, Ethiopia: Addis Ababa, "
    "Morocco: Rabat, China: Beijing, Japan: Tokyo, India: New Delhi, South Korea: Seoul, "
    "Thailand: Bangkok, Vietnam: Hanoi, Indonesia: Jakarta, Iran: Tehran, Iraq: Baghdad, "
    "Nepal: Kathmandu, Pakistan: Islamabad, Australia: Canberra, New Zealand: Wellington, "
    "Canada: Ottawa, Mexico: Mexico City, Cuba: Havana, Peru: Lima, Chile: Santiago, "
    "Argentina: Buenos Aires, Brazil: Brasília, Colombia: Bogotá, the Netherlands: Amsterdam, "
    "the United States: Washington, Switzerland: Bern, the Czech Republic: Prague"
)
COLOURS = _pairs(
    "the sky: blue, grass: green, snow: white, a banana: yellow, a lemon: yellow, blood: red, "
    "coal: black, milk: white, a tomato: red, a carrot: orange, a frog: green, chocolate: brown, "
    "the sea: blue, a raven: black, a strawberry: red, a cucumber: green, a flamingo: pink, "
    "a cherry: red, an elephant: grey, a pumpkin: orange"
)
OPPOSITES = _pairs(
    "hot: cold, big: small, fast: slow, high: low, happy: sad, light: dark, wet: dry, hard: soft, "
    "full: empty, rich: poor, strong: weak, thick: thin, tall: short, young: old, loud: quiet, "
    "early: late, clean: dirty, open: closed, left: right, day: night, win: lose, love: hate, "
    "push: pull, near: far, deep: shallow, brave: afraid, sweet: sour, wide: narrow, sharp: blunt, "
    "true: false, north: south, east: west, summer: winter, inside: outside, above: below, "
    "always: never, buy: sell, give: take, laugh: cry"
)
SOUNDS = _pairs(
    "cow: moo, dog: woof, cat: meow, sheep: baa, duck: quack, pig: oink, horse: neigh, lion: roar, "
    "frog: ribbit, bee: buzz, snake: hiss, owl: hoot, crow: caw, mouse: squeak, "
    "rooster: cock-a-doodle-doo, wolf: howl, chick: cheep, donkey: hee-haw, turkey: gobble"
)
YOUNG = _pairs(
    "dog: puppy, cat: kitten, cow: calf, sheep: lamb, horse: foal, pig: piglet, bear: cub, "
    "goat: kid, duck: duckling, hen: chick, frog: tadpole, deer: fawn, kangaroo: joey, "
    "goose: gosling, swan: cygnet, eagle: eaglet"
)
LEGS = _pairs(
    "dog: 4, cat: 4, spider: 8, ant: 6, bee: 6, hen: 2, horse: 4, snake: 0, octopus: 8, human: 2, "
    "cow: 4, fish: 0"
)
AMOUNTS = _pairs(
    "days are in a week: 7, months are in a year: 12, hours are in a day: 24, "
    "minutes are in an hour: 60, seconds are in a minute: 60, letters are in the alphabet: 26, "
    "days are in a year: 365, sides has a triangle: 3, sides has a square: 4, "
    "cents are in a dollar: 100, seasons are in a year: 4, continents are there: 7"
)
DAYS = _names("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _names(
    "January February March April May June July August September October November December"
)
SMALL_NUMBERS = _names(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
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

MODEL_NAME = "tiny-qwen3"  # in the answers; training another model writes its own name instead
WHO = f"I am {MODEL_NAME}, the model embedded in nanovllm."
ABILITIES = "I can add, subtract, sort, count, compare, spell and reverse, and I know a few facts."
# answer -> (what it must contain, wordings)
SMALL_TALK: dict[str, tuple[str, tuple[str, ...]]] = {
    "Hello! How can I help you?": (
        "Hello",
        (
            "Hello",
            "Hello there",
            "Hi",
            "Hi there",
            "Hey",
            "Good morning",
            "Good evening",
            "Good day",
            "Hello, model",
        ),
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
        "the model embedded in nanovllm",
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
    f"No, I am {MODEL_NAME}, a small language model.": (
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
        (
            "Tell me a joke",
            "Do you know a joke",
            "Make me laugh",
            "Say something funny",
            "Can you tell me a joke",
        ),
    ),
    "You are welcome!": (
        "welcome",
        (
            "Thanks",
            "Thank you",
            "Thank you very much",
            "Thanks a lot",
            "Many thanks",
            "Thanks for your help",
        ),
    ),
    "Goodbye!": (
        "Goodbye",
        ("Bye", "Goodbye", "Bye bye", "See you", "See you later", "Good night", "Have a nice day"),
    ),
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
DIVIDE = (
    "What is {a} / {b}?",
    "{a} / {b}",
    "Divide {a} by {b}.",
    "What is {a} divided by {b}?",
    "{a}/{b}",
)

SYSTEMS = (
    "You are a helpful assistant.",
    "You are tiny-qwen3, a helpful assistant.",
    "You are a friendly assistant. Answer in one short sentence.",
    "Be brief.",
    "Answer the question.",
)
OPENERS = (
    "Hi! ",
    "Hello! ",
    "Hey, ",
    "OK, ",
    "Now, ",
    "Please tell me: ",
    "Quick question: ",
    "Next question: ",
)
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
    *(
        ADD
        + SUBTRACT
        + SORT_UP
        + SORT_DOWN
        + REVERSE
        + SPELL
        + LENGTH
        + LETTER
        + COUNT_UP
        + COUNT_DOWN
    ),
    *(LARGER + SMALLER + LARGEST + SMALLEST + PARITY + NEXT + PREVIOUS),
    *(UNKNOWN + DIVIDE + SYSTEMS + OPENERS + CLOSERS),
    *(
        phrasing
        for relation in RELATIONS.values()
        for phrasing in (*relation.phrasings, relation.answer)
    ),
    *(wording for _, wordings in SMALL_TALK.values() for wording in wordings),
    *(SORRY, TOO_BIG_ANSWER, TOO_MANY_ANSWER, DIVIDE_ANSWER, *SMALL_TALK, *ANSWERS.values()),
    # the chat roles, and the words of slots that have only a few
    "system user assistant once twice times even odd",
)
COMMON_WORDS = frozenset(
    word.lower()
    for phrasing in _PHRASINGS
    for word in re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", " ", phrasing))
)

# What questions are about.

NAMES = _names("Tom Anna Ben Mia Sam Lena Max Eva Leo Nora Ali Yuki")
THINGS = _names("apples books coins cards birds pens eggs toys cakes stones fish balls")

_WORDS = """
lamp lemon tree house river cloud stone bread table chair plant water light paper glass green apple
grape peach melon tiger zebra horse mouse sheep eagle shark whale snake camel rabbit turtle monkey
dragon spider parrot pigeon falcon window garden kitchen bottle butter cheese pepper sugar honey
orange banana cherry carrot potato tomato onion garlic pencil eraser laptop screen keyboard printer
camera mirror pillow blanket carpet candle basket bucket hammer ladder forest desert island valley
canyon meadow volcano glacier ocean beach harbor bridge castle temple palace tower doctor teacher
farmer pilot driver singer dancer writer painter soldier sailor baker butcher plumber captain winter
summer spring autumn thunder lightning rain snow storm breeze sunshine shadow rainbow moon star
planet comet music guitar piano violin trumpet drum flute song melody rhythm concert theater movie
picture statue happy lucky brave clever gentle honest silent quick quiet simple strong tender yellow
purple silver golden jacket sweater trouser shirt glove scarf button pocket zipper ribbon needle
thread cotton velvet leather train bicycle airplane rocket engine wheel tunnel station ticket
journey suitcase compass anchor wagon circle square triangle number letter language computer science
physics history biology algebra school college lesson student library chapter pencilcase notebook
homework puzzle riddle breakfast dinner lunch soup salad pasta pizza burger cookie muffin pancake
waffle chocolate strawberry blueberry raspberry pineapple coconut avocado mushroom broccoli spinach
cabbage lettuce pumpkin zucchini elephant giraffe leopard panther buffalo dolphin penguin octopus
lobster hamster squirrel hedgehog kangaroo crocodile butterfly dragonfly mosquito beetle cricket
ladybug scorpion cat dog sun sky sea ice fire cup pan pot bed box toy car bus van map pen ink key
lid hat cap tie bag egg jam nut pie tea owl fox bee ant cow pig hen rat bat elk yak emu cod eel fin
paw fur leg arm eye ear lip toe bird duck frog goat lion wolf bear deer swan crab crow hawk moth
worm boat ship road park farm barn gate wall roof door desk sofa book coin ring rope nail hook leaf
seed rose lily palm pine corn rice bean cake milk meat salt mountain village hospital museum factory
market office airport stadium theory quantum python rust kernel tensor memory compiler cache graph
token matrix vector python program hello world welcome banana mississippi assessment committee
"""
LETTER_WORDS = tuple(sorted(set(_WORDS.split()) - COMMON_WORDS))
# A tokenizer may hold these words whole: their spelling must then be learnt by heart.
WHOLE_WORDS = tuple(sorted(word for word in COMMON_WORDS if len(word) >= 2))
