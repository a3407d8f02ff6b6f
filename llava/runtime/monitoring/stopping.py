"""Early stopping that survives an interruption, and what the options of the best checkpoint need."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

PREFIX = "eval_"
PATIENCE_HELP = (
    "stop after this many evaluations in a row in which --metric_for_best_model is not better than before; not given: "
    "never"
)
NEEDS_EVALUATIONS = "needs evaluations; pass --eval_strategy steps (with --eval_steps) or epoch"
THRESHOLD_HELP = "by how much --metric_for_best_model has to be better to count for --early_stopping_patience"


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, which goes on counting when a run resumes, and stays stopped."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take over the count of the checkpoint; transformers begins again at 0."""
        name = type(self).__name__
        stored = state.stateful_callbacks.setdefault(name, self.state())
        self.early_stopping_patience_counter = stored["attributes"]["early_stopping_patience_counter"]
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True


def early_stopping(patience: int | None, threshold: float) -> list[EarlyStopping]:
    """The callbacks of `--early_stopping_patience` and `--early_stopping_threshold`."""
    return [] if patience is None else [EarlyStopping(patience, threshold)]


def metric_key(name: str) -> str:
    """The key of `--metric_for_best_model` among the metrics of an evaluation."""
    return name if name.startswith(PREFIX) else f"{PREFIX}{name}"


def uses_metric(training: TrainingArguments, patience: int | None) -> bool:
    """True if what an evaluation measures decides what is saved, or when the run ends."""
    return bool(training.load_best_model_at_end or training.save_strategy == "best" or patience is not None)


def choose_metric(training: TrainingArguments, patience: int | None) -> None:
    """The loss where evaluations decide and no metric is named, as transformers does for `--load_best_model_at_end`."""
    if uses_metric(training, patience) and training.metric_for_best_model is None:
        training.metric_for_best_model = "loss"
        training.greater_is_better = False if training.greater_is_better is None else training.greater_is_better


def best_problems(training: TrainingArguments, patience: int | None) -> list[str]:
    """What the table of transformers' options does not know of early stopping and the best checkpoint, a line each."""
    problems = []
    if patience is not None and training.eval_strategy == "no":
        problems.append(f"--early_stopping_patience: {NEEDS_EVALUATIONS}")
    if training.load_best_model_at_end and training.save_only_model and training.deepspeed:
        problems.append(
            "--load_best_model_at_end with --save_only_model: under DeepSpeed the best weights are read from the state "
            "of the optimizer, which would not be saved; leave --save_only_model out"
        )
    return problems
