"""MME: accuracy, accuracy+ and score of each task, and the totals of perception and cognition.

python -m llava.eval.eval_mme --results_dir playground/data/eval/MME/eval_tool/answers/llava-v1.5-7b

The folder holds one file per task, as the benchmark's own tool wants: `<task>.txt`, lines of image, question, ground
truth and response with tabs between them, the two questions of an image one after the other
(`scripts/convert_mme_for_eval.py` writes such a folder). The rules are those of the benchmark's `calculation.py`: a
response counts by its first four characters. Totals are sums over tasks, so a folder without some of the tasks is
refused; where only a part of the benchmark was asked, `--data-dir` says which.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from llava.errors import BadSampleError
from llava.eval.scoring.matching import add_lenient
from llava.runtime.files import data_text
from llava.runtime.output import replace_text
from llava.runtime.places import Input, refuse_file
from llava.runtime.program import run_program

PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
GROUPS = {"Perception": PERCEPTION, "Cognition": COGNITION}
YES, NO, OTHER = "yes", "no", "other"
PREFIX = 4
"""A response is judged by this many characters."""


@dataclass(frozen=True)
class TaskScore:
    """One task.

    Attributes:
        images: number of images, each with two questions.
        accuracy: share of questions answered rightly, in [0, 1].
        accuracy_plus: share of images both questions of which are.
        other: responses that are neither yes nor no; they count as wrong.
    """

    images: int
    accuracy: float
    accuracy_plus: float
    other: int

    @property
    def score(self) -> float:
        """Accuracy plus accuracy+, in percent: 200 at most."""
        return self.accuracy * 100 + self.accuracy_plus * 100


def parse_response(text: str) -> str:
    """`yes`, `no` or `other`: the whole response, or the word within its first four characters, yes before no."""
    text = text.lower()
    if text in (YES, NO):
        return text
    return next((word for word in (YES, NO) if word in text[:PREFIX]), OTHER)


def read_task(path: Path) -> list[tuple[str, str, str]]:
    """Image, ground truth and response of each line of a task's file.

    Raises:
        BadSampleError: a line has not four columns or a ground truth other than yes and no, or the lines are no pairs
            on one image each.
    """
    rows = []
    for number, line in enumerate(data_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        columns = line.split("\t")
        if len(columns) != 4:
            raise BadSampleError(
                f"{path}:{number}: {len(columns)} columns, must be 4: image, question, truth, response"
            )
        image, _, truth, response = columns
        if truth.strip().lower() not in (YES, NO):
            raise BadSampleError(f"{path}:{number}: the ground truth is {truth!r}, must be Yes or No")
        rows.append((image, truth.strip().lower(), response))
    firsts, seconds = rows[::2], rows[1::2]
    if not rows or len(firsts) != len(seconds):
        raise BadSampleError(f"{path}: {len(rows)} lines; every image must have exactly two")
    for number, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
        if first[0] != second[0]:
            raise BadSampleError(
                f"{path}: pair {number + 1} is about two images, {first[0]!r} and {second[0]!r}; the two questions of "
                f"an image must follow each other"
            )
    return rows


def score_task(rows: Sequence[tuple[str, str, str]]) -> TaskScore:
    """The score of the rows of `read_task`."""
    parsed = [parse_response(response) for _, _, response in rows]
    right = [answer == truth for answer, (_, truth, _) in zip(parsed, rows, strict=True)]
    both = [first and second for first, second in zip(right[::2], right[1::2], strict=True)]
    return TaskScore(len(both), sum(right) / len(right), sum(both) / len(both), parsed.count(OTHER))


def evaluate(
    results_dir: str | Path, data_dir: str | Path | None = None, *, lenient: bool = False
) -> dict[str, TaskScore]:
    """The score of every task that the folder has a file for, in the benchmark's order.

    Args:
        results_dir: folder of `<task>.txt`.
        data_dir: the benchmark's own folder; tasks that it does not have are not expected. None: all are.
        lenient: score the tasks that are there.

    Raises:
        BadSampleError: the folder has no file of a known task, a file of an unknown one, or a broken one; or (without
            `lenient`) a task has no file, or not a line for each question in `data_dir`.
    """
    paths = {path.stem: path for path in sorted(Path(results_dir).glob("*.txt"))}
    known = PERCEPTION + COGNITION
    if not paths or not paths.keys() <= set(known):
        raise BadSampleError(f"{results_dir}: has files of {sorted(paths)}, wanted <task>.txt with a task of {known}")
    if not lenient:
        _refuse_incomplete(Path(results_dir), paths, None if data_dir is None else _asked(Path(data_dir)))
    return {task: score_task(read_task(paths[task])) for task in known if task in paths}


def _asked(data_dir: Path) -> dict[str, int]:
    """Number of questions of each known task in the benchmark's folder."""
    files = [*data_dir.glob("*/*.txt"), *data_dir.glob("*/questions_answers_YN/*.txt")]
    counts: Counter[str] = Counter()
    for path in files:
        task = path.relative_to(data_dir).parts[0]
        if task in PERCEPTION + COGNITION:
            counts[task] += sum(bool(line.strip()) for line in data_text(path).splitlines())
    if not counts:
        raise BadSampleError(f"{data_dir}: no questions here, wanted <task>/<image>.txt")
    return dict(counts)


def _refuse_incomplete(results_dir: Path, paths: dict[str, Path], asked: dict[str, int] | None) -> None:
    """Raise if a task has no file, or (where the numbers of questions are known) not a line for each question."""
    missing = [task for task in (PERCEPTION + COGNITION if asked is None else asked) if task not in paths]
    if missing:
        raise BadSampleError(
            f"{results_dir}: no answers to {len(missing)} tasks: {', '.join(sorted(missing))}. Answer them first; or "
            "pass the benchmark's folder as --data-dir if it has no others, or --lenient to add up those that are there"
        )
    for task, number in (asked or {}).items():
        found = len(read_task(paths[task]))
        if found != number:
            raise BadSampleError(
                f"{paths[task]}: {found} answers to {number} questions of the task; answer all of them first, or pass "
                "--lenient"
            )


def totals(scores: dict[str, TaskScore]) -> dict[str, float]:
    """Sum of the scores of each group that has a task here."""
    sums = {group: [scores[task].score for task in tasks if task in scores] for group, tasks in GROUPS.items()}
    return {group: sum(values) for group, values in sums.items() if values}


def table(scores: dict[str, TaskScore]) -> str:
    """What the program prints: groups with their totals, tasks with accuracy, accuracy+ and score."""
    lines = []
    for group, total in totals(scores).items():
        present = [task for task in GROUPS[group] if task in scores]
        lines.append(f"=========== {group} ===========")
        lines.append(f"total score: {total}" + ("" if len(present) == len(GROUPS[group]) else "  (some tasks missing)"))
        for task in present:
            one = scores[task]
            lines.append(
                f"\t {task}  score: {one.score}  acc: {one.accuracy * 100:.2f}  acc+: {one.accuracy_plus * 100:.2f}  "
                f"images: {one.images}  neither yes nor no: {one.other}"
            )
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """The option of the benchmark's own tool, and `--output`."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.eval_mme", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results_dir", "--results-dir", type=str, required=True, help="folder with <task>.txt files")
    parser.add_argument("--data-dir", type=str, default=None, help="MME_Benchmark_release_version: what was asked")
    parser.add_argument("--output", type=str, default=None, help="write the scores as JSON here, too")
    add_lenient(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, TaskScore]:
    """Run the program.

    Raises:
        BadSampleError: see `evaluate`.
    """
    args = build_parser().parse_args(argv)
    if args.output is not None:
        read = [Input("--results_dir", path) for path in sorted(Path(args.results_dir).glob("*.txt"))]
        read += [Input("--data-dir", args.data_dir)]
        refuse_file("--output", args.output, read)
    scores = evaluate(args.results_dir, args.data_dir, lenient=args.lenient)
    print(table(scores))
    if args.output is not None:
        tasks = {task: asdict(one) | {"score": one.score} for task, one in scores.items()}
        replace_text(args.output, json.dumps({"totals": totals(scores), "tasks": tasks}, indent=2) + "\n")
    return scores


if __name__ == "__main__":
    run_program(main)
