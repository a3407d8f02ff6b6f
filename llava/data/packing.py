"""Which samples of a micro batch share a row (`--packing True`): as few positions as possible, none cut.

The samples of a micro batch, and so of an update, are those that they would be without packing; only their places
differ. What keeps them apart is in `llava.segments.PackedRows`.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple


class Place(NamedTuple):
    """Where a sample begins: its row, and the position in it."""

    row: int
    start: int


def arrange(lengths: Sequence[int], capacity: int | None) -> list[Place]:
    """Place samples in rows of at most `capacity` positions.

    Tried is every number of rows, samples going to the shortest row, the longest sample first. Taken is what has the
    fewest positions, padding included; the fewest rows among equals. One sample a row is among the choices, so a
    packed batch is never larger than one without packing.

    Args:
        lengths: positions of each sample, images spliced in.
        capacity: longest row; None for no limit. A longer sample has a row of its own.

    Returns:
        The place of each sample; a row has its samples in the order of `lengths`.
    """
    longest, total = max(lengths, default=0), sum(lengths)
    room = max(longest, total if capacity is None else capacity)
    best: list[list[int]] = []
    smallest = 0
    for rows in range(1, len(lengths) + 1):
        if rows * room < total:
            continue
        members, widest = _balanced(lengths, rows)
        if widest <= room and (not best or rows * widest < smallest):
            best, smallest = members, rows * widest
    places = [Place(0, 0)] * len(lengths)
    for row, samples in enumerate(sorted(map(sorted, best))):
        start = 0
        for sample in samples:
            places[sample] = Place(row, start)
            start += lengths[sample]
    return places


def _balanced(lengths: Sequence[int], rows: int) -> tuple[list[list[int]], int]:
    """The samples of each of so many rows, about equally long, and the length of the longest row."""
    members: list[list[int]] = [[] for _ in range(rows)]
    loads = [(0, row) for row in range(rows)]
    for sample in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        load, row = loads[0]
        members[row].append(sample)
        heapq.heapreplace(loads, (load + lengths[sample], row))
    return [each for each in members if each], max(load for load, _ in loads)
