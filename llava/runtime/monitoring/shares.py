"""The batches of an evaluation, shared out over the processes so that all of them make the same number of passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

LEFT_OUT = "left_out"
"""Key of an item: why it is no row that counts (it then has the shape of one); and of a batch: those of its items."""


class ShareSampler(Sampler[list[int]]):
    """The batches of one process: every `processes`-th, in the order of the rows.

    Where their number does not divide, the last batch comes again in some processes and counts in none of them: layers
    that are split over the processes are gathered by all of them together.

    Args:
        rows: of the data.
        batch_size: rows in a batch.
        process: number of this process.
        processes: how many there are.
    """

    def __init__(self, rows: int, batch_size: int, process: int, processes: int) -> None:
        self.batches = [list(range(start, min(start + batch_size, rows))) for start in range(0, rows, batch_size)]
        self.numbers = range(process, -(-len(self.batches) // processes) * processes, processes)

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches[min(number, len(self.batches) - 1)] for number in self.numbers)

    def counted(self) -> Iterator[bool]:
        """Of each batch, whether it counts."""
        return iter(number < len(self.batches) for number in self.numbers)


def _collate(collate: Callable[[Sequence[Any]], Any], items: Sequence[Any]) -> Any:
    reasons = [item.get(LEFT_OUT) if isinstance(item, dict) else None for item in items]
    return {**collate(items), LEFT_OUT: reasons}


def share_loader(
    dataset: Dataset, collate: Callable[[Sequence[Any]], Any], sampler: ShareSampler, **loading: Any
) -> DataLoader:
    """The batches of a process as `collate` makes them, and under `LEFT_OUT` why an item of them does not count.

    Args:
        dataset: the rows.
        collate: makes a batch of items.
        sampler: chooses them.
        loading: further arguments of torch's DataLoader, as the training has them.
    """
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=partial(_collate, collate), **loading)
