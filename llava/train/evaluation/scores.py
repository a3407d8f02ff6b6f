"""Questions to scores in the middle of a run: asked, written, scored by one process, and shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from llava.data.trained_template import conv_mode_of_version
from llava.eval.answering.answers import Row
from llava.eval.answering.loading import LoadedModel
from llava.eval.outcomes import Outcome
from llava.runtime.output import replace_text
from llava.train.evaluation.asking import NAME, ask_all
from llava.train.evaluation.questions import QuestionSet, question_sets
from llava.train.evaluation.tables import ShownAnswer, show_answers
from llava.train.options import RunArguments

FOLDER = "evaluation"
"""In the output folder: the answers of each evaluation."""


@dataclass(frozen=True)
class _Answered:
    """Questions with the latest answers."""

    questions: QuestionSet
    rows: list[Row]
    outcome: Outcome


class Examination:
    """The questions of a run.

    Args:
        run: options of the run.
        sets: the questions.
    """

    def __init__(self, run: RunArguments, sets: Sequence[QuestionSet]) -> None:
        self.run, self.sets = run, list(sets)
        self._latest: list[_Answered] = []  # in the process that scores

    def scores(self, loaded: LoadedModel, update: int) -> dict[str, float]:
        """Ask and score everything; `<name>_<score>`, the same in all processes.

        Args:
            loaded: the model, in evaluation mode.
            update: number of updates that it has made.

        Raises:
            LlavaError: a question or an image cannot be read, or the answers cannot be scored.
        """
        training = self.run.training
        conv_mode = conv_mode_of_version(str(self.run.model.version))
        batch, process, processes = training.per_device_eval_batch_size, training.process_index, training.world_size
        self._latest = []
        found: dict[str, float] = {}
        for questions in self.sets:
            texts = ask_all(questions, loaded, conv_mode, batch, process, processes)
            scores = [self._scored(questions, texts, update) if training.process_index == 0 else {}]
            found |= (broadcast_object_list(scores) if processes > 1 else scores)[0]
        return found

    def _scored(self, questions: QuestionSet, texts: Sequence[str], update: int) -> dict[str, float]:
        """Write the answers, then score them."""
        rows = [questions.to_row(task, text, NAME) for task, text in zip(questions.tasks, texts, strict=True)]
        path = Path(self.run.training.output_dir) / FOLDER / questions.name / f"update-{update}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, "".join(json.dumps(row) + "\n" for row in rows), check=False)
        outcome = questions.score(path, rows)
        self._latest.append(_Answered(questions, rows, outcome))
        if not outcome.metrics:
            note = outcome.note or "not scored here"
            print(f"evaluation  {questions.name}: {note}; the answers are in {path}")
        return {f"{questions.name}_{name.replace(' ', '_')}": float(v) for name, v in outcome.metrics.items()}

    def show(self, callbacks: Sequence[TrainerCallback], update: int) -> None:
        """Show the first of the latest answers where the run reports to."""
        for answered in self._latest:
            rows = shown_answers(answered.questions, answered.rows, answered.outcome, self.run.evaluation.eval_shown)
            if rows:
                show_answers(callbacks, answered.questions.name, rows, update)


def shown_answers(questions: QuestionSet, rows: Sequence[Row], outcome: Outcome, count: int) -> list[ShownAnswer]:
    """The first answers, with label and score where the outcome has them."""
    scored = {str(one.get("question_id")): one for one in outcome.samples}
    shown = []
    for task, row in list(zip(questions.tasks, rows, strict=True))[:count]:
        known: dict[str, Any] = scored.get(str(task.question_id), {})
        label, score = known.get("label"), known.get("score")
        images = [questions.open_image(name, task.where) for name in task.images]
        text = row.get("text", row.get("response", ""))
        shown.append(ShownAnswer(task.question, text, None if label is None else str(label), score, images))
    return shown


def examination(args: RunArguments) -> Examination | None:
    """The questions that the options name, read and checked; None if they name none."""
    if not args.evaluation.eval_questions:
        return None
    return Examination(args, question_sets(args.evaluation, args.data.image_folder))
