"""The two halves of the mixture: questions about pictures, and questions about lists of letters without a picture.

Each half asks for a Yes or No, for a name and for a number. A list is drawn by a program; its letters are single pieces
of the tokenizer of the NLVR base, which was trained on no such text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from scripts.experiments.text.tasks import Row, Task, draw_rows

IMAGE_TASKS = ("exist", "most", "count")
"""Those of NLVR that a small model learns: in every table `verify` stays at the majority answer."""

LETTERS = "bdfghkmp"


def _member(random: Random) -> tuple[str, str]:
    letters = random.sample(LETTERS, 5)
    inside = random.random() < 0.5
    asked, listed = (random.choice(letters[1:]) if inside else letters[0]), letters[1:]
    return f"{asked} in {' '.join(listed)}", "Yes" if inside else "No"


def _last(random: Random) -> tuple[str, str]:
    letters = random.sample(LETTERS, random.randint(3, 6))
    return " ".join(letters), letters[-1]


def _tally(random: Random) -> tuple[str, str]:
    asked, *others = random.sample(LETTERS, 6)
    times = random.randint(1, 4)
    listed = [asked] * times + others[: 5 - times]
    random.shuffle(listed)
    return f"{asked} in {' '.join(listed)}", str(times)


TEXT_TASKS = (
    Task("member", ("Is {}?",), _member),
    Task("last", ("Which is last: {}?",), _last),
    Task("tally", ("How many {}?",), _tally),
)
"""Is a letter in a list; which letter is last; how often is a letter in a list."""

TASKS = (*IMAGE_TASKS, *(task.name for task in TEXT_TASKS))
MODALITIES: Mapping[str, tuple[str, ...]] = {"image": IMAGE_TASKS, "text": TASKS[len(IMAGE_TASKS) :]}


def question(row: Row) -> str:
    """What a row asks, in words."""
    return row["instruction"].format(row["input"])


def held_out_rows(count: int) -> dict[str, list[Row]]:
    """The held-out rows of each text task, `count` each; the same for every seed."""
    return {task.name: draw_rows(task, number, count, "test") for number, task in enumerate(TEXT_TASKS)}


def text_questions(held_out: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """The same as lines of a question file."""
    return [
        {"question_id": f"{task}-{index}", "text": question(row), "category": task, "label": row["output"]}
        for task, rows in held_out.items()
        for index, row in enumerate(rows)
    ]


def text_rows(count: int, turns: int, seed: int, held_out: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """LLaVA rows without image.

    Args:
        count: number of rows.
        turns: questions of each text task in a row; the order of a row's questions is random.
        seed: of questions and orders.
        held_out: by task, rows none of which is asked.
    """
    drawn = [
        draw_rows(task, number, turns * count, f"{seed}", frozenset(row["input"] for row in held_out[task.name]))
        for number, task in enumerate(TEXT_TASKS)
    ]
    random = Random(f"{seed}/turns")
    rows = []
    for index in range(count):
        asked = [row for task_rows in drawn for row in task_rows[turns * index : turns * (index + 1)]]
        random.shuffle(asked)
        words = [
            {"from": speaker, "value": value}
            for row in asked
            for speaker, value in (("human", question(row)), ("gpt", row["output"]))
        ]
        rows.append({"id": f"text-{index}", "conversations": words})
    return rows
