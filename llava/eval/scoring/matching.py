"""Whether answers fit the questions that they are scored on: the one definition, used by every scorer and converter.

A score over a part of the questions, or over those of another file, looks like any other score. So a scorer first puts
the ids of both sides next to each other and names what does not fit. An id is a number or a text, and 7 and "7" are the
same id: question files, annotations and answers of one benchmark often write it differently.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from llava.errors import BadSampleError
from llava.eval.answering.questions import field, read_jsonl

T = TypeVar("T")

NAMED_IDS = 10
"""How many ids an error lists."""

ADVICE = "An unfinished answers file is completed by the command that began it"


class Sides(NamedTuple):
    """What the two sides are called in messages: files, as a rule.

    Attributes:
        answers: where the answers come from.
        questions: where the questions, or their right answers, come from.
    """

    answers: str | Path
    questions: str | Path


def id_of(value: Any) -> str:
    """The form in which ids are compared: 7, 7.0 (a column of a table that has gaps) and "7" are one id."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def listed(ids: Sequence[Any]) -> str:
    """Some ids for a message, the rest as a number."""
    rest = len(ids) - NAMED_IDS
    return ", ".join(map(repr, ids[:NAMED_IDS])) + (f" and {rest} more" if rest > 0 else "")


def misfits(
    asked: Iterable[Any], answered: Iterable[Any], *, repeats: bool = False, known: Collection[str] = ()
) -> list[str]:
    """What keeps answers from fitting questions, a phrase for each kind of fault with the ids; none if they fit.

    Args:
        asked: ids of the questions, each once.
        answered: ids of the answers.
        repeats: a question may be answered several times (MMBench's rounds).
        known: ids, as of `id_of`, that an answer may have although they are not asked.
    """
    questions, answers = _counted(asked), _counted(answered)
    faults = {
        "question ids appear more than once in the question file": [one for one, n in questions.values() if n > 1],
        "question ids are answered more than once": [one for one, n in answers.values() if n > 1 and not repeats],
        "questions have no answer": [one for key, (one, _) in questions.items() if key not in answers],
        "answers belong to no question": [
            one for key, (one, _) in answers.items() if key not in questions and key not in known
        ],
    }
    return [f"{len(ids)} {fault}: {listed(ids)}" for fault, ids in faults.items() if ids]


def _counted(ids: Iterable[Any]) -> dict[str, tuple[Any, int]]:
    """By the compared form: the id as it was written first, and how often it is there."""
    first: dict[str, Any] = {}
    counts: Counter[str] = Counter()
    for one in ids:
        first.setdefault(id_of(one), one)
        counts[id_of(one)] += 1
    return {key: (one, counts[key]) for key, one in first.items()}


def check_fit(
    asked: Sequence[Any],
    answered: Sequence[Any],
    sides: Sides,
    *,
    lenient: bool | None = None,
    repeats: bool = False,
    known: Collection[str] = (),
) -> None:
    """Refuse answers that do not fit the questions one to one.

    Args:
        asked: ids of the questions.
        answered: ids of the answers.
        sides: names for messages.
        lenient: print a warning instead, as long as one answer fits; None: the program has no `--lenient`.
        repeats: see `misfits`.
        known: see `misfits`.

    Raises:
        BadSampleError: they do not fit; the message says how many, and names them.
    """
    messages = misfits(asked, answered, repeats=repeats, known=known)
    if not messages:
        return
    text = f"{sides.answers}: {len(answered)} answers do not fit {len(asked)} questions ({sides.questions}): "
    text += "; ".join(messages)
    if lenient and set(map(id_of, asked)) & set(map(id_of, answered)):
        print(f"warning: {text}", file=sys.stderr)
        return
    way_out = "; --lenient scores what fits, as the original does" if lenient is False else ""
    raise BadSampleError(f"{text}. {ADVICE}{way_out}")


def read_pairs(path: str | Path) -> list[tuple[int | str, str]]:
    """Id and text of each row of an answers file, in its order.

    Raises:
        BadSampleError: the file is missing or broken; names file and line.
    """
    return [
        (field(row, "question_id", (int, str), where), field(row, "text", (str,), where))
        for where, row in read_jsonl(path)
    ]


def by_id(pairs: Iterable[tuple[Any, T]] | Mapping[Any, T]) -> dict[str, T]:
    """Values by the compared form of their ids; of several the last."""
    items = pairs.items() if isinstance(pairs, Mapping) else pairs
    return {id_of(key): value for key, value in items}


def read_matching(path: str | Path, asked: Sequence[Any], questions: str | Path) -> dict[str, str]:
    """The text of an answers file by id, one for each question.

    Raises:
        BadSampleError: the file is missing or broken, or does not fit the questions.
    """
    pairs = read_pairs(path)
    check_fit(asked, [key for key, _ in pairs], Sides(path, questions))
    return by_id(pairs)


def refuse_unlabeled(unlabeled: Sequence[Hashable], path: str | Path, key: str) -> None:
    """Refuse annotations without the right answer.

    Raises:
        BadSampleError: there are some; the message names them.
    """
    if unlabeled:
        raise BadSampleError(
            f"{path}: {len(unlabeled)} questions have no '{key}' to compare an answer with: {listed(unlabeled)}; this "
            "may be a split whose right answers are not public"
        )


def add_lenient(parser: argparse.ArgumentParser) -> None:
    """`--lenient`, for programs whose original scores or converts what fits."""
    parser.add_argument(
        "--lenient",
        action="store_true",
        help="as the original: go on although questions have no answer, or answers no question; they are named",
    )
