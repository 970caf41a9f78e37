"""Training data of the embedded vision model: conversations about pictures, as tensors.

Step k draws its data from the seed and k alone, so a resumed run gets the same data.

B conversations | S positions | P patches
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
import torch
from tiny.chat_tokenizer import END, PAD, START
from tiny.picture_tasks import picture_task, random_picture, text_task
from tiny.pictures import BACKGROUNDS, GRIDS, Picture, draw
from tiny.tasks import Task
from tiny.vision_model import (
    IMAGE,
    MERGE,
    PATCH_SETTINGS,
    VISION_END,
    VISION_START,
    build_tokenizer,
)
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from nanovllm.media.patches import grid_of, image_patches, num_tokens
from nanovllm.models.vision.positions import Item, mrope_positions

IGNORED = -100  # the label of tokens outside answers


@dataclass(frozen=True)
class Plan:
    """What determines a training run. A resumed run must have the same plan."""

    steps: int
    batch: int  # conversations of a step
    turns: int  # questions of a conversation
    seed: int
    learning_rate: float


class Turn(NamedTuple):
    """A question with its answer. `picture`: is shown in this turn, before or after the text."""

    task: Task
    picture: Picture | None = None
    text_first: bool = False


class Batch(NamedTuple):
    input_BS: Tensor
    label_BS: Tensor
    position_3BS: Tensor
    patch_PD: Tensor | None  # None: no pictures
    grid_B3: Tensor | None


class Level(NamedTuple):
    """The kinds of questions of a step, and the difficulty of its pictures."""

    grids: Sequence[tuple[int, int]] = GRIDS
    max_things: int | None = None
    backgrounds: Sequence[str] = tuple(BACKGROUNDS)
    describes: float = 0.3  # the share of conversations that begin with a description
    turns: int | None = None  # None: as many as planned
    pictures: int = 1  # times as many as planned


def level_at(progress: float) -> Level:
    """First only descriptions: they have the most information about a picture and are short, so
    that a step can have more of them. On white, all colours are darker than the background, which
    makes shapes easier to find. Then questions of all kinds."""
    if progress < 0.03:
        return Level(GRIDS[:1], 3, ("white",), describes=1.0, turns=1, pictures=4)
    if progress < 0.15:
        return Level(backgrounds=("white",), describes=1.0, turns=1, pictures=3)
    if progress < 0.25:
        return Level(describes=1.0, turns=1, pictures=3)
    return Level()


def make_conversation(
    rng: random.Random, grid: tuple[int, int], level: Level, turns: int
) -> list[Turn]:
    """Questions about one picture; one in twenty has no picture."""
    picture = random_picture(rng, grid, max_things=level.max_things, backgrounds=level.backgrounds)
    found: list[Turn] = []
    asked: set[str] = set()
    while len(found) < turns:
        kind = "describe" if not found and rng.random() < level.describes else None
        task = picture_task(rng, picture, kind)
        if found and rng.random() < 0.05:
            task = text_task(rng)
        if task is None or task.question in asked:
            # a picture with few things does not allow many questions
            asked.discard(rng.choice(sorted(asked)) if asked else "")
            continue
        asked.add(task.question)
        found.append(Turn(task) if found else Turn(task, picture, rng.random() < 0.15))
    return found


class Encoder:
    """Conversations to token ids. Pieces of text are encoded once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.pad_id = tokenizer.get_vocab()[PAD]
        self._encode = lru_cache(maxsize=100_000)(
            lambda text: tuple(tokenizer.encode(text, add_special_tokens=False))
        )

    def turn(self, turn: Turn, num_image_tokens: int) -> tuple[list[int], list[int], int]:
        """(token ids, labels, index of the first image token) of a turn; labels are IGNORED except
        for the answer."""
        head, tail = f"{START}user\n", f"{turn.task.question}{END}\n{START}assistant\n"
        before, image_at = self._encode(head), -1
        if turn.picture is not None:
            picture = (
                *self._encode(VISION_START),
                *(self._encode(IMAGE) * num_image_tokens),
                *self._encode(VISION_END),
            )
            if turn.text_first:
                before += self._encode(turn.task.question)
                tail = f"{END}\n{START}assistant\n"
            image_at = len(before) + 1
            before += picture
        question = [*before, *self._encode(tail)]
        answer = [*self._encode(turn.task.answer), *self._encode(END)]
        newline = list(self._encode("\n"))
        labels = [IGNORED] * len(question) + answer + [IGNORED] * len(newline)
        return question + answer + newline, labels, image_at


def encode(encoder: Encoder, conversations: Sequence[Sequence[Turn]]) -> Batch:
    """A batch of conversations whose pictures, if any, have the same grid."""
    pictures = [turn.picture for turns in conversations for turn in turns if turn.picture]
    patches = grids = None
    per_image, sides = 0, (0, 0)
    if pictures:
        pixels = draw(pictures)
        grid = grid_of(2, *pixels.shape[1:3], PATCH_SETTINGS)
        per_image = num_tokens(grid, PATCH_SETTINGS)
        sides = grid[1] // MERGE, grid[2] // MERGE
        patches = torch.from_numpy(
            np.concatenate([image_patches(one, PATCH_SETTINGS) for one in pixels])
        )
        grids = torch.tensor([grid] * len(pictures))
    ids, labels, positions = [], [], []
    for turns in conversations:
        row_ids: list[int] = []
        row_labels: list[int] = []
        items = []
        for turn in turns:
            added, added_labels, image_at = encoder.turn(turn, per_image)
            if turn.picture is not None:
                items.append(Item(len(row_ids) + image_at, 1, *sides))
            row_ids += added
            row_labels += added_labels
        ids.append(row_ids)
        labels.append(row_labels)
        positions.append(mrope_positions(len(row_ids), items)[0])
    longest = max(map(len, ids))
    input_BS = np.full((len(ids), longest), encoder.pad_id, np.int64)
    label_BS = np.full((len(ids), longest), IGNORED, np.int64)
    position_3BS = np.zeros((3, len(ids), longest), np.int64)
    for b, row_ids in enumerate(ids):
        input_BS[b, : len(row_ids)] = row_ids
        label_BS[b, : len(row_ids)] = labels[b]
        position_3BS[:, b, : len(row_ids)] = positions[b]
    tensors = map(torch.from_numpy, (input_BS, label_BS, position_3BS))
    return Batch(*tensors, patches, grids)


def draw_batch(plan: Plan, step: int, encoder: Encoder) -> Batch:
    """The data of a step. One in twenty has no pictures."""
    rng = random.Random(f"train pictures {plan.seed} {step}")
    if step % 20 == 19:
        return encode(
            encoder, [[Turn(text_task(rng)) for _ in range(plan.turns)] for _ in range(plan.batch)]
        )
    level = level_at(step / plan.steps)
    grid, turns = rng.choice(level.grids), level.turns or plan.turns
    num = plan.batch * level.pictures
    return encode(encoder, [make_conversation(rng, grid, level, turns) for _ in range(num)])


Arrays = tuple["np.ndarray[Any, Any] | None", ...]
_encoders: list[Encoder] = []  # of a worker process


def batches(plan: Plan, encoder: Encoder, first: int, workers: int) -> Iterator[Batch]:
    """The data of the steps from `first` on, drawn by `workers` processes; 1 is this process."""
    steps = range(first, plan.steps)
    if workers == 1:
        yield from (draw_batch(plan, step, encoder) for step in steps)
        return
    spawn = get_context("spawn")  # a forked process could not use the GPU, and must not inherit it
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_begin_worker) as pool:
        waiting: deque[Future[Arrays]] = deque()
        for step in steps:
            while len(waiting) < 4 * workers and step + len(waiting) < plan.steps:
                waiting.append(pool.submit(_draw_arrays, plan, step + len(waiting)))
            arrays = waiting.popleft().result()
            yield Batch(*(None if one is None else torch.from_numpy(one) for one in arrays))


def _begin_worker() -> None:
    torch.set_num_threads(1)
    _encoders.append(Encoder(build_tokenizer()))


def _draw_arrays(plan: Plan, step: int) -> Arrays:
    batch = draw_batch(plan, step, _encoders[0])
    return tuple(None if one is None else one.numpy() for one in batch)
