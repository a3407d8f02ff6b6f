"""Task families: how each kind of question is worded and what its answer is.

The base is trained on `BASE_FAMILIES`. `NEW_FAMILIES` are kept for fine-tuning: their question forms never occur in the
base's data, while what they ask about (colours, shapes, places, digits) does. Answers are one or two words, so that an
exact match is a fair score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import perm
from random import Random

from playground.scenes import COLOURS, DIGITS, PLACES, SHAPES, Scene, Thing


@dataclass(frozen=True)
class Question:
    """A question with its one right answer."""

    family: str
    text: str
    answer: str


Asked = tuple[str, str] | None
"""Question text and answer; None if the question does not fit the scene."""


@dataclass(frozen=True)
class ImageFamily:
    """Questions about an image; `ask` draws one for a scene, or None if none fits."""

    name: str
    ask: Callable[[Scene, Random], Asked]


@dataclass(frozen=True)
class TextFamily:
    """Questions without an image; `ask` draws one of `distinct` different ones, all equally likely."""

    name: str
    ask: Callable[[Random], tuple[str, str]]
    distinct: int


def caption(scene: Scene, random: Random) -> str:
    """The things in random order, all in one of four forms, for example "north red circle, west blue 7".

    Two forms begin with the place and two with the kind, so that both ways of looking are learnt: what is there, and
    where is that. The latter two leave out kinds that occur more than once.
    """
    unique = [(place, thing) for place, thing in scene.placed if thing in scene.unique_kinds()]
    by_kind = bool(unique) and random.random() < 0.5
    colour_first = random.random() < 0.5
    parts = []
    for place, thing in (
        random.sample(unique, len(unique)) if by_kind else random.sample(scene.placed, len(scene.placed))
    ):
        key, other = (thing.kind, place) if by_kind else (place, thing.kind)
        parts.append(f"{key} {thing.colour} {other}" if colour_first else f"{key} {other} {thing.colour}")
    return ", ".join(parts)


def _colour(scene: Scene, random: Random) -> Asked:
    things = scene.unique_kinds()
    if not things:
        return None
    thing = random.choice(things)
    return f"What colour is the {thing.kind}?", thing.colour


def _shape(scene: Scene, random: Random) -> Asked:
    shapes = [(place, thing) for place, thing in scene.placed if not thing.is_digit]
    if not shapes:
        return None
    place, thing = random.choice(shapes)
    return f"Which shape is {place}?", thing.kind


def _digit(scene: Scene, random: Random) -> Asked:
    digits = [(place, thing) for place, thing in scene.placed if thing.is_digit]
    if not digits:
        return None
    place, thing = random.choice(digits)
    return f"Which digit is {place}?", thing.kind


def _position(scene: Scene, random: Random) -> Asked:
    unique = scene.unique_kinds()
    placed = [(place, thing) for place, thing in scene.placed if thing in unique]
    if not placed:
        return None
    place, thing = random.choice(placed)
    return f"Where is the {thing.kind}?", place


def _count(scene: Scene, random: Random) -> Asked:
    return "How many things are there?", str(len(scene.things))


def _recall(random: Random) -> tuple[str, str]:
    kinds = random.sample(SHAPES, 3)
    things = [Thing(kind, colour) for kind, colour in zip(kinds, random.sample(COLOURS, 3), strict=True)]
    asked = random.choice(things)
    return f"{things[0]}, {things[1]}, {things[2]}. What colour was the {asked.kind}?", asked.colour


def _order(random: Random) -> tuple[str, str]:
    first, second = random.sample(DIGITS, 2)
    return f"Is {first} more than {second}?", "yes" if int(first) > int(second) else "no"


def _exists(scene: Scene, random: Random) -> Asked:
    """Half the questions are about a kind that is there."""
    present = sorted({thing.kind for thing in scene.things})
    absent = [kind for kind in (*SHAPES, *DIGITS) if kind not in present]
    is_there = random.random() < 0.5
    # Shapes are there more often than digits; without the second draw "no" would mostly mean a digit.
    wants_digit = random.random() < 0.5
    kinds = [kind for kind in (present if is_there else absent) if (kind in DIGITS) == wants_digit]
    return (f"Is there a {random.choice(kinds)}?", "yes" if is_there else "no") if kinds else None


def _colour_count(scene: Scene, random: Random) -> Asked:
    """The answer is drawn first, then a colour with that count, so that small counts do not crowd out the others."""
    counts: dict[int, list[str]] = {}
    for colour in COLOURS:
        counts.setdefault(scene.colour_count(colour), []).append(colour)
    answer = random.choice(sorted(counts))
    return f"How many are {random.choice(counts[answer])}?", str(answer)


def _more(scene: Scene, random: Random) -> Asked:
    counts = {colour: count for colour in COLOURS if (count := scene.colour_count(colour))}
    pairs = [(one, two) for one in counts for two in counts if counts[one] > counts[two]]
    if not pairs:
        return None
    larger, smaller = random.choice(pairs)
    first, second = random.sample((larger, smaller), 2)
    return f"Are there more {first} or {second} ones?", larger


def _largest(scene: Scene, random: Random) -> Asked:
    if len(scene.digits) < 2:
        return None
    return "Which digit is the largest?", max(thing.kind for thing in scene.digits)


def _larger(random: Random) -> tuple[str, str]:
    first, second = random.sample(DIGITS, 2)
    return f"Which is larger, {first} or {second}?", max(first, second)


BASE_IMAGE = (
    ImageFamily("colour", _colour),
    ImageFamily("shape", _shape),
    ImageFamily("digit", _digit),
    ImageFamily("position", _position),
    ImageFamily("count", _count),
)
BASE_TEXT = (
    TextFamily("recall", _recall, distinct=perm(len(SHAPES), 3) * perm(len(COLOURS), 3) * 3),
    TextFamily("order", _order, distinct=perm(len(DIGITS), 2)),
)
NEW_IMAGE = (
    ImageFamily("exists", _exists),
    ImageFamily("colour-count", _colour_count),
    ImageFamily("more", _more),
    ImageFamily("largest", _largest),
)
NEW_TEXT = (TextFamily("larger", _larger, distinct=perm(len(DIGITS), 2)),)

BASE_FAMILIES = tuple(family.name for family in (*BASE_IMAGE, *BASE_TEXT))
NEW_FAMILIES = tuple(family.name for family in (*NEW_IMAGE, *NEW_TEXT))


def all_words() -> set[str]:
    """Every colour, shape, digit, place and yes/no word."""
    return {*COLOURS, *SHAPES, *DIGITS, *PLACES, "yes", "no"}
