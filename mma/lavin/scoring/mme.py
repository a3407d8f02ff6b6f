"""MME: questions from the folders of the benchmark, and the report of LaVIN's `eval_mme.py`.

A subset is a folder, flat or with `images/` and `questions_answers_YN/`; `x.txt` beside or opposite `x.jpg` has two
lines `question<tab>Yes|No`. The original never reads the word behind the tab and expects yes to the first line and no
to the second. Here the files are believed, and `LabelSource.ORDER` repeats the original.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from llava.errors import BadSampleError
from llava.eval.eval_mme import COGNITION, NO, PERCEPTION, YES, TaskScore
from llava.eval.scoring.matching import Sides, check_fit
from llava.runtime.files import data_text

IMAGE_SUFFIXES = (".jpg", ".png")
IMAGES_FOLDER, QUESTIONS_FOLDER = "images", "questions_answers_YN"
MARKER = "response:"


class LabelSource(StrEnum):
    """Where the right answers come from."""

    FILE = "file"
    ORDER = "order"


@dataclass(frozen=True)
class MmeQuestion:
    """One of the two questions about an image.

    Attributes:
        subset: name of the subset.
        image: file relative to the root of the benchmark.
        number: 0 or 1.
        text: the question.
        truth: `yes` or `no`.
        where: file and line, for messages.
    """

    subset: str
    image: str
    number: int
    text: str
    truth: str
    where: str

    @property
    def name(self) -> str:
        """Identity of the question."""
        return f"{self.image}#{self.number}"


def read_subset(root: Path, subset: str, labels: LabelSource) -> list[MmeQuestion]:
    """The questions of one subset, image by image in the order of the names.

    Raises:
        BadSampleError: there are no images, one has no questions, or a file of questions is malformed.
    """
    folder = root / subset
    images = folder / IMAGES_FOLDER if (folder / IMAGES_FOLDER).is_dir() else folder
    texts = folder / QUESTIONS_FOLDER if (folder / QUESTIONS_FOLDER).is_dir() else folder
    found = sorted(path for path in images.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise BadSampleError(f"{images}: holds no images ({' or '.join(IMAGE_SUFFIXES)})")
    return [
        question
        for path in found
        for question in _read_pair(texts / f"{path.stem}.txt", subset, path.relative_to(root).as_posix(), labels)
    ]


def _read_pair(path: Path, subset: str, image: str, labels: LabelSource) -> list[MmeQuestion]:
    if not path.is_file():
        raise BadSampleError(f"{path}: no such file; it should hold the two questions about {image}")
    lines = [line for line in data_text(path).splitlines() if line.strip()]
    if len(lines) != 2:
        raise BadSampleError(f"{path}: {len(lines)} lines, must be two questions")
    pair = []
    for number, line in enumerate(lines):
        where = f"{path}:{number + 1}"
        text, _, label = line.partition("\t")
        truth = (YES, NO)[number]
        if labels is LabelSource.FILE:
            truth = label.strip().lower()
            if truth not in (YES, NO):
                raise BadSampleError(f"{where}: behind the tab stands {label!r}, must be Yes or No")
        pair.append(MmeQuestion(subset, image, number, text, truth, where))
    return pair


def read_benchmark(root: Path, labels: LabelSource) -> tuple[list[MmeQuestion], list[str]]:
    """The questions of every known subset in the order of their names, and the names of other folders.

    Raises:
        BadSampleError: the folder is missing or holds no known subset, or a subset is malformed.
    """
    if not root.is_dir():
        raise BadSampleError(f"{root}: no such folder")
    known = {*PERCEPTION, *COGNITION}
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    if not known & set(names):
        raise BadSampleError(f"{root}: holds no folder of a subset; known are {', '.join(sorted(known))}")
    questions = [each for name in names if name in known for each in read_subset(root, name, labels)]
    return questions, [name for name in names if name not in known]


def response_part(text: str) -> str:
    """What is judged of an answer, its leading white space included; it ends where another turn begins."""
    return text.lower().partition(MARKER)[0]


def report(scores: dict[str, TaskScore], totals: dict[str, float]) -> str:
    """The lines of the original's `mme_eval.txt`.

    Args:
        scores: by subset.
        totals: sums of perception and of cognition.
    """
    lines: list[str] = []
    for subset, one in scores.items():
        lines += [f"subset: {subset}", f"accuracy: {one.accuracy * 100}", f"accuracy+: {one.accuracy_plus * 100}"]
    groups = [f"{group.lower()}_score: {value}" for group, value in totals.items()]
    return "\n".join([*lines, f"total_score: {sum(totals.values())}", *groups]) + "\n"


def rows_of(questions: Sequence[MmeQuestion], answers: dict[str, str]) -> dict[str, list[tuple[str, str, str]]]:
    """Image, right answer and response of each question by subset, as `llava.eval.eval_mme.score_task` takes them.

    Args:
        questions: the two of each image in a row.
        answers: text by the name of the question.

    Raises:
        BadSampleError: a question has no answer, or an answer no question.
    """
    check_fit([question.name for question in questions], list(answers), Sides("the answers", "the questions of MME"))
    rows: dict[str, list[tuple[str, str, str]]] = {}
    for question in questions:
        row = (question.image, question.truth, response_part(answers[question.name]))
        rows.setdefault(question.subset, []).append(row)
    return rows
