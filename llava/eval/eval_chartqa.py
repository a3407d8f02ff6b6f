"""ChartQA: relaxed accuracy, of human and machine-written questions apart.

python -m llava.eval.eval_chartqa --annotation-dir chartqa/test --result-file answers.jsonl

A number may be off by 5 % of the right one, a percentage is its hundredth ("12%" is 0.12); any other answer must be
equal but for upper and lower case (Methani et al., 2020; Masry et al., 2022). A right answer of 0 must be met exactly.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.errors import BadSampleError
from llava.eval.answering.answers import Task
from llava.eval.answering.questions import field, read_json
from llava.eval.scoring.matching import Sides, by_id, check_fit, id_of, read_matching
from llava.runtime.program import run_program

KINDS = ("human", "augmented")
TOLERANCE = 0.05
INSTRUCTION = "Answer the question using a single word or phrase."


def as_number(text: str) -> float | None:
    """The number that a text is, a percentage as its hundredth; None if it is none."""
    text = text.strip()
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_match(answer: str, label: str, tolerance: float = TOLERANCE) -> bool:
    """True if an answer counts as right."""
    given, right = as_number(answer), as_number(label)
    if given is not None and right:
        return abs(given - right) / abs(right) <= tolerance
    if given is not None and right is not None:
        return given == right
    return answer.strip().lower() == label.strip().lower()


def read_tasks(annotation_dir: str | Path) -> list[Task]:
    """The questions of `test_human.json` and `test_augmented.json`, as far as they are there.

    Raises:
        BadSampleError: neither is there, or a row is broken.
    """
    folder = Path(annotation_dir)
    tasks = []
    for kind in KINDS:
        for path in folder.glob(f"*_{kind}.json"):
            for number, row in enumerate(read_json(path, list)):
                where = f"{path}: entry {number + 1}"
                prompt = f"{field(row, 'query', (str,), where)}\n{INSTRUCTION}"
                extra = {"kind": kind, "label": field(row, "label", (str,), where)}
                image = field(row, "imgname", (str,), where)
                tasks.append(Task(f"{kind}_{number}", prompt, prompt, (image,), where, extra))
    if not tasks:
        raise BadSampleError(f"{folder}: no <split>_human.json and no <split>_augmented.json here")
    return tasks


def score(tasks: Sequence[Task], texts: Mapping[Any, str]) -> dict[str, float]:
    """Relaxed accuracy in [0, 1]: of each kind of question, and over all under `all`.

    Raises:
        BadSampleError: a task has no answer, or an answer no task.
    """
    check_fit([task.question_id for task in tasks], list(texts), Sides("the answers", "the annotations"))
    answers = by_id(texts)
    right: dict[str, list[bool]] = {}
    for task in tasks:
        matches = relaxed_match(answers[id_of(task.question_id)], task.extra["label"])
        right.setdefault(task.extra["kind"], []).append(matches)
    scores = {kind: sum(values) / len(values) for kind, values in right.items()}
    return {"all": sum(map(sum, right.values())) / len(tasks)} | scores


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.eval_chartqa",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--annotation-dir", type=str, required=True, help="folder of test_human.json, ...")
    parser.add_argument("--result-file", type=str, required=True, help="answers of `python -m llava.eval chartqa`")
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the program.

    Raises:
        BadSampleError: see `read_tasks` and `score`.
    """
    args = build_parser().parse_args(argv)
    tasks = read_tasks(args.annotation_dir)
    texts = read_matching(args.result_file, [task.question_id for task in tasks], args.annotation_dir)
    scores = score(tasks, texts)
    for name, value in scores.items():
        print(f"{name}: {100 * value:.2f}%")
    return scores


if __name__ == "__main__":
    run_program(main)
