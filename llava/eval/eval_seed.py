"""SEED-Bench: accuracy by type, and the file for its leaderboard (upstream `convert_seed_for_submission.py`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.eval.answering.questions import read_json
from llava.eval.scoring.matching import id_of, read_matching, refuse_unlabeled
from llava.runtime.output import replace_text
from llava.runtime.places import Input, refuse_file

KINDS = ("image", "video")


@dataclass(frozen=True)
class SeedScore:
    """Accuracies in [0, 1].

    Attributes:
        by_type: by the name of the type, in the order of their ids.
        total: over all questions.
        by_kind: over the questions on images and on videos.
    """

    by_type: dict[str, float]
    total: float
    by_kind: dict[str, float]

    def __str__(self) -> str:
        """Upstream's printed lines."""
        lines = [f"{name}: {100 * value:.2f}%" for name, value in self.by_type.items()]
        lines.append(f"Total accuracy: {100 * self.total:.2f}%")
        return "\n".join(lines + [f"{kind} accuracy: {100 * value:.2f}%" for kind, value in self.by_kind.items()])


def read_answers(annotation: dict[str, Any], result_file: str | Path) -> list[str]:
    """The answer to each annotated question, in their order.

    Raises:
        BadSampleError: the file is broken, or answers and questions do not fit: the leaderboard wants all; or a
            question has no right answer.
    """
    questions = annotation["questions"]
    refuse_unlabeled([one["question_id"] for one in questions if "answer" not in one], "the annotation", "answer")
    ids = [question["question_id"] for question in questions]
    texts = read_matching(result_file, ids, "the annotation")
    return [texts[id_of(key)] for key in ids]


def score(annotation: dict[str, Any], answers: list[str]) -> SeedScore:
    """Accuracies of answers in the order of the questions; an answer is right if it is the letter and nothing else."""
    names = {number: name for name, number in annotation["question_type"].items()}
    by_type: dict[int, list[bool]] = {}
    by_kind: dict[str, list[bool]] = {}
    for question, answer in zip(annotation["questions"], answers, strict=True):
        right = answer == question["answer"]
        by_type.setdefault(question["question_type_id"], []).append(right)
        by_kind.setdefault(question["data_type"], []).append(right)
    return SeedScore(
        {names[number]: _mean(by_type[number]) for number in sorted(by_type)},
        _mean([right for values in by_type.values() for right in values]),
        {kind: _mean(by_kind[kind]) for kind in KINDS if kind in by_kind},
    )


def _mean(values: list[bool]) -> float:
    return sum(values) / len(values)


def evaluate(annotation_file: str | Path, result_file: str | Path, upload_file: str | Path) -> SeedScore:
    """Score an answers file and write the file for the leaderboard: JSON lines of question_id and prediction.

    Raises:
        BadSampleError: a file is missing or broken, or answers are missing.
    """
    refuse_file(
        "the output", upload_file, [Input("the annotation", annotation_file), Input("the answers", result_file)]
    )
    annotation = read_json(annotation_file, dict)
    answers = read_answers(annotation, result_file)
    result = score(annotation, answers)
    write_upload(annotation, answers, upload_file)
    return result


def write_upload(annotation: dict[str, Any], answers: list[str], path: str | Path) -> Path:
    """Write the file for the leaderboard: JSON lines of question_id, as annotated, and prediction."""
    rows = (
        {"question_id": question["question_id"], "prediction": answer}
        for question, answer in zip(annotation["questions"], answers, strict=True)
    )
    return replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))
