"""LaVIN's learning rate (`util/lr_sched.py`, `train.py`) as a schedule of torch.

The base rate counts for 256 samples per update. It rises in a line over the first epochs and falls in half a cosine to
`min_lr`; the rate of an update is that of the fraction of an epoch at which its first batch begins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

BASE_SAMPLES = 256
"""Samples per update for which `--blr` is the learning rate."""


def absolute_learning_rate(blr: float, batch_size: int, accum_iter: int, world_size: int) -> float:
    """Learning rate of a run from the base rate and the samples of one update."""
    return blr * batch_size * accum_iter * world_size / BASE_SAMPLES


@dataclass(frozen=True)
class Schedule:
    """How the learning rate goes.

    Attributes:
        learning_rate: highest rate.
        epochs: epochs of the whole run.
        warmup_epochs: epochs, or a fraction of one, in which the rate rises.
        min_lr: rate at the end.
    """

    learning_rate: float
    epochs: int
    warmup_epochs: float
    min_lr: float = 0.0

    def at(self, epoch: float) -> float:
        """The rate after so many epochs."""
        if epoch < self.warmup_epochs:
            return self.learning_rate * epoch / self.warmup_epochs
        done = (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        return self.min_lr + (self.learning_rate - self.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Epoch:
    """The updates of one epoch on each process.

    The original leaves out a last incomplete batch, and the gradients of a last incomplete group of batches.

    Attributes:
        batches: batches of one process, those of an incomplete group included.
        accum_iter: batches of one update.
    """

    batches: int
    accum_iter: int

    @property
    def updates(self) -> int:
        """Updates in an epoch."""
        return self.batches // self.accum_iter

    def begin(self, update: int) -> float:
        """The fraction of epochs at which update `update` (from 0) of a run begins."""
        epoch, number = divmod(update, self.updates)
        return epoch + number * self.accum_iter / self.batches


def lavin_schedule(optimizer: Optimizer, schedule: Schedule, epoch: Epoch) -> LambdaLR:
    """The schedule of a run; groups with another rate keep their ratio to it."""

    def factor(update: int) -> float:
        # One more value is asked for after the last update.
        return schedule.at(min(epoch.begin(update), schedule.epochs)) / schedule.learning_rate

    return LambdaLR(optimizer, factor)
