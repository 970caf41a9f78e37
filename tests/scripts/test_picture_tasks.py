"""Pictures and questions of the embedded model that sees: they are true, and the split holds."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

# scripts are run as files, and import each other as such
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from tiny.picture_tasks import (
    KINDS,
    PICTURE_KINDS,
    held_out,
    picture_task,
    random_picture,
    text_task,
)
from tiny.picture_wordings import MODEL_NAME
from tiny.pictures import CELL, COLOURS, GRIDS, Picture, Thing, draw, masks
from tiny.pictures import KINDS as THINGS
from tiny.tasks import Task, is_correct, is_held_out


def picture(rows: int, columns: int, *things: tuple[str, str, int, int]) -> Picture:
    """Things as (colour, kind, row, column)."""
    made = tuple(
        Thing(kind, colour, row, column, 24, 4, 4, COLOURS[colour])
        for colour, kind, row, column in things
    )
    return Picture(rows, columns, "white", (245, 245, 245), made)


SCENE = picture(
    *(2, 3),
    ("red", "circle", 0, 0),
    ("blue", "square", 0, 1),
    ("red", "7", 1, 0),
    ("green", "circle", 1, 2),
)


def answers(kind: str, scene: Picture) -> dict[str, str]:
    """The answers to many questions of a kind, by question."""
    rng = random.Random(0)
    tasks = [picture_task(rng, scene, kind) for _ in range(999)]
    return {task.question: task.answer for task in tasks if task is not None}


@pytest.mark.parametrize("grid", GRIDS)
def test_each_thing_is_drawn_in_its_cell_and_colour_and_nothing_else_is(
    grid: tuple[int, int],
) -> None:
    rng = random.Random(3)
    scenes = [random_picture(rng, grid) for _ in range(19)]
    pixels_BHWC = draw(scenes)
    assert pixels_BHWC.shape == (19, grid[0] * CELL, grid[1] * CELL, 3)
    for scene, pixels_HWC in zip(scenes, pixels_BHWC):
        for row in range(grid[0]):
            for column in range(grid[1]):
                y, x = row * CELL, column * CELL
                cell = pixels_HWC[y : y + CELL, x : x + CELL].reshape(-1, 3)
                colours = {tuple(one) for one in cell.tolist()}
                thing = scene.at(row, column)
                assert scene.background_rgb in colours
                assert (len(colours) == 1) == (thing is None)
                if thing is not None:
                    assert thing.rgb in colours


def test_pictures_drawn_together_are_those_drawn_alone() -> None:
    rng = random.Random(5)
    scenes = [random_picture(rng, (3, 2)) for _ in range(19)]
    alone = np.concatenate([draw([one]) for one in scenes])
    np.testing.assert_array_equal(draw(scenes), alone)


def test_kinds_of_things_differ_in_every_size() -> None:
    banks = masks().reshape(len(THINGS), -1, CELL * CELL)
    for i in range(len(THINGS)):
        for j in range(i):
            assert np.abs(banks[i] - banks[j]).sum(-1).min() > 10, (THINGS[i], THINGS[j])


def test_colours_name_the_thing_that_a_question_means() -> None:
    found = answers("colour", SCENE)
    assert found["What colour is the square?"] == "Blue."
    assert found["What colour is the digit?"] == found["What colour is the 7?"] == "Red."
    assert not any("circle" in question for question in found)  # there are two


def test_shapes_and_digits_are_asked_by_colours_that_only_they_have() -> None:
    shapes, digits = answers("shape", SCENE), answers("digit", SCENE)
    assert shapes["Which shape is red?"] == shapes["Which shape is green?"] == "Circle."
    assert shapes["Which shape is blue?"] == "Square."
    assert set(digits.values()) == {"7."}
    twice = replace(SCENE, things=(*SCENE.things, *picture(2, 3, ("red", "star", 1, 1)).things))
    assert not any("red" in question for question in answers("shape", twice))


def test_counts_are_of_the_things_named() -> None:
    found = answers("count", SCENE)
    assert found["How many circles are there?"] == "2."
    assert found["How many red circles are there?"] == "1."
    assert found["How many red things are there?"] == "2."
    assert found["How many things are there?"] == "4."
    assert found["How many crosses are there?"] == "0."


def test_what_is_beside_a_thing_is_in_the_next_cell() -> None:
    found = answers("beside", SCENE)
    assert found["What is left of the square?"] == "A red circle."
    assert found["What is above the 7?"] == "A red circle."
    assert found["What is below the red circle?"] == "A red 7."
    assert found["What is below the square?"] == "Nothing."
    assert found["What is right of the red circle?"] == "A blue square."
    # between the two lies an empty cell: neither answer would be plainly right
    assert "What is right of the 7?" not in found


def test_places_and_descriptions_are_in_the_order_of_reading() -> None:
    assert answers("where", SCENE)["Where is the square?"] == "Top centre."
    assert answers("where", SCENE)["Where is the green circle?"] == "Bottom right."
    expected = "red circle, blue square, nothing; red 7, nothing, green circle."
    assert set(answers("describe", SCENE).values()) == {expected}
    assert set(answers("background", SCENE).values()) == {"White."}


def test_no_training_picture_has_the_content_of_a_held_out_one() -> None:
    rng = random.Random(0)
    keys = {random_picture(rng, rng.choice(GRIDS)).key for _ in range(2000)}
    tests = {one.picture.key for one in held_out(999, 0) if one.picture is not None}
    assert not any(map(is_held_out, keys))
    assert all(map(is_held_out, tests))
    assert keys.isdisjoint(tests)


def test_place_size_and_shade_do_not_change_the_content() -> None:
    first = SCENE.things[0]
    moved = replace(first, size=20, left=1, top=9, rgb=(1, 2, 3))
    other = replace(SCENE, background="black", things=(moved, *SCENE.things[1:]))
    assert other.key == SCENE.key
    assert replace(SCENE, things=SCENE.things[1:]).key != SCENE.key


def test_wordings_of_questions_without_a_picture_are_held_out() -> None:
    rng = random.Random(0)
    trained = {text_task(rng).content_key for _ in range(2000)}
    tested = {text_task(rng, of_test=True).content_key for _ in range(500)}
    assert trained.isdisjoint(tested)


def test_held_out_questions_are_of_all_kinds_and_the_same_for_a_seed() -> None:
    tasks = list(held_out(4 * len(KINDS), 7))
    assert [one.task.kind for one in tasks] == list(KINDS) * 4
    assert tasks == list(held_out(4 * len(KINDS), 7))
    assert tasks != list(held_out(4 * len(KINDS), 8))
    sizes = {one.picture and (one.picture.num_rows, one.picture.num_columns) for one in tasks}
    assert sizes == {None, *GRIDS}


def test_reference_answers_are_correct_and_others_are_not() -> None:
    tasks: list[Task] = [one.task for one in held_out(400, 1)]
    for task, other in zip(tasks, [*tasks[len(KINDS) :], *tasks[: len(KINDS)]]):
        assert is_correct(task, task.answer), task
        if task.answer != other.answer and task.kind in PICTURE_KINDS:
            assert not is_correct(task, other.answer), (task, other)


def test_messages_hold_the_picture_before_the_question() -> None:
    with_picture, *_, without = held_out(len(KINDS), 0)
    (message,) = with_picture.messages
    image, text = message["content"]
    assert with_picture.picture is not None
    np.testing.assert_array_equal(np.asarray(image["image"]), draw([with_picture.picture])[0])
    assert (image["type"], text["text"]) == ("image", with_picture.task.question)
    assert without.messages == [{"role": "user", "content": without.task.question}]


def test_the_model_calls_itself_by_its_own_name() -> None:
    texts = [text_task(random.Random(seed)).answer for seed in range(999)]
    named = {text for text in texts if "tiny-qwen3" in text}
    assert named
    assert all(MODEL_NAME in text for text in named)
