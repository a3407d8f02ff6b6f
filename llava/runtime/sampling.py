"""The order of the training data: a stream of its own, the same after every interruption.

The original draws the order from the global random state after `set_seed`. Here a private generator replays exactly
those draws, so the order is the original's, yet does not depend on dropout or on where a run was resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

from llava.data.sampler import get_modality_length_grouped_indices

Order = Callable[[], list[int]]
"""Draws the indices of one epoch from torch's global CPU generator."""


def random_order(size: int) -> Order:
    """Uniform shuffling of `size` samples, drawn as torch's `RandomSampler` does."""

    def draw() -> list[int]:
        generator = torch.Generator()
        generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
        return torch.randperm(size, generator=generator).tolist()

    return draw


def modality_order(lengths: Sequence[int], batch_size: int, world_size: int) -> Order:
    """Batches of one modality and of similar length.

    Args:
        lengths: words per sample, negative for text-only samples.
        batch_size: samples per micro batch.
        world_size: ranks times accumulated micro batches.
    """
    return lambda: get_modality_length_grouped_indices(list(lengths), batch_size, world_size)


class EpochSampler(Sampler[int]):
    """Samples of an epoch in an order that depends on the seed and the epoch alone.

    Args:
        order: draws one epoch.
        size: samples per epoch.
        seed: seed of the run.
    """

    def __init__(self, order: Order, size: int, seed: int) -> None:
        self.order = order
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for _ in range(self.epoch + 1):
                torch.empty((), dtype=torch.int64).random_()  # what a DataLoader draws for its workers
                indices = self.order()
        return iter(indices)
