"""Pictures for the embedded vision model: shapes and digits on a grid of cells.

B pictures | M things of all pictures | H, W pixels | S = CELL pixels of a cell's side
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Pixels = npt.NDArray[np.uint8]
CELL = 32
SIZES = range(20, 29, 2)  # pixels of a thing's side
SHAPES = ("circle", "square", "triangle", "cross", "star")
DIGITS = tuple("0123456789")
KINDS = SHAPES + DIGITS
COLOURS = {
    "red": (220, 30, 30),
    "orange": (250, 140, 20),
    "yellow": (245, 225, 40),
    "green": (30, 160, 50),
    "blue": (40, 70, 220),
    "purple": (140, 40, 170),
    "pink": (250, 150, 190),
}
BACKGROUNDS = {"white": (245, 245, 245), "grey": (128, 128, 128), "black": (15, 15, 15)}
GRIDS = ((2, 2), (2, 3), (3, 2), (3, 3))  # rows and columns of cells
JITTER = 10  # levels of 255 by which a colour varies
_FINE = 4  # masks are drawn this many times larger, for smooth edges


@dataclass(frozen=True)
class Thing:
    """A shape or a digit in one cell. `size`, `left` and `top` are pixels within the cell."""

    kind: str
    colour: str
    row: int
    column: int
    size: int
    left: int
    top: int
    rgb: tuple[int, int, int]

    @property
    def is_digit(self) -> bool:
        return self.kind in DIGITS


@dataclass(frozen=True)
class Picture:
    """`num_rows` times `num_columns` cells, each empty or with one thing."""

    num_rows: int
    num_columns: int
    background: str
    background_rgb: tuple[int, int, int]
    things: tuple[Thing, ...]  # by row and column

    @property
    def key(self) -> str:
        """The content of each cell, without the positions within cells, sizes and shades."""
        listed = [f"{one.colour} {one.kind} {one.row} {one.column}" for one in self.things]
        return f"picture {self.num_rows} {self.num_columns} " + ", ".join(listed)

    def at(self, row: int, column: int) -> Thing | None:
        return next((one for one in self.things if (one.row, one.column) == (row, column)), None)


def compose(
    rng: random.Random,
    grid: tuple[int, int],
    max_things: int | None = None,
    backgrounds: Sequence[str] = tuple(BACKGROUNDS),
) -> Picture:
    """A random picture. One in three has few kinds and colours, so that there is much to count."""
    num_rows, num_columns = grid
    num_cells = num_rows * num_columns
    most = min(num_cells, max_things or num_cells)
    num_things = rng.randint(1, most)
    if rng.random() < 0.3:
        num_things = min(num_things, 2)
    few = rng.random() < 0.35
    kinds = rng.sample(SHAPES, 2) if few else [*SHAPES, rng.choice(DIGITS), rng.choice(DIGITS)]
    colours = rng.sample(list(COLOURS), 2) if few else list(COLOURS)
    cells = sorted(rng.sample(range(num_cells), num_things))
    background = rng.choice(backgrounds)
    things = tuple(
        _thing(rng, rng.choice(kinds), rng.choice(colours), divmod(cell, num_columns))
        for cell in cells
    )
    return Picture(num_rows, num_columns, background, _shade(rng, BACKGROUNDS[background]), things)


def _thing(rng: random.Random, kind: str, colour: str, cell: tuple[int, int]) -> Thing:
    size = rng.choice(SIZES)
    left, top = rng.randint(1, CELL - size - 1), rng.randint(1, CELL - size - 1)
    return Thing(kind, colour, *cell, size, left, top, _shade(rng, COLOURS[colour]))


def _shade(rng: random.Random, rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, one + rng.randint(-JITTER, JITTER))) for one in rgb)
    return red, green, blue


def draw(pictures: Sequence[Picture]) -> Pixels:
    """[B, H, W, 3] of pictures with the same grid."""
    first = pictures[0]
    rows, columns = first.num_rows, first.num_columns
    assert all((one.num_rows, one.num_columns) == (rows, columns) for one in pictures)
    ground_BC = np.array([one.background_rgb for one in pictures], np.float32)
    canvas = np.empty((len(pictures), rows, CELL, columns, CELL, 3), np.float32)
    canvas[:] = ground_BC[:, None, None, None, None]
    all_things = [(b, thing) for b, one in enumerate(pictures) for thing in one.things]
    where_M3 = np.array([(b, one.row, one.column) for b, one in all_things]).reshape(-1, 3)
    mask_MSS1 = _cells([one for _, one in all_things])[..., None]
    colour_M3 = np.array([one.rgb for _, one in all_things], np.float32).reshape(-1, 1, 1, 3)
    b_M, row_M, column_M = where_M3.T
    ground_M3 = ground_BC[b_M][:, None, None]
    canvas[b_M, row_M, :, column_M] = ground_M3 + mask_MSS1 * (colour_M3 - ground_M3)
    pixels = canvas.reshape(len(pictures), rows * CELL, columns * CELL, 3)
    return np.rint(pixels).astype(np.uint8)


def _cells(things: Sequence[Thing]) -> npt.NDArray[np.float32]:
    """[M, S, S]: the masks of things, each moved to its place in its cell.

    A mask has zeros beside its thing, so moving it is a rotation of rows and columns.
    """
    banks = masks()
    which = np.array([(KINDS.index(one.kind), SIZES.index(one.size)) for one in things])
    mask_MSS = banks[which[:, 0], which[:, 1]]
    at_S = np.arange(CELL)
    row_MS = (at_S - np.array([one.top for one in things])[:, None]) % CELL
    column_MS = (at_S - np.array([one.left for one in things])[:, None]) % CELL
    return mask_MSS[np.arange(len(things))[:, None, None], row_MS[:, :, None], column_MS[:, None]]


@lru_cache(maxsize=1)
def masks() -> npt.NDArray[np.float32]:
    """[kinds, sizes, S, S], 0 to 1: each kind in each size, at the top left of its cell."""
    banks = np.zeros((len(KINDS), len(SIZES), CELL, CELL), np.float32)
    for i, kind in enumerate(KINDS):
        for j, size in enumerate(SIZES):
            fine = _digit(kind, size) if kind in DIGITS else _shape(kind, size * _FINE)
            mask = fine.resize((size, size), Image.Resampling.BOX)
            banks[i, j, :size, :size] = np.asarray(mask, np.float32) / 255
    return banks


def _shape(kind: str, side: int) -> Image.Image:
    image = Image.new("L", (side, side))
    pen = ImageDraw.Draw(image)
    end = side - 1
    if kind == "circle":
        pen.ellipse((0, 0, end, end), fill=255)
    elif kind == "square":
        pen.rectangle((side // 12, side // 12, end - side // 12, end - side // 12), fill=255)
    elif kind == "triangle":
        pen.polygon([(side // 2, 0), (end, end), (0, end)], fill=255)
    elif kind == "cross":
        third = side // 3
        pen.rectangle((third, 0, end - third, end), fill=255)
        pen.rectangle((0, third, end, end - third), fill=255)
    else:
        pen.polygon(_star(side), fill=255)
    return image


def _star(side: int) -> list[tuple[float, float]]:
    angles = np.pi * (np.arange(10) / 5 - 0.5)
    radius = np.where(np.arange(10) % 2, 0.21, 0.52) * side
    return list(zip(side / 2 + radius * np.cos(angles), side * 0.54 + radius * np.sin(angles)))


def _digit(kind: str, size: int) -> Image.Image:
    """A digit in Pillow's own font, as high as the square and two thirds as wide."""
    font = ImageFont.load_default(size * _FINE)
    drawn = Image.new("L", (2 * size * _FINE, 2 * size * _FINE))
    ImageDraw.Draw(drawn).text((size, size), kind, fill=255, font=font, stroke_width=size // 6)
    width, height = size * _FINE * 2 // 3, size * _FINE
    glyph = drawn.crop(drawn.getbbox()).resize((width, height), Image.Resampling.BOX)
    image = Image.new("L", (height, height))
    image.paste(glyph, ((height - width) // 2, 0))
    return image
