"""The options of an evaluation in the middle of a run, and what of them cannot be carried out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from transformers import TrainingArguments

from llava.data.rows import source_problem
from llava.runtime.monitoring.stopping import (
    PATIENCE_HELP,
    THRESHOLD_HELP,
    best_problems,
    metric_key,
    uses_metric,
)
from llava.runtime.options import option
from llava.runtime.ranges import COUNT, NOT_NEGATIVE, range_problems

RANGES = {
    "eval_limit": COUNT,
    "eval_max_new_tokens": COUNT,
    "eval_shown": NOT_NEGATIVE,
    "early_stopping_patience": COUNT,
    "early_stopping_threshold": NOT_NEGATIVE,
}


@dataclass
class EvaluationArguments:
    """What the model is measured on while it is trained; when, --eval_strategy and --eval_steps say."""

    _argument_group_name: ClassVar[str] = "evaluation while training"

    eval_data_path: list[str] | None = option(
        "rows as those of --data_path; their loss is logged, also of rows with and without an image, and of each task"
    )
    eval_questions: list[str] | None = option(
        "benchmarks of python -m llava.eval (NAME or NAME:SPLIT), or question files with a label; they are answered "
        "and scored"
    )
    eval_image_folder: str | None = option("images of the question files; not given: those of --image_folder")
    eval_data_dir: str = option("folder of all benchmarks", "playground/data/eval")
    eval_limit: int | None = option("ask only this many questions of each benchmark or file, the first ones")
    eval_max_new_tokens: int | None = option("limit on an answer; not given: the benchmark's, 128 for question files")
    eval_shown: int = option("answers of each benchmark or file that are shown in wandb and TensorBoard", 8)
    early_stopping_patience: int | None = option(PATIENCE_HELP)
    early_stopping_threshold: float = option(THRESHOLD_HELP, 0.0)

    @property
    def measures(self) -> bool:
        """True if there is something to evaluate on."""
        return bool(self.eval_data_path or self.eval_questions)


def question_name(value: str) -> str:
    """What the metrics of a value of `--eval_questions` are called after: the benchmark, or the file's name."""
    return Path(value).stem if Path(value).is_file() else value.partition(":")[0]


def evaluation_problems(evaluation: EvaluationArguments, training: TrainingArguments) -> list[str]:
    """What cannot be carried out, one line each."""
    problems = list(range_problems(evaluation, RANGES))
    unread = filter(None, map(source_problem, evaluation.eval_data_path or []))
    problems += [problem.replace("--data_path", "--eval_data_path", 1) for problem in unread]
    if evaluation.eval_image_folder is not None and not Path(evaluation.eval_image_folder).is_dir():
        problems.append(f"--eval_image_folder {evaluation.eval_image_folder}: no such folder")
    names = Counter(map(question_name, evaluation.eval_questions or []))
    problems += [f"--eval_questions: two of them are called {name}" for name, count in names.items() if count > 1]
    if training.do_eval and not evaluation.measures:  # set by --eval_strategy too
        problems.append(
            f"--do_eval, or --eval_strategy {training.eval_strategy.value}: there is nothing to evaluate on; pass "
            "--eval_data_path or --eval_questions (of mma.train: --eval_split)"
        )
    if evaluation.measures and not training.do_eval:
        problems.append(
            "--eval_data_path and --eval_questions (of mma.train: --eval_split) have no effect without --eval_strategy "
            "steps (with --eval_steps) or epoch, or --do_eval True for one evaluation at the end"
        )
    if training.fsdp and evaluation.eval_questions:
        problems.append(
            "--eval_questions with --fsdp: processes whose answers have different lengths would wait for each other; "
            "pass --eval_data_path for the loss, and score the checkpoints afterwards (docs/evaluation.md)"
        )
    problems += best_problems(training, evaluation.early_stopping_patience)
    if uses_metric(training, evaluation.early_stopping_patience) and evaluation.measures:
        problems += _metric_problems(evaluation, training, names)
    return problems


def _metric_problems(evaluation: EvaluationArguments, training: TrainingArguments, names: Counter[str]) -> list[str]:
    """A `--metric_for_best_model` that nothing will measure, as far as its name tells."""
    metric = metric_key(str(training.metric_for_best_model)).removeprefix("eval_")
    measured = metric.endswith("loss") and bool(evaluation.eval_data_path)
    measured = measured or any(metric.startswith(f"{name}_") for name in names)
    if measured:
        return []
    known = ["loss, image_loss, text_loss or task_<task>_loss"] if evaluation.eval_data_path else []
    known += [f"{name}_<score>" for name in names]
    problem = (
        f"--metric_for_best_model {training.metric_for_best_model}: nothing measures it; with these options it can be "
        f"{', '.join(known)} (the first evaluation lists the names)"
    )
    return [problem]
