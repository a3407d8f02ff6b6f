"""GQA: accuracy, and a check of the file that the benchmark's own program wants.

python -m llava.eval.eval_gqa --questions gqa/data/testdev_balanced_questions.json \
    --predictions gqa/data/testdev_balanced_predictions.json

`scripts/convert_gqa_for_eval.py` writes the predictions. An answer is right if it equals the annotated one, letter by
letter, as in the benchmark's `eval.py`; binary and open questions are told apart as there, by their structural type.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava.errors import BadSampleError
from llava.eval.answering.questions import read_json
from llava.eval.scoring.matching import Sides, check_fit, id_of, refuse_unlabeled
from llava.runtime.output import replace_text
from llava.runtime.places import Input, refuse_file
from llava.runtime.program import run_program

OPEN = "query"
"""The structural type of an open question; all others are answered by yes or no or by a choice."""


@dataclass(frozen=True)
class GQAScore:
    """Accuracies in [0, 1]; None where there are no such questions.

    Attributes:
        n: number of balanced questions.
        accuracy: over all of them.
        binary: over those answered by yes, no or a choice.
        open: over the others.
        by_type: by structural type, where the questions have one.
    """

    n: int
    accuracy: float
    binary: float | None
    open: float | None
    by_type: dict[str, float]

    def __str__(self) -> str:
        """Lines for people."""
        parts = [("Binary", self.binary), ("Open", self.open), ("Accuracy", self.accuracy)]
        parts += [(f"  {name}", value) for name, value in self.by_type.items()]
        return "\n".join(f"{name}: {100 * value:.2f}%" for name, value in parts if value is not None)


def read_predictions(
    path: str | Path, wanted: Sequence[str], questions_file: str | Path, known: Collection[str]
) -> dict[str, str]:
    """The predictions by question.

    Args:
        path: the predictions.
        wanted: ids of the questions that are scored.
        questions_file: for messages.
        known: ids of all questions, those that are not scored included.

    Raises:
        BadSampleError: the file is not a JSON list of `questionId` and `prediction` (text), a question is answered
            twice or is not known, or a wanted one is not answered.
    """
    rows = read_json(path, list)
    for number, row in enumerate(rows, start=1):
        key, text = (row.get("questionId"), row.get("prediction")) if isinstance(row, dict) else (None, None)
        if not isinstance(key, str | int) or isinstance(key, bool) or not isinstance(text, str):
            raise BadSampleError(f"{path}: entry {number} must have 'questionId' and the text 'prediction': {row!r}")
    # What is in the file of questions without being scored (it is not balanced) may be answered.
    check_fit(wanted, [row["questionId"] for row in rows], Sides(path, questions_file), known=known)
    return {id_of(row["questionId"]): row["prediction"] for row in rows}


def evaluate(questions_file: str | Path, predictions_file: str | Path, only: Collection[str] | None = None) -> GQAScore:
    """Score a file of predictions on the balanced questions.

    Args:
        questions_file: GQA's questions with answers, by id.
        predictions_file: JSON list of questionId and prediction.
        only: score only these questions; None: all.

    Raises:
        BadSampleError: a file is broken, or there are no questions to score.
    """
    everything: dict[str, dict[str, Any]] = read_json(questions_file, dict)
    questions = {
        key: row for key, row in everything.items() if row.get("isBalanced", True) and (only is None or key in only)
    }
    if not questions:
        raise BadSampleError(f"{questions_file}: no balanced questions here")
    refuse_unlabeled([key for key, row in questions.items() if "answer" not in row], questions_file, "answer")
    predictions = read_predictions(predictions_file, list(questions), questions_file, everything.keys())
    right = {key: predictions[key] == row["answer"] for key, row in questions.items()}
    types = {key: row.get("types", {}).get("structural") for key, row in questions.items()}
    by_type: dict[str, list[bool]] = {}
    for key, kind in types.items():
        if kind is not None:
            by_type.setdefault(kind, []).append(right[key])
    return GQAScore(
        n=len(questions),
        accuracy=sum(right.values()) / len(right),
        binary=_mean([right[key] for key, kind in types.items() if kind not in (None, OPEN)]),
        open=_mean(by_type.get(OPEN, [])),
        by_type={kind: sum(values) / len(values) for kind, values in sorted(by_type.items())},
    )


def _mean(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.eval_gqa", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=str, required=True, help="GQA's questions with answers, by question id")
    parser.add_argument("--predictions", type=str, required=True, help="JSON list of questionId and prediction")
    parser.add_argument("--output", type=str, default=None, help="write the score as JSON here, too")
    return parser


def main(argv: Sequence[str] | None = None) -> GQAScore:
    """Run the program.

    Raises:
        BadSampleError: see `evaluate`.
    """
    args = build_parser().parse_args(argv)
    if args.output is not None:
        refuse_file(
            "--output", args.output, [Input("--questions", args.questions), Input("--predictions", args.predictions)]
        )
    score = evaluate(args.questions, args.predictions)
    print(score)
    if args.output is not None:
        replace_text(args.output, json.dumps(asdict(score), indent=2) + "\n")
    return score


if __name__ == "__main__":
    run_program(main)
