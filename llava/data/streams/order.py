"""The order of a stream: several sources mixed by draws, and rows shuffled in a buffer. A pass has each row once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def mixed(parts: Sequence[Iterator[T]], weights: Sequence[float], draws: np.random.Generator) -> Iterator[T]:
    """All items of all parts, each part in its order.

    Args:
        parts: the parts.
        weights: of each part, how likely it is that the next item is one of its items, until it has no more.
        draws: source of randomness.
    """
    left = list(range(len(parts)))
    while len(left) > 1:
        shares = np.cumsum([weights[number] for number in left])
        place = int(np.searchsorted(shares, draws.random() * shares[-1], side="right"))
        try:
            yield next(parts[left[place]])
        except StopIteration:
            del left[place]
    for number in left:
        yield from parts[number]


def shuffled(items: Iterator[T], size: int, draws: np.random.Generator) -> Iterator[T]:
    """All items, each drawn from a buffer of the next `size` ones that have not been drawn; 0 leaves the order."""
    if size == 0:
        yield from items
        return
    buffer: list[T] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        place = int(draws.integers(size))
        yield buffer[place]
        buffer[place] = item
    for place in draws.permutation(len(buffer)).tolist():
        yield buffer[place]
