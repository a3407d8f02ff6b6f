"""The rows: families for the base, and five clearly different tasks to fine-tune on, all drawn by a program.

A word, a letter and a digit are one token each (blanks stand between them), so the tasks ask for work on sequences and
not for spelling. Rows have the fields of `hydralora.finetune`: instruction, input, output, task_type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

LETTERS = "abcdefghijklmnop"
CODE = dict(zip(LETTERS, "7382905164827395", strict=True))
"""The table of the task `lookup`; it stands in no row and has to be learned."""

Row = dict[str, Any]


class Task(NamedTuple):
    """One kind of row.

    Attributes:
        name: short name.
        instructions: wordings, one of which each row has.
        draw: a random input and its answer.
    """

    name: str
    instructions: tuple[str, ...]
    draw: Callable[[Random], tuple[str, str]]


def _letters(random: Random, shortest: int, longest: int) -> list[str]:
    return random.sample(LETTERS, random.randint(shortest, longest))


def _following(letter: str) -> str:
    return LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)]


def _copy(random: Random) -> tuple[str, str]:
    text = " ".join(_letters(random, 3, 6))
    return text, text


def _first(random: Random) -> tuple[str, str]:
    letters = _letters(random, 3, 6)
    return " ".join(letters), letters[0]


def _last(random: Random) -> tuple[str, str]:
    letters = _letters(random, 3, 6)
    return " ".join(letters), letters[-1]


def _next(random: Random) -> tuple[str, str]:
    letter = random.choice(LETTERS)
    return letter, _following(letter)


def _smaller(random: Random) -> tuple[str, str]:
    letters = random.sample(LETTERS, 2)
    return " ".join(letters), min(letters)


def _digit_sum(random: Random) -> tuple[str, str]:
    first, second = random.randrange(10), random.randrange(10)
    return f"{first} + {second}", " ".join(str(first + second))


def _member(random: Random) -> tuple[str, str]:
    letters = _letters(random, 3, 6)
    asked = random.choice(letters) if random.random() < 0.5 else random.choice(LETTERS)
    return f"{' '.join(letters)} ? {asked}", "yes" if asked in letters else "no"


def _after(random: Random) -> tuple[str, str]:
    letters = _letters(random, 4, 6)
    place = random.randrange(len(letters) - 1)
    return f"{' '.join(letters)} ? {letters[place]}", letters[place + 1]


def _add(random: Random) -> tuple[str, str]:
    first, second = ([random.randrange(10) for _ in range(2)] for _ in range(2))
    total = [(one + other) % 10 for one, other in zip(first, second, strict=True)]
    return f"{' '.join(map(str, first))} + {' '.join(map(str, second))}", " ".join(map(str, total))


def _reverse(random: Random) -> tuple[str, str]:
    letters = _letters(random, 3, 5)
    return " ".join(letters), " ".join(reversed(letters))


def _sort(random: Random) -> tuple[str, str]:
    letters = _letters(random, 3, 5)
    return " ".join(letters), " ".join(sorted(letters))


def _shift(random: Random) -> tuple[str, str]:
    letters = _letters(random, 3, 5)
    return " ".join(letters), " ".join(map(_following, letters))


def _lookup(random: Random) -> tuple[str, str]:
    letters = _letters(random, 3, 5)
    return " ".join(letters), " ".join(CODE[letter] for letter in letters)


BASE = (
    Task("copy", ("copy the letters", "write the same letters again"), _copy),
    Task("first", ("write the first letter", "which letter comes first"), _first),
    Task("last", ("write the last letter", "which letter comes last"), _last),
    Task("next", ("write the next letter of the alphabet",), _next),
    Task("smaller", ("which letter is smaller in the alphabet",), _smaller),
    Task("digit sum", ("add the digits", "what is the sum of the digits"), _digit_sum),
    Task("member", ("is the letter in the list", "does the list have the letter"), _member),
    Task("after", ("which letter comes after it in the list",), _after),
)
"""What the base is trained on: pieces of the work that the tasks ask for, none of the tasks themselves."""

TASKS = (
    Task("add", ("add the numbers place by place without carrying", "what are the last digits of the sums"), _add),
    Task("reverse", ("write the letters backwards", "reverse the order of the letters"), _reverse),
    Task("sort", ("sort the letters by the alphabet", "write the letters in the order of the alphabet"), _sort),
    Task("shift", ("copy each letter as the next of the alphabet", "replace each letter by the next letter"), _shift),
    Task("lookup", ("write the number of each letter", "look up the letters in the table"), _lookup),
)
"""The mixture; a task's place here is its `task_type`."""


def draw_rows(task: Task, number: int, count: int, seed: str, without: frozenset[str] = frozenset()) -> list[Row]:
    """`count` rows of a task with different inputs, none of them in `without`.

    Raises:
        ValueError: the task does not have that many inputs.
    """
    random = Random(f"{seed}/{task.name}")
    rows: list[Row] = []
    seen, misses = set(without), 0
    while len(rows) < count:
        asked, answer = task.draw(random)
        if asked in seen:
            misses += 1
            if misses > 100 * count:
                raise ValueError(f"task '{task.name}': {count} rows wanted, found {len(rows)} with different inputs")
            continue
        seen.add(asked)
        instruction = random.choice(task.instructions)
        rows.append({"instruction": instruction, "input": asked, "output": answer, "task_type": number})
    return rows


def held_out_rows(count: int) -> dict[str, list[Row]]:
    """The held-out rows of each task, `count` each; the same for every seed."""
    return {task.name: draw_rows(task, number, count, "test") for number, task in enumerate(TASKS)}


def training_rows(count: int, seed: int, held_out: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Rows of each task to train on, `count` each, with none of the inputs of `held_out`."""
    return {
        task.name: draw_rows(task, number, count, f"{seed}", frozenset(row["input"] for row in held_out[task.name]))
        for number, task in enumerate(TASKS)
    }


def base_rows(count: int, seed: int) -> list[Row]:
    """Rows for the base, families in turn; inputs may repeat, since some families have few."""
    random = Random(f"{seed}/base")
    rows = []
    for number in range(count):
        task = BASE[number % len(BASE)]
        asked, answer = task.draw(random)
        instruction = random.choice(task.instructions)
        rows.append({"instruction": instruction, "input": asked, "output": answer, "task_type": number % len(BASE)})
    return rows


def vocabulary() -> list[str]:
    """Every word, letter, digit and sign that rows are made of, in a fixed order."""
    words: Sequence[str] = [
        word for task in (*BASE, *TASKS) for instruction in task.instructions for word in instruction.split()
    ]
    return list(dict.fromkeys([*LETTERS, *"0123456789+?", "yes", "no", *words]))
