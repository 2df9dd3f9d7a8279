"""Generated scenes whose content is known: objects of a shape, colour, texture and size on a background.

A scene is drawn from a generator of its own, so that scene n of a seed is the same in whatever order
scenes are asked for. Objects stand nearly on a grid and never overlap; specks and lines that no caption names lie behind them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from saeflow.sources.base import generator

SIDE = 64
"""Pixels of a scene's side."""
SHAPES = ("circle", "square", "triangle", "ring", "cross")
COLOURS = {
    "red": (214, 39, 40), "green": (44, 140, 50), "blue": (38, 84, 210), "yellow": (240, 214, 40),
    "purple": (135, 60, 170), "orange": (245, 130, 25), "cyan": (60, 200, 215),
}  # fmt: skip
BACKGROUNDS = {"black": (18, 18, 20), "grey": (128, 128, 128), "white": (236, 236, 232)}
TEXTURES = ("plain", "striped", "dotted")
SIZES = {"small": (6.2, 7.2), "large": (12.5, 14.5)}
"""Radius in pixels, from and to; a small object has a cell of its own, a large one two by two."""
CLASSES = [
    f"{size} {colour} object on a {ground} background"
    for size in SIZES
    for colour in COLOURS
    for ground in BACKGROUNDS
]
"""Names of classes: what a scene's largest object is, and on what."""
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
TOLD = 3
"""A caption names at most so many objects, as people do."""

_CELL = 16  # pixels
_JITTER = 1.0  # pixels
_ANGLE = 0.12  # radians
_SPECKS = 4
_STREAMS = {"scene": 0, "caption": 1}
_Y, _X = np.mgrid[0:SIDE, 0:SIDE] + 0.5


@dataclass(frozen=True)
class Thing:
    """One object; lengths in pixels, the angle in radians."""

    shape: str
    colour: str
    texture: str
    size: str
    x: float
    y: float
    radius: float
    angle: float

    @property
    def place(self) -> str:
        """Return the ninth of the scene that it is in, such as `top left`."""
        row = ("top", "", "bottom")[min(2, int(3 * self.y / SIDE))]
        column = ("left", "", "right")[min(2, int(3 * self.x / SIDE))]
        return f"{row} {column}".strip() or "centre"


@dataclass(frozen=True)
class Scene:
    """Content of one scene; `things` from the largest to the smallest."""

    background: str
    things: tuple[Thing, ...]
    specks: np.ndarray  # (n, 7) x0, y0, x1, y1, r, g, b

    @property
    def label(self) -> int:
        """Class of the largest object; -1 where there is none."""
        return self.label_of(self.things[0]) if self.things else -1

    def label_of(self, thing: Thing) -> int:
        """Class of one of its objects."""
        return CLASSES.index(
            f"{thing.size} {thing.colour} object on a {self.background} background"
        )


def draw_scene(params: Mapping[str, Any], number: int) -> Scene:
    """Scene `number` of {seed, smallest, largest}: so many objects, uniformly."""
    rng = generator(params["seed"], _STREAMS["scene"], number)
    count = int(rng.integers(params["smallest"], params["largest"] + 1))
    things: list[Thing] = []
    free = np.ones((SIDE // _CELL, SIDE // _CELL), bool)
    while len(things) < count:
        thing = _place(free, rng)
        if thing is None:  # too crowded: begin again
            things = []
            free[:] = True
        else:
            things.append(thing)
    specks = np.concatenate(
        [rng.uniform(0, SIDE, (_SPECKS, 2)), rng.uniform(-9, 9, (_SPECKS, 2)), rng.uniform(40, 215, (_SPECKS, 3))],
        axis=1,
    )  # fmt: skip
    specks[:, 2:4] += specks[:, :2]
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    return Scene(background, tuple(sorted(things, key=lambda thing: -thing.radius)), specks)


def _place(free: np.ndarray, rng: np.random.Generator) -> Thing | None:
    """An object on free cells, which it takes; None where none of its size is left."""
    size = list(SIZES)[rng.integers(len(SIZES))]
    wide = 1 if size == "small" else 2
    fits = np.argwhere(sliding_window_view(free, (wide, wide)).all(axis=(2, 3)))
    if not len(fits):
        return None
    row, column = fits[rng.integers(len(fits))].tolist()
    free[row : row + wide, column : column + wide] = False
    x, y = (
        _CELL * (corner + wide / 2) + rng.uniform(-_JITTER, _JITTER) for corner in (column, row)
    )
    return Thing(
        shape=SHAPES[rng.integers(len(SHAPES))],
        colour=list(COLOURS)[rng.integers(len(COLOURS))],
        texture=TEXTURES[rng.integers(len(TEXTURES))],
        size=size,
        x=x,
        y=y,
        radius=float(rng.uniform(*SIZES[size])),
        angle=float(rng.uniform(-_ANGLE, _ANGLE)),
    )


def render(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The scene's picture and what is where.

    Returns:
        (SIDE, SIDE, 3) uint8, edges smoothed over one pixel, and (SIDE, SIDE) int8, the number of the
        object that covers at least half of each pixel, -1 where none does.
    """
    picture = np.broadcast_to(
        np.array(BACKGROUNDS[scene.background], float), (SIDE, SIDE, 3)
    ).copy()
    for x0, y0, x1, y1, *colour in scene.specks:
        _paint(picture, 0.7 * _coverage(_to_segment(x0, y0, x1, y1) - 0.6), np.array(colour))
    owner = np.full((SIDE, SIDE), -1, np.int8)
    for number, thing in enumerate(scene.things):
        low_x, high_x = _window(thing.x, thing.radius)
        low_y, high_y = _window(thing.y, thing.radius)
        part = np.s_[low_y:high_y, low_x:high_x]
        cos, sin = np.cos(thing.angle), np.sin(thing.angle)
        dx, dy = _X[part] - thing.x, _Y[part] - thing.y
        u, v = cos * dx + sin * dy, cos * dy - sin * dx
        cover = _coverage(_DISTANCES[thing.shape](u, v, thing.radius))
        colour = np.array(COLOURS[thing.colour], float)
        _paint(picture[part], cover, colour * _shade(thing, u, v)[..., None])
        owner[part][cover >= 0.5] = number
    return picture.round().clip(0, 255).astype(np.uint8), owner


def _window(centre: float, radius: float) -> tuple[int, int]:
    return max(0, int(centre - radius - 2)), min(SIDE, int(centre + radius + 3))


def _coverage(distance: np.ndarray) -> np.ndarray:
    """Share of a pixel inside an outline, from the distance to it (negative inside)."""
    return np.clip(0.5 - distance, 0, 1)


def _paint(picture: np.ndarray, cover: np.ndarray, colour: np.ndarray) -> None:
    picture += cover[..., None] * (colour - picture)


def _shade(thing: Thing, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Brightness of a texture at each pixel of an object."""
    if thing.texture == "striped":
        return np.where((u + v) % 5 < 2.5, 1.0, 0.45)
    if thing.texture == "dotted":
        return np.where(((u % 5 - 2.5) ** 2 + (v % 5 - 2.5) ** 2) < 2.6, 0.35, 1.0)
    return np.ones_like(u)


def _to_segment(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    length = (x1 - x0) ** 2 + (y1 - y0) ** 2 + 1e-9
    t = np.clip(((_X - x0) * (x1 - x0) + (_Y - y0) * (y1 - y0)) / length, 0, 1)
    distance: np.ndarray = np.hypot(_X - x0 - t * (x1 - x0), _Y - y0 - t * (y1 - y0))
    return distance


# Distances to outlines of radius r around the origin, negative inside; y points down.


def _circle(u: np.ndarray, v: np.ndarray, r: float) -> np.ndarray:
    distance: np.ndarray = np.hypot(u, v) - r
    return distance


def _box(u: np.ndarray, v: np.ndarray, half_u: float, half_v: float) -> np.ndarray:
    distance: np.ndarray = np.maximum(np.abs(u) - half_u, np.abs(v) - half_v)
    return distance


def _square(u: np.ndarray, v: np.ndarray, r: float) -> np.ndarray:
    return _box(u, v, 0.8 * r, 0.8 * r)


def _triangle(u: np.ndarray, v: np.ndarray, r: float) -> np.ndarray:
    height = 0.5 * r
    sides = [v - height, *(s * np.sqrt(0.75) * u - 0.5 * v - height for s in (-1, 1))]
    distance: np.ndarray = np.maximum.reduce(sides)
    return distance


def _ring(u: np.ndarray, v: np.ndarray, r: float) -> np.ndarray:
    distance: np.ndarray = np.abs(np.hypot(u, v) - 0.76 * r) - 0.24 * r
    return distance


def _cross(u: np.ndarray, v: np.ndarray, r: float) -> np.ndarray:
    distance: np.ndarray = np.minimum(_box(u, v, 0.95 * r, 0.3 * r), _box(u, v, 0.3 * r, 0.95 * r))
    return distance


_DISTANCES = {
    "circle": _circle, "square": _square, "triangle": _triangle, "ring": _ring, "cross": _cross,
}  # fmt: skip


def caption(scene: Scene, params: Mapping[str, Any], number: int) -> str:
    """A sentence about a scene: how many objects, and what some of them are."""
    rng = generator(params["seed"], _STREAMS["caption"], number)
    count = len(scene.things)
    things = [scene.things[i] for i in rng.permutation(count)[:TOLD]]
    told = [_describe(thing, rng) for thing in things]
    ground = f" on a {scene.background} background" if rng.random() < 0.5 else ""
    if count == 1 and rng.random() < 0.7:
        return f"a {'photo' if rng.random() < 0.5 else 'picture'} of {told[0]}{ground}"
    noun = "object" if count == 1 else "objects"
    head = f"a {'photo' if rng.random() < 0.5 else 'picture'} of {NUMBERS[count]} {noun}{ground}"
    return ", ".join([head, *told])


def _describe(thing: Thing, rng: np.random.Generator) -> str:
    words = [thing.colour, thing.shape if rng.random() < 0.6 else "object"]
    if rng.random() < 0.4:
        words.insert(0, thing.texture)
    if rng.random() < 0.6:
        words.insert(0, thing.size)
    place = f" at the {thing.place}" if rng.random() < 0.25 else ""
    article = "an" if words[0][0] in "aeiou" else "a"
    return f"{article} {' '.join(words)}{place}"


def scenes(params: Mapping[str, Any]) -> Iterator[Scene]:
    """All scenes of a seed, without end."""
    number = 0
    while True:
        yield draw_scene(params, number)
        number += 1
