"""Scenes: what a synthetic image shows, as data.

A scene is a 3 x 3 grid with a few coloured things in it, shapes or digits. Everything that is asked about an image is
computed from the scene, never from pixels, so every label is right by construction. `playground/draw.py` draws it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

COLOURS = ("red", "green", "blue", "yellow", "purple")
SHAPES = ("circle", "square", "triangle", "cross")
DIGITS = tuple("0123456789")
PLACES = (
    "northwest", "north", "northeast",
    "west", "center", "east",
    "southwest", "south", "southeast",
)  # fmt: skip
"""Names of the nine cells, row by row."""


@dataclass(frozen=True, order=True)
class Thing:
    """One coloured shape or digit; `kind` is an entry of `SHAPES` or `DIGITS`."""

    kind: str
    colour: str

    @property
    def is_digit(self) -> bool:
        """True for a digit, False for a shape."""
        return self.kind in DIGITS

    def __str__(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """A grid of nine cells in the order of `PLACES`; None is an empty cell. No thing occurs twice."""

    cells: tuple[Thing | None, ...]

    @property
    def placed(self) -> list[tuple[str, Thing]]:
        """The things with the names of their places, row by row."""
        return [(place, thing) for place, thing in zip(PLACES, self.cells, strict=True) if thing is not None]

    @property
    def things(self) -> list[Thing]:
        """The things, row by row."""
        return [thing for thing in self.cells if thing is not None]

    @property
    def digits(self) -> list[Thing]:
        """The digits among the things."""
        return [thing for thing in self.things if thing.is_digit]

    def unique_kinds(self) -> list[Thing]:
        """Things whose kind occurs once, so that "the circle" names one thing."""
        kinds = [thing.kind for thing in self.things]
        return [thing for thing in self.things if kinds.count(thing.kind) == 1]

    def colour_count(self, colour: str) -> int:
        """How many things have this colour."""
        return sum(thing.colour == colour for thing in self.things)


def random_scene(random: Random) -> Scene:
    """Draw a scene of two to six things, none to three of them digits.

    Colours come from a palette of two to four, because with five free colours most counts by colour would be 0 or 1.
    """
    size = random.randint(2, 6)
    digits = random.randint(0, min(3, size))
    palette = random.sample(COLOURS, random.randint(2, 4))
    # Sampled without replacement: two palette colours and four shapes make eight distinct things, enough for six.
    shapes = random.sample([Thing(kind, colour) for kind in SHAPES for colour in palette], size - digits)
    numbers = [Thing(kind, random.choice(palette)) for kind in random.sample(DIGITS, digits)]
    things = shapes + numbers
    cells: list[Thing | None] = [None] * len(PLACES)
    for cell, thing in zip(random.sample(range(len(PLACES)), size), things, strict=True):
        cells[cell] = thing
    return Scene(tuple(cells))


def distinct_scenes(random: Random) -> Iterator[Scene]:
    """An endless stream of scenes in which none comes twice; splits cut from one stream share no scene."""
    seen: set[Scene] = set()
    while True:
        scene = random_scene(random)
        if scene not in seen:
            seen.add(scene)
            yield scene
