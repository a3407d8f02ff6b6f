"""llava's Trainer with LaVIN's learning rate and LaVIN's epochs (`train.py`, `engine.py`)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Sampler

from llava.errors import FlagError
from llava.train.llava_trainer import LLaVATrainer
from mma.lavin.schedule import Epoch, Schedule, lavin_schedule


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


class WholeUpdates(Sampler[int]):
    """The first `size` indices of another sampler's epoch, from its beginning again where processes are evened out.

    Args:
        sampler: draws an epoch.
        size: indices in each epoch.
    """

    def __init__(self, sampler: Sampler[int], size: int) -> None:
        self.sampler, self.size = sampler, size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        indices = list(self.sampler)
        return (indices[position % len(indices)] for position in range(self.size))


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

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        sampler, args = super()._get_train_sampler(train_dataset), self.args
        group = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return None if sampler is None else WholeUpdates(sampler, self.epoch.updates * group)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """LaVIN's schedule."""
        if self.lr_scheduler is None:
            self.lr_scheduler = lavin_schedule(optimizer or self.optimizer, self.schedule, self.epoch)
            self._created_lr_scheduler = True
        return self.lr_scheduler
