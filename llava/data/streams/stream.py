"""The rows of one process: pass after pass over its share of all sources, without an end, from any position.

What is at a position depends on the sources, the seed, the buffer and the share alone, so that a position, which
follows from the number of updates, is all that a resumed run needs. The rows before it are read again, their images are
not opened.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from llava.data.streams.order import mixed, shuffled
from llava.data.streams.sources import Share, Source, StreamRow
from llava.errors import FlagError

MIXTURE, ORDER = 0, 1
"""Streams of random numbers of a pass: which source is next, and the order within the buffer."""


@dataclass(frozen=True)
class RowStream:
    """The rows of a process, without an end.

    Attributes:
        sources: see `open_sources`.
        share: which rows are those of this process.
        seed: of everything that is drawn.
        buffer: rows among which the next one is drawn; 0 keeps the order of each source.
        keeps: whether a row is trained on; others are left out before anything is drawn.
    """

    sources: Sequence[Source]
    share: Share
    seed: int
    buffer: int
    keeps: Callable[[StreamRow], bool] = lambda row: True

    def rows(self, start: int = 0) -> Iterator[StreamRow]:
        """The rows from a position on; every pass has as many, so whole passes are passed over unread.

        Raises:
            FlagError: a pass has no row, or a source cannot be read.
        """
        number, skip = 0, start
        while True:
            count = 0
            for row in self.one_pass(number):
                count += 1
                if count > skip:
                    yield row
            if count == 0:
                raise FlagError(self._nothing())
            skip = max(0, skip - count)
            number += 1 + skip // count
            skip %= count

    def one_pass(self, number: int) -> Iterator[StreamRow]:
        """All rows of a pass, each as often as the weight of its source says."""
        parts = [
            filter(self.keeps, source.rows(self.share, self.seed + place)) for place, source in enumerate(self.sources)
        ]
        weights = [source.weight for source in self.sources]
        return shuffled(mixed(parts, weights, self._draws(number, MIXTURE)), self.buffer, self._draws(number, ORDER))

    def check(self) -> None:
        """Read the first row of each source.

        Raises:
            FlagError: a source cannot be read or has none for this process, or no row is left to train on.
        """
        for source in self.sources:
            if next(source.values(self.share), None) is None:
                of = f" for process {self.share.process + 1} of {self.share.processes}" if self.share.process else ""
                raise FlagError(f"--data_path {source.name}: the file holds no rows{of}")
        if next(self.one_pass(0), None) is None:
            raise FlagError(self._nothing())

    def _draws(self, number: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, number, stream, self.share.process])

    def _nothing(self) -> str:
        names = " ".join(source.name for source in self.sources)
        return f"--data_path {names}: no row is left to train on in process {self.share.process + 1}"


class LookAhead:
    """A stream by position, forwards only.

    Args:
        stream: the rows.
        start: the first position that is asked for.
    """

    def __init__(self, stream: RowStream, start: int) -> None:
        self._rows = stream.rows(start)
        self._first = start
        self._held: deque[StreamRow] = deque()

    def forget_before(self, position: int) -> None:
        """Go to a position; what is before it cannot be asked for any more."""
        while self._first < position:
            if self._held:
                self._held.popleft()
            else:
                next(self._rows)
            self._first += 1

    def __getitem__(self, position: int) -> StreamRow:
        missing = position - self._first - len(self._held) + 1
        self._held.extend(islice(self._rows, max(0, missing)))
        return self._held[position - self._first]
