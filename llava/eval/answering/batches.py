"""Batches that become smaller when the memory of the device runs out; what everybody shares who asks many questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch

from llava.errors import FlagError
from llava.eval.answering.prefetch import Prefetcher

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
Result = TypeVar("Result")

FIRST_BATCH_SIZE = {"cpu": 8, "cuda": 64}
"""Where `--batch-size auto` begins; on other devices as on a CPU."""


def first_batch_size(device: str | torch.device, limit: int | None = None) -> int:
    """Where `auto` begins on a device, at most `limit`."""
    size = FIRST_BATCH_SIZE.get(torch.device(device).type, FIRST_BATCH_SIZE["cpu"])
    return size if limit is None else min(size, limit)


class Batches(Generic[Item, Loaded, Result]):
    """Iterates over finished batches: each as `Prefetcher.take` gave it, and what `work` made of it.

    Args:
        queue: items with what was loaded for them.
        work: carries out one batch.
        size: items in the first batch.
        fixed: True if exactly this size was asked for, so that smaller batches are no way out.
        say: told about a smaller size.

    Attributes:
        size: items in the batches from here on.
    """

    def __init__(
        self,
        queue: Prefetcher[Item, Loaded],
        work: Callable[[list[tuple[Item, Loaded]]], Result],
        size: int,
        *,
        fixed: bool,
        say: Callable[[str], object],
    ) -> None:
        self.size = size
        self._queue, self._work, self._fixed, self._say = queue, work, fixed, say

    def __iter__(self) -> Iterator[tuple[list[tuple[Item, Loaded]], Result]]:
        """Take batches until the queue is empty.

        Raises:
            FlagError: the memory of the device is too small for the size asked for, or for one item.
        """
        while self._queue:
            batch = self._queue.take(self.size)
            finished = False
            try:
                result = self._work(batch)
                finished = True
            except torch.OutOfMemoryError as error:
                self._check_that_less_helps(error)
            if finished:
                yield batch, result
                continue
            # Here nothing refers to the tensors of the failed batch any more.
            self.size = (self.size + 1) // 2
            self._say(f"out of memory: going on with batches of {self.size}")
            self._queue.put_back(batch)
            torch.cuda.empty_cache()

    def _check_that_less_helps(self, error: torch.OutOfMemoryError) -> None:
        """Raise if the batch is of the size that was asked for, or of one item."""
        if self._fixed and self.size > 1:
            raise FlagError(
                f"--batch-size {self.size}: the device ran out of memory; ask for fewer, or for --batch-size auto"
            ) from error
        if self.size == 1:
            raise FlagError(f"the device has too little memory for a single question: {error}") from error
