"""ScienceQA: from answers to accuracies by subject, context and grade (LaVIN's `eval.py`).

An answer counts by the first "The answer is X" followed by any one character. What has no such words, or names a letter
without a choice, is unparsable: it counts as wrong and is reported. The original draws a choice at random instead,
unseeded; that is an option here, seeded.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava.eval.scoring.matching import Sides, check_fit
from mma.lavin.data.prompts import OPTIONS, Problem

STATED = re.compile(r"The answer is ([A-Z]).")
"""The last sign is any character but a line feed: a letter that ends the text does not match, as in the original."""

UNPARSABLE = -1
"""Index in place of a choice."""


def _grades(first: int, last: int) -> Callable[[Problem], bool]:
    names = {f"grade{number}" for number in range(first, last + 1)}
    return lambda problem: problem["grade"] in names


GROUPS: dict[str, tuple[str, Callable[[Problem], bool]]] = {
    "acc_natural": ("natural science", lambda problem: problem["subject"] == "natural science"),
    "acc_social": ("social science", lambda problem: problem["subject"] == "social science"),
    "acc_language": ("language science", lambda problem: problem["subject"] == "language science"),
    "acc_has_text": ("text context", lambda problem: bool(problem["hint"])),
    "acc_has_image": ("image context", lambda problem: problem.get("image") is not None),
    "acc_no_context": ("no context", lambda problem: not problem["hint"] and problem.get("image") is None),
    "acc_grade_1_6": ("grades 1 to 6", _grades(1, 6)),
    "acc_grade_7_12": ("grades 7 to 12", _grades(7, 12)),
    "acc_average": ("all", lambda problem: True),
}
"""Name in the original's result, words for people, and which problems belong to it."""


def extract(text: str) -> str | None:
    """The letter that an answer states; None if it states none."""
    found = STATED.search(text)
    return None if found is None else found[1]


def choice_of(text: str, choices: int, options: Sequence[str] = OPTIONS) -> int:
    """Index of the choice that an answer states, `UNPARSABLE` if it states none of them."""
    letter, known = extract(text), list(options[:choices])
    return known.index(letter) if letter in known else UNPARSABLE


@dataclass(frozen=True)
class ScienceQAScore:
    """Result of a run.

    Attributes:
        predictions: index of the choice by problem; `UNPARSABLE` where there is none.
        unparsable: problems whose answer states no choice.
        drawn: whether choices were drawn for those.
        right: right answers of each group.
        count: problems of each group.
    """

    predictions: dict[str, int]
    unparsable: list[str]
    drawn: bool
    right: dict[str, int]
    count: dict[str, int]

    def accuracy(self, group: str) -> float | None:
        """Percentage of a group; None if it has no problems."""
        return 100 * self.right[group] / self.count[group] if self.count[group] else None

    @property
    def scores(self) -> dict[str, str | None]:
        """Percentages as the original writes them, None for a group without problems."""
        values = {group: self.accuracy(group) for group in GROUPS}
        return {group: None if value is None else f"{value:.2f}" for group, value in values.items()}

    def __str__(self) -> str:
        """A table for people."""
        lines = [
            f"{title:<18} {self.scores[group] or 'no problems':>11}   {self.right[group]} of {self.count[group]}"
            for group, (title, _) in GROUPS.items()
        ]
        fate = "a choice was drawn at random for each" if self.drawn else "they count as wrong"
        lines.append(f"{len(self.unparsable)} answers name no choice; {fate}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "scores": self.scores,
            "right": self.right,
            "count": self.count,
            "unparsable": self.unparsable,
            "random_fallback": self.drawn,
        }


def score(
    answers: Mapping[str, str],
    problems: Mapping[str, Problem],
    *,
    asked: Sequence[str] | None = None,
    options: Sequence[str] = OPTIONS,
    fallback: random.Random | None = None,
) -> ScienceQAScore:
    """Score the answers to a split.

    Args:
        answers: text by problem, in the order of the split.
        problems: by id, checked; there may be more than were asked.
        asked: ids of the problems that must be answered; None: those that are.
        options: letters of the choices.
        fallback: draws a choice, in that order, where an answer states none; None: such an answer is wrong.

    Raises:
        BadSampleError: what was asked has no answer, or an answer no problem.
    """
    wanted = [name for name in answers if name in problems] if asked is None else asked
    check_fit(wanted, list(answers), Sides("the answers", "the problems"))
    predictions: dict[str, int] = {}
    unparsable: list[str] = []
    for name, text in answers.items():
        choices = len(problems[name]["choices"])
        predictions[name] = choice_of(text, choices, options)
        if predictions[name] == UNPARSABLE:
            unparsable.append(name)
            if fallback is not None:
                predictions[name] = fallback.choice(range(choices))
    members = {group: [name for name in answers if belongs(problems[name])] for group, (_, belongs) in GROUPS.items()}
    right = {
        group: sum(predictions[name] == problems[name]["answer"] for name in names) for group, names in members.items()
    }
    count = {group: len(names) for group, names in members.items()}
    return ScienceQAScore(predictions, unparsable, fallback is not None, right, count)
