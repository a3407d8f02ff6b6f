"""The protocol of all readers: a sequence of rows in LLaVA's form that knows its file and the sizes of its rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llava.data.formats.conversations import to_llava
from llava.data.sizes import SIZES, UNCOUNTED, Size, count
from llava.errors import BadSampleError

Row = dict[str, Any]
"""`{"id": ..., "image": name or list of names, "conversations": [{"from": ..., "value": ...}, ...]}`."""


class Rows(Sequence[Row]):
    """Rows of one data file, read one at a time and brought into LLaVA's form (`conversations.py`).

    A format implements `__len__` and `value`; one that finds the sizes on the way implements `sizes` as well.

    Attributes:
        path: the file or folder, for messages and for the list of skipped rows.

    Raises:
        BadSampleError: on access, the row is not an object; the message names file and row.
    """

    path: Path

    @abstractmethod
    def value(self, index: int) -> Any:
        """What the file has as row `index`, which is checked by `__getitem__`.

        Raises:
            BadSampleError: it cannot be read; the message names file and row.
        """

    def __getitem__(self, index: int) -> Row:
        return llava_row(self.value(index), self.name(index))

    def name(self, index: int) -> str:
        """What to call a row in a message; rows are counted from 0 and blank lines are not."""
        return f"{self.path}, row {index}"

    def size(self, index: int) -> Size | None:
        """Words and images of a row; None if they cannot be counted."""
        if "sizes" in self.__dict__:
            return stored_size(self.sizes[index])
        return self._count(index)

    def _count(self, index: int) -> Size | None:
        try:
            return count(self[index])
        except BadSampleError:
            return None

    @cached_property
    def sizes(self) -> np.ndarray:
        """Words and images of all rows, `SIZES` (rows,); counted once, without opening an image."""
        return table_of(self._count(index) for index in range(len(self)))


def llava_row(value: Any, name: str) -> Row:
    """What a file has as a row, in LLaVA's form.

    Raises:
        BadSampleError: it is not an object, or has no form that is known; begins with `name`.
    """
    if not isinstance(value, dict):
        raise BadSampleError(f"{name} is no JSON object but {value!r:.80}")
    try:
        return to_llava(value)
    except BadSampleError as error:
        raise BadSampleError(f"{name}: {error}") from error


def stored_size(entry: np.void) -> Size | None:
    """A row's entry in a table of `SIZES`; None if the row could not be counted."""
    return None if entry["words"] == UNCOUNTED else Size(int(entry["words"]), int(entry["images"]))


def count_value(value: Any) -> Size | None:
    """Words and images of what a file has as a row; None if they cannot be counted."""
    try:
        return count(to_llava(value)) if isinstance(value, dict) else None
    except BadSampleError:
        return None


def table_of(sizes: Iterable[Size | None]) -> np.ndarray:
    """Sizes of rows as `SIZES` (rows,)."""
    entries: Iterator[tuple[int, int]] = ((UNCOUNTED, 0) if size is None else size for size in sizes)
    return np.fromiter(entries, SIZES)


class MemoryRows(Rows):
    """Rows that a program has made.

    Args:
        path: what they were made of.
        values: the rows.
    """

    def __init__(self, path: Path, values: Sequence[Any]) -> None:
        self.path = path
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def value(self, index: int) -> Any:
        """A row as it was given."""
        return self._values[index]
