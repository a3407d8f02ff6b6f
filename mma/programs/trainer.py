"""llava's Trainer with LaVIN's learning rate and LaVIN's epochs (`train.py`, `engine.py`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from llava.errors import FlagError
from llava.train.llava_trainer import LLaVATrainer
from llava.train.sampling import EpochSampler
from mma.schedule import Epoch, Schedule, lavin_schedule


def epoch_of(samples: int, batch_size: int, accum_iter: int, world_size: int) -> Epoch:
    """The updates of an epoch: each process has an equal share of whole batches and whole groups.

    Raises:
        FlagError: there are too few samples for one update.
    """
    share = math.ceil(samples / world_size)
    epoch = Epoch(share // batch_size, accum_iter)
    if not epoch.updates:
        raise FlagError(
            f"{samples} samples are too few for one update of {batch_size * accum_iter * world_size}: --batch_size "
            f"{batch_size} times --accum_iter {accum_iter} times {world_size} process(es)"
        )
    return epoch


def whole_updates(indices: Sequence[int], size: int) -> list[int]:
    """The first `size` of an epoch's indices, from its beginning again where processes have to be evened out."""
    return [indices[position % len(indices)] for position in range(size)]


class LavinTrainer(LLaVATrainer):
    """Trainer whose learning rate follows fractions of epochs, and whose epochs are whole updates.

    Args:
        schedule: of the learning rate.
        kwargs: as `LLaVATrainer` takes them.
    """

    def __init__(self, *, schedule: Schedule, **kwargs: Any) -> None:
        self.schedule = schedule
        super().__init__(**kwargs)

    @property
    def epoch(self) -> Epoch:
        """The updates of an epoch."""
        args = self.args
        return epoch_of(
            len(self.train_dataset), args.train_batch_size, args.gradient_accumulation_steps, args.world_size
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, EpochSampler):
            return sampler
        args, order = self.args, sampler.order
        group = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        size = self.epoch.updates * group
        return EpochSampler(lambda: whole_updates(order(), size), size, sampler.seed)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """LaVIN's schedule."""
        if self.lr_scheduler is None:
            self.lr_scheduler = lavin_schedule(optimizer or self.optimizer, self.schedule, self.epoch)
            self._created_lr_scheduler = True
        return self.lr_scheduler
