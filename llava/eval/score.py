r"""Exact-match accuracy of an answers file, by category, for question files with a `label`.

python -m llava.eval.score --question-file questions.jsonl --answers-file answers.jsonl --output score.json

An answer is right if it equals the label after both were normalised: surrounding white space and one trailing full
stop are removed, upper and lower case are the same. Nothing else is forgiven ("two" is not "2", "Yes, it is" is not
"yes"). Every question must have exactly one answer; the ids 7 and "7" are the same.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llava.errors import BadSampleError
from llava.eval.answering.questions import Question, read_jsonl, read_questions
from llava.eval.scoring.matching import by_id, id_of, read_matching
from llava.runtime.output import replace_text
from llava.runtime.places import Input, refuse_file
from llava.runtime.program import package_versions, run_program

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""

ALL = "all"


@dataclass(frozen=True)
class Score:
    """Accuracy on one category.

    Attributes:
        n: number of questions.
        correct: number of right answers.
        accuracy: their ratio, in [0, 1].
        low: lower end of the Wilson 95 % interval of the accuracy.
        high: its upper end.
        majority: accuracy of always giving the most frequent label of the question's category, for comparison.
    """

    n: int
    correct: int
    accuracy: float
    low: float
    high: float
    majority: float


def normalize(text: str) -> str:
    """Without surrounding white space, without one trailing full stop, case-folded."""
    return text.strip().removesuffix(".").rstrip().casefold()


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson, 1927): sound also for few questions and near 0 and 1.

    Args:
        correct: number of successes, between 0 and n.
        n: number of trials, at least 1.

    Returns:
        both ends, in [0, 1].
    """
    share, z2 = correct / n, Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def score_answers(questions: Sequence[Question], texts: dict[int | str, str]) -> dict[str, Score]:
    """Scores by category in alphabetical order, and the score of all questions together under `all`.

    Args:
        questions: with labels.
        texts: answer by question_id, one for each question.

    Raises:
        BadSampleError: a question has no label, or a category is called `all`.
    """
    answers = by_id(texts)
    right: dict[str, list[bool]] = {}
    labels: dict[str, Counter[str]] = {}
    for question in questions:
        if question.label is None:
            raise BadSampleError(f"{question.where}: the row has no 'label' to compare the answer with")
        if question.category == ALL:
            raise BadSampleError(f"{question.where}: the category '{ALL}' is taken by the total; rename it")
        label = normalize(question.label)
        right.setdefault(question.category, []).append(normalize(answers[id_of(question.question_id)]) == label)
        labels.setdefault(question.category, Counter())[label] += 1
    most_frequent = {category: max(counts.values()) for category, counts in labels.items()}
    scores = {category: _score(right[category], most_frequent[category]) for category in sorted(right)}
    return scores | {ALL: _score([one for group in right.values() for one in group], sum(most_frequent.values()))}


def _score(right: Sequence[bool], most_frequent: int) -> Score:
    n, correct = len(right), sum(right)
    return Score(n, correct, correct / n, *wilson_interval(correct, n), most_frequent / n)


def read_answers(path: str | Path, questions: Sequence[Question]) -> dict[int | str, str]:
    """The answer text of every question, by question_id.

    Raises:
        BadSampleError: questions or answers share an id, a question has no answer, or an answer no question; the
            message says how many and names them.
    """
    asked = [question.question_id for question in questions]
    where = questions[0].where.rpartition(":")[0] if questions else "no questions"
    texts = read_matching(path, asked, where)
    return {question_id: texts[id_of(question_id)] for question_id in asked}


def model_ids(path: str | Path) -> list[str]:
    """The models that gave the answers, by the rows' `model_id`."""
    return sorted({str(row["model_id"]) for _, row in read_jsonl(path) if "model_id" in row})


def table(scores: dict[str, Score], title: str) -> Table:
    """The scores as a table, one line for each category and one for all."""
    result = Table(title=title)
    result.add_column("category")
    for heading in ("n", "accuracy %", "95 % interval", "majority %"):
        result.add_column(heading, justify="right")
    for category, score in scores.items():
        if category == ALL:
            result.add_section()
        interval = f"{100 * score.low:.1f} - {100 * score.high:.1f}"
        result.add_row(category, str(score.n), f"{100 * score.accuracy:.2f}", interval, f"{100 * score.majority:.1f}")
    return result


def report(question_file: str | Path, answers_file: str | Path) -> dict[str, Any]:
    """Score an answers file.

    Returns:
        JSON values: the files, `model_ids`, `normalization`, `scores` (by category and `all`) and `versions`.

    Raises:
        BadSampleError: a file is broken, labels are missing, or answers do not fit the questions.
    """
    questions = read_questions(question_file)
    scores = score_answers(questions, read_answers(answers_file, questions))
    return {
        "question_file": str(question_file),
        "answers_file": str(answers_file),
        "model_ids": model_ids(answers_file),
        "normalization": "strip white space, one trailing full stop, case",
        "scores": {category: asdict(score) for category, score in scores.items()},
        "versions": package_versions(),
    }


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--question-file", type=Path, required=True, help="JSON lines with question_id, label, category"
    )
    parser.add_argument("--answers-file", type=Path, required=True, help="JSON lines with question_id and text")
    parser.add_argument("--output", type=Path, default=None, help="write the result as JSON here; default: print it")
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the program: print the table, then write or print the JSON; returns what it holds.

    Raises:
        BadSampleError: see `report`.
    """
    args = build_parser().parse_args(argv)
    if args.output is not None:
        inputs = [Input("--question-file", args.question_file), Input("--answers-file", args.answers_file)]
        refuse_file("--output", args.output, inputs)
    result = report(args.question_file, args.answers_file)
    scores = {category: Score(**values) for category, values in result["scores"].items()}
    Console().print(table(scores, title=", ".join(result["model_ids"]) or str(args.answers_file)))
    text = json.dumps(result, indent=2)
    if args.output is None:
        print(text)
    else:
        replace_text(args.output, text + "\n")
        print(f"written to {args.output}")
    return result


if __name__ == "__main__":
    run_program(main)
