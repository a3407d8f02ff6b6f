"""A Trainer that says how fast it trains. Knows nothing of the model, as the classes it is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llava.runtime.monitoring.speed import SpeedMeter, shifted_targets
from llava.runtime.resumable_trainer import ResumableTrainer


class MonitoredTrainer(ResumableTrainer):
    """Trainer whose lines of progress have rates, memory and the time that is left."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.speed = SpeedMeter(self.args.device)

    def count_targets(self, batch: Mapping[str, Any]) -> Tensor:
        """Trained tokens of a micro batch, int64 scalar; a model that changes its sequences counts in its own way."""
        return shifted_targets(batch["labels"])

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """The batches of one update, counted; errors as of the base class."""
        self.speed.begin(self.state.global_step)
        found = super().get_batch_samples(epoch_iterator, *args, **kwargs)
        for batch in found[0]:
            self.speed.add(len(batch["input_ids"]), self.count_targets(batch))
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the speed to a line of progress, and put that of the whole run right in its last line."""
        if "loss" in logs:
            logs |= self.speed.line(self.accelerator.gather, self.state.global_step, self.state.max_steps)
        if logs.get("train_runtime"):
            samples = torch.tensor([self.speed.all_samples], device=self.args.device)
            made = self.state.global_step - self.updates_before
            # transformers below 5.24 counts the updates that were made before a run was resumed too.
            logs["train_samples_per_second"] = round(
                self.accelerator.gather(samples).sum().item() / logs["train_runtime"], 3
            )
            logs["train_steps_per_second"] = round(made / logs["train_runtime"], 3)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.speed.paused():
            super()._save_checkpoint(model, trial)
