"""The split, the checks and the determinism of the generated tasks; the embedded tokenizers."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import islice, pairwise
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanovllm.hub import EMBEDDED, resolve

# scripts are run as files, and import each other as such
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from tiny.architectures import MODEL_NAMES
from tiny.tasks import KINDS, Task, held_out, is_correct, is_held_out, training_examples
from tiny.wordings import COMMON_WORDS, LETTER_WORDS, RELATIONS

ROOT = Path(__file__).resolve().parents[2]
NUM_TRAINING = 20_000


@pytest.fixture(scope="module")
def training() -> list[Task]:
    return list(islice(training_examples(seed=3), NUM_TRAINING))


def _turns(task: Task) -> list[str]:
    return [question for question, _ in task.history] + [task.question]


def test_splits_never_share_a_content(training: list[Task]) -> None:
    trained_keys = {task.content_key for task in training}
    assert trained_keys.isdisjoint(task.content_key for task in held_out(989, seed=3))


def test_splits_never_share_a_question(training: list[Task]) -> None:
    trained = {question for task in training for question in _turns(task)}
    assert trained.isdisjoint(
        question for task in held_out(989, seed=4) for question in _turns(task)
    )


def test_held_out_sums_occur_in_no_phrasing_and_no_turn(training: list[Task]) -> None:
    # independent of the content keys: the operands are read back from the answers
    answers = [
        answer
        for task in training
        for answer in [*(answer for _, answer in task.history), task.answer]
    ]
    sums = [re.fullmatch(r"(\d+) \+ (\d+) = \d+\.", answer) for answer in answers]
    trained = {frozenset(match.groups()) for match in sums if match}
    asked = [
        re.match(r"(\d+) \+ (\d+) =", task.answer)
        for task in held_out(989, seed=5)
        if task.kind == "add"
    ]
    assert asked
    assert all(match and frozenset(match.groups()) not in trained for match in asked)


def test_held_out_words_occur_in_no_letter_task(training: list[Task]) -> None:
    held_out_words = {word for word in LETTER_WORDS if is_held_out(f"word {word}")}
    assert held_out_words
    letter_kinds = {"reverse", "spell", "length", "letter"}
    for task in training:
        if task.kind in letter_kinds:
            assert held_out_words.isdisjoint(re.findall(r"[a-z]+", task.question.lower())), (
                task.question
            )


def test_every_fact_is_trained_in_some_phrasing() -> None:
    for name, relation in RELATIONS.items():
        for x in relation.pairs:
            keys = [
                f"fact {name} {x} {phrasing_idx}" for phrasing_idx in range(len(relation.phrasings))
            ]
            assert not all(map(is_held_out, keys)), (name, x)


@pytest.mark.parametrize("num", [1, 19, 99, 989])
def test_held_out_has_the_number_asked_for_and_kinds_in_turn(num: int) -> None:
    tasks = held_out(num, seed=0)
    assert [task.kind for task in tasks] == [KINDS[idx % len(KINDS)] for idx in range(num)]
    assert len({(task.question, task.history, task.system) for task in tasks}) == num


def test_examples_are_deterministic_and_differ_between_seeds() -> None:
    first, again, other = (list(islice(training_examples(seed), 99)) for seed in (0, 0, 1))
    assert first == again != other
    assert held_out(99, seed=0) == held_out(99, seed=0) != held_out(99, seed=1)


def test_examples_are_the_same_in_another_process() -> None:
    # str hashes differ between processes, and must not reach the data
    shown = "[t.question for t in held_out(99, 0)], next(training_examples(0)).messages"
    code = f"from tiny.tasks import *; print({shown})"
    command = [sys.executable, "-c", code]
    outputs = {
        subprocess.run(command, cwd=ROOT / "scripts", capture_output=True, check=True).stdout
        for _ in range(2)
    }
    expected = (
        f"{[task.question for task in held_out(99, 0)]} {next(training_examples(0)).messages}\n"
    )
    assert outputs == {expected.encode()}


def test_reference_answers_are_correct(training: list[Task]) -> None:
    for task in [*training, *held_out(989, seed=0)]:
        assert is_correct(task, task.answer), task


def test_answers_to_other_questions_are_rejected() -> None:
    # each task against an answer of the same kind that expects something else
    num_compared = 0
    tasks = held_out(989, seed=0)
    for kind in KINDS:
        same_kind = [task for task in tasks if task.kind == kind]
        for task, other in pairwise(same_kind):
            if task.expected != other.expected and kind != "chat":
                assert not is_correct(task, other.answer), (task, other.answer)
                num_compared += 1
    assert num_compared > 500


@pytest.mark.parametrize(
    ("kind", "check", "expected", "right", "wrong"),
    [
        (
            "add",
            "last_number",
            ("82",),
            ["82", "37 + 45 = 82."],
            ["37 + 45 = 83.", "82 + 1 = 83", "820", "", "182"],
        ),
        (
            "subtract",
            "last_number",
            ("-8",),
            ["12 - 20 = -8.", "-8"],
            ["12 - 20 = 8.", "-80", "-18"],
        ),
        (
            "sort",
            "numbers",
            ("2", "7", "9"),
            ["Sorted: 2, 7, 9."],
            ["2, 9, 7", "2, 7", "2, 7, 9, 9", "27 9"],
        ),
        (
            "reverse",
            "last_word",
            ("pmal",),
            ["lamp reversed is pmal.", "pmal"],
            ["lamp", "pmla", "pmall", "Pmal"],
        ),
        (
            "spell",
            "phrase",
            ("l-a-m-p",),
            ["lamp is spelled l-a-m-p."],
            ["l-a-m", "l-a-m-p-s", "l-m-a-p", "a-l-a-m-p"],
        ),
        (
            "compare",
            "first_number",
            ("45",),
            ["45 is larger than 37."],
            ["37 is larger than 45.", "450", ""],
        ),
        (
            "fact",
            "phrase",
            ("Bogotá",),
            ["The capital of Colombia is Bogotá."],
            ["Bogota", "Bogot", "bogotá"],
        ),
    ],
)
def test_is_correct_accepts_other_wordings_and_rejects_wrong_answers(
    kind: str, check: str, expected: tuple[str, ...], right: list[str], wrong: list[str]
) -> None:
    task = Task("?", right[0], kind, check, expected, "key")  # type: ignore[arg-type]
    assert all(is_correct(task, text) for text in right)
    assert not any(is_correct(task, text) for text in wrong)


def test_messages_keep_the_order_of_the_conversation() -> None:
    task = Task("q2", "a2", "chat", "phrase", ("a2",), "key", history=(("q1", "a1"),), system="s")
    assert [(message["role"], message["content"]) for message in task.messages] == [
        ("system", "s"),
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "q2"),
    ]


def test_words_to_spell_are_no_words_of_the_phrasings() -> None:
    assert COMMON_WORDS.isdisjoint(LETTER_WORDS)


@pytest.fixture(scope="module", params=EMBEDDED)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(resolve(request.param))


@pytest.mark.parametrize("name", MODEL_NAMES.values())
def test_tokenizer_splits_digits_and_letters_of_content(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve(name))
    for word in LETTER_WORDS:
        for text in (f" {word}", f'"{word}', f"'{word}", f" {word.capitalize()}"):
            assert len(tokenizer.encode(text)) == len(text)
    assert [tokenizer.decode([token]) for token in tokenizer.encode("1989")] == ["1", "9", "8", "9"]


def test_tokenizer_encodes_any_text(tokenizer: PreTrainedTokenizerBase) -> None:
    every_plane = "".join(
        chr(code) for code in range(0, 0x110000, 97) if not 0xD800 <= code <= 0xDFFF
    )
    for text in ("héllo 🌍 日本 \t x\n\n y  z", "  What's  37+45 ?", "\r\n\x00", every_plane):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_template_ends_with_the_assistants_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert len(tokenizer.encode("<|im_start|><|im_end|><|endoftext|>")) == 3
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_model_stays_small(name: str) -> None:
    assert sum(path.stat().st_size for path in resolve(name).iterdir()) < 8_000_000
