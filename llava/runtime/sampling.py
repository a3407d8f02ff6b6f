"""The order of the training data: a stream of its own, the same after every interruption.

The original draws the order from the global random state after `set_seed`. Here a private generator replays exactly
those draws, so the order is the original's, yet does not depend on dropout or on where a run was resumed. Orders by
length and modality are upstream's (`llava/train/llava_trainer.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

from llava.errors import FlagError

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


def split_to_even_chunks(indices: Sequence[int], lengths: Sequence[int], num_chunks: int) -> list[list[int]]:
    """Share out indices over chunks of equal size and similar total length.

    Each index goes to the lightest chunk that is not full, the first of equals; a number of indices that
    `num_chunks` does not divide is dealt out in turn instead.
    """
    if len(indices) % num_chunks:
        return [list(indices[start::num_chunks]) for start in range(num_chunks)]
    size = len(indices) // num_chunks
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    totals = [0.0] * num_chunks
    for index in indices:
        lightest = totals.index(min(totals))
        chunks[lightest].append(index)
        totals[lightest] += lengths[index]
        if len(chunks[lightest]) == size:
            totals[lightest] = float("inf")
    return chunks


def get_length_grouped_indices(
    lengths: Sequence[int],
    batch_size: int,
    world_size: int,
    generator: torch.Generator | None = None,
) -> list[int]:
    """A random order in which the rows of one megabatch (`world_size * batch_size`) have similar lengths.

    Args:
        lengths: length of each row.
        batch_size: rows per device and step.
        world_size: devices, times gradient accumulation steps.
        generator: source of randomness; None means torch's global one.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    indices = []
    for megabatch in _megabatches(order, world_size * batch_size):
        megabatch.sort(key=lambda index: lengths[index], reverse=True)
        for chunk in split_to_even_chunks(megabatch, lengths, world_size):
            indices += chunk
    return indices


def get_modality_length_grouped_indices(
    lengths: Sequence[int],
    batch_size: int,
    world_size: int,
    generator: torch.Generator | None = None,
) -> list[int]:
    """As `get_length_grouped_indices`, but no megabatch except the last mixes rows with and without image.

    Rows of one modality are ordered with torch's global generator even if another is given, and text-only data comes
    shortest row first within a megabatch: the order of published runs depends on both.

    Args:
        lengths: length of each row, negative for one without image.
        batch_size: rows per device and step.
        world_size: devices, times gradient accumulation steps.
        generator: source of randomness for the order of the megabatches; None means torch's global one.

    Raises:
        FlagError: a row has length 0, so that its modality is unknown.
    """
    if 0 in lengths:
        raise FlagError(
            f"--group_by_modality_length: row {list(lengths).index(0)} has no words, so whether it has an image cannot "
            "be seen from its length; remove the row"
        )
    if all(length > 0 for length in lengths) or all(length < 0 for length in lengths):
        return get_length_grouped_indices(lengths, batch_size, world_size, generator)
    size = world_size * batch_size
    megabatches: list[list[int]] = []
    leftover: list[int] = []
    for sign in (1, -1):
        rows = [index for index, length in enumerate(lengths) if sign * length > 0]
        order = get_length_grouped_indices([sign * lengths[index] for index in rows], batch_size, world_size)
        *full, last = _megabatches([rows[position] for position in order], size)
        megabatches += full
        leftover += last
    order = torch.randperm(len(megabatches), generator=generator).tolist()
    return [index for number in order for index in megabatches[number]] + sorted(leftover)


def _megabatches(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


class LengthGroupedSampler(Sampler[int]):
    """Samples every row once per epoch, rows of similar length together.

    Args:
        batch_size: rows per device and step.
        world_size: devices, times gradient accumulation steps.
        lengths: length of each row; negative for one without image if `group_by_modality`.
        generator: source of randomness; None means torch's global one.
        group_by_modality: keep rows with and without image apart.
    """

    def __init__(
        self,
        batch_size: int,
        world_size: int,
        lengths: Sequence[int],
        generator: torch.Generator | None = None,
        group_by_modality: bool = False,
    ) -> None:
        self.batch_size = batch_size
        self.world_size = world_size
        self.lengths = lengths
        self.generator = generator
        self.group_by_modality = group_by_modality

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        group = get_modality_length_grouped_indices if self.group_by_modality else get_length_grouped_indices
        return iter(group(self.lengths, self.batch_size, self.world_size, self.generator))
