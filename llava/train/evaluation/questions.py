"""What `--eval_questions` names: questions with all that is needed to answer and to score them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.errors import BadSampleError, FlagError
from llava.eval.answering.answers import Row, Task, ToRow, answer_row
from llava.eval.answering.questions import Question, read_questions
from llava.eval.answering.runner import OpenImage
from llava.eval.benchmarks import BENCHMARKS, SHORT, images_in, read_jsonl_tasks
from llava.eval.outcomes import BenchmarkRun, Outcome, sample
from llava.eval.score import ALL, score_answers
from llava.eval.scoring.matching import id_of
from llava.train.evaluation.options import EvaluationArguments, question_name

Score = Callable[[Path, Sequence[Row]], Outcome]
"""From an answers file and its rows, in the order of the tasks, to scores."""


@dataclass(frozen=True)
class QuestionSet:
    """Questions of one benchmark or file.

    Attributes:
        name: what its metrics are called after.
        tasks: what is asked.
        open_image: opens an image of a task.
        max_new_tokens: limit on an answer.
        to_row: makes the row of an answer.
        score: scores the answers.
    """

    name: str
    tasks: Sequence[Task]
    open_image: OpenImage
    max_new_tokens: int
    to_row: ToRow
    score: Score


def question_sets(evaluation: EvaluationArguments, image_folder: str | None) -> list[QuestionSet]:
    """All that the options name, read and checked.

    Args:
        evaluation: the options.
        image_folder: `--image_folder`, for question files without an `--eval_image_folder`.

    Raises:
        FlagError: a name is neither a benchmark nor a file.
        BadSampleError: a file is missing or broken.
    """
    found = []
    for value in evaluation.eval_questions or []:
        path = Path(value)
        folder = Path(evaluation.eval_image_folder or image_folder or "")
        found.append(_of_file(path, folder, evaluation) if path.is_file() else _of_benchmark(value, evaluation))
    return found


def _of_benchmark(value: str, evaluation: EvaluationArguments) -> QuestionSet:
    name, _, split = value.partition(":")
    if name not in BENCHMARKS:
        raise FlagError(
            f"--eval_questions {value}: is neither a file nor a benchmark; the benchmarks are {', '.join(BENCHMARKS)}"
        )
    benchmark = BENCHMARKS[name]
    split = split or benchmark.splits[0]
    data = Path(evaluation.eval_data_dir) / benchmark.folder
    questions, images = (data / part.format(split=split) for part in (benchmark.questions, benchmark.images))
    tasks = benchmark.read(questions)[: evaluation.eval_limit]

    def score(answers: Path, rows: Sequence[Row]) -> Outcome:
        # Never as complete: files for servers are written of a finished model, not in the middle of its training.
        return benchmark.finish(
            BenchmarkRun(data, questions, answers, split, f"training-{answers.stem}", tasks, rows, complete=False)
        )

    limit = evaluation.eval_max_new_tokens or benchmark.max_new_tokens
    return QuestionSet(name, tasks, benchmark.open_images(images), limit, benchmark.to_row, score)


def _of_file(path: Path, images: Path, evaluation: EvaluationArguments) -> QuestionSet:
    questions = read_questions(path)[: evaluation.eval_limit]
    _refuse_unfit(path, questions)
    tasks = read_jsonl_tasks(path)[: evaluation.eval_limit]

    def score(answers: Path, rows: Sequence[Row]) -> Outcome:
        return score_file(questions, tasks, rows)

    limit = evaluation.eval_max_new_tokens or SHORT
    return QuestionSet(question_name(str(path)), tasks, images_in(images), limit, answer_row, score)


def _refuse_unfit(path: Path, questions: Sequence[Question]) -> None:
    """Refuse what could not be scored, before the run."""
    unlabeled = [question.where for question in questions if question.label is None]
    if unlabeled and len(unlabeled) < len(questions):
        raise BadSampleError(f"{path}: {len(unlabeled)} of {len(questions)} questions have no 'label' ({unlabeled[0]})")
    ids = [id_of(question.question_id) for question in questions]
    if len(set(ids)) < len(ids):
        again = next(question for place, question in enumerate(questions) if ids[place] in ids[:place])
        raise BadSampleError(f"{again.where}: an earlier question has the question_id {again.question_id!r} too")


def score_file(questions: Sequence[Question], tasks: Sequence[Task], rows: Sequence[Row]) -> Outcome:
    """Percent of exact answers, over all and by category; without labels, the answers alone."""
    labels = [question.label for question in questions]
    if None in labels:
        scored = [{"question_id": t.question_id, "text": row["text"]} for t, row in zip(tasks, rows, strict=True)]
        return Outcome(samples=scored, note="the questions have no label")
    scores = score_answers(questions, {row["question_id"]: row["text"] for row in rows})
    metrics = {"accuracy": 100 * scores[ALL].accuracy}
    if len(scores) > 2:
        metrics |= {f"{name} accuracy": 100 * one.accuracy for name, one in scores.items() if name != ALL}
    samples = []
    for question, task, row in zip(questions, tasks, rows, strict=True):
        right = score_answers([question], {question.question_id: row["text"]})[ALL].accuracy
        samples.append(sample(task, row, question.label, right))
    return Outcome(metrics, samples)
