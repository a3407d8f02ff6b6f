"""A second, independent answerer: from the wording of a question and the cells of a scene to the right answer.

Written against the texts, not against `playground.families`, so that a wrong label cannot agree with itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable

Cells = list[list[str] | None]
"""Nine entries `[colour, kind]` or None, row by row from the north-west, as in `scenes.json`."""

GRID = ["northwest", "north", "northeast", "west", "center", "east", "southwest", "south", "southeast"]


def _things(cells: Cells) -> list[tuple[str, str, str]]:
    """(place, colour, kind) of everything in the image."""
    return [(GRID[index], cell[0], cell[1]) for index, cell in enumerate(cells) if cell is not None]


def _only(values: list[str]) -> str:
    assert len(values) == 1, f"the question has {len(values)} right answers: {values}"
    return values[0]


def _more(cells: Cells, first: str, second: str) -> str:
    counts = {colour: sum(c == colour for _, c, _ in _things(cells)) for colour in (first, second)}
    assert counts[first] != counts[second]
    return max(counts, key=lambda colour: counts[colour])


IMAGE_RULES: list[tuple[str, Callable[..., str]]] = [
    (r"What colour is the (\w+)\?", lambda cells, kind: _only([c for _, c, k in _things(cells) if k == kind])),
    (r"Which shape is (\w+)\?", lambda cells, place: _only([k for p, _, k in _things(cells) if p == place])),
    (r"Which digit is (?!the)(\w+)\?", lambda cells, place: _only([k for p, _, k in _things(cells) if p == place])),
    (r"Where is the (\w+)\?", lambda cells, kind: _only([p for p, _, k in _things(cells) if k == kind])),
    (r"How many things are there\?", lambda cells: str(len(_things(cells)))),
    (r"Is there a (\w+)\?", lambda cells, kind: "yes" if kind in {k for _, _, k in _things(cells)} else "no"),
    (r"How many are (\w+)\?", lambda cells, colour: str(sum(c == colour for _, c, _ in _things(cells)))),
    (r"Are there more (\w+) or (\w+) ones\?", _more),
    (r"Which digit is the largest\?", lambda cells: str(max(int(k) for _, _, k in _things(cells) if k.isdigit()))),
]

TEXT_RULES: list[tuple[str, Callable[..., str]]] = [
    (
        r"(\w+) (\w+), (\w+) (\w+), (\w+) (\w+)\. What colour was the (\w+)\?",
        lambda c1, k1, c2, k2, c3, k3, asked: {k1: c1, k2: c2, k3: c3}[asked],
    ),
    (r"Is (\d) more than (\d)\?", lambda a, b: "yes" if int(a) > int(b) else "no"),
    (r"Which is larger, (\d) or (\d)\?", lambda a, b: str(max(int(a), int(b)))),
]


def right_answer(question: str, cells: Cells | None) -> str:
    """The answer to a question of any family; fails if no rule or several rules know the wording."""
    rules = TEXT_RULES if cells is None else IMAGE_RULES
    found = [(rule, match) for pattern, rule in rules if (match := re.fullmatch(pattern, question))]
    assert len(found) == 1, f"{len(found)} rules know the question {question!r}"
    rule, match = found[0]
    return rule(*match.groups()) if cells is None else rule(cells, *match.groups())
