"""The rows of a run: one data file or several, one after the other, or some of their rows.

A file is opened by the reader of its format (`llava/data/formats/`); every reader gives rows in the form of LLaVA's.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from llava.data.formats.json_file import JsonRows
from llava.data.formats.json_scan import BYTE_ORDER_MARK
from llava.data.formats.reader import MemoryRows, Row, Rows, stored_size
from llava.data.sizes import Size
from llava.errors import FlagError

__all__ = ["BYTE_ORDER_MARK", "MemoryRows", "Row", "RowFiles", "Rows", "open_rows"]


class RowFiles(Sequence[Row]):
    """Rows of several data files, one file after the other.

    Raises:
        BadSampleError: on access, the row is no JSON object; the message names file and row.
    """

    def __init__(self, files: Sequence[Rows], chosen: Sequence[int] | None = None) -> None:
        self.files = list(files)
        self._ends = list(accumulate(map(len, self.files)))
        self._chosen = None if chosen is None else np.asarray(chosen, dtype=np.int64)

    def select(self, rows: Sequence[int]) -> RowFiles:
        """Some of the rows as rows of their own; messages keep naming each by file and number in it."""
        return RowFiles(self.files, rows if self._chosen is None else self._chosen[np.asarray(rows, dtype=np.int64)])

    def __len__(self) -> int:
        return self._ends[-1] if self._chosen is None else len(self._chosen)

    def __getitem__(self, index: int) -> Row:
        file, row = self._locate(index)
        return file[row]

    def name(self, index: int) -> str:
        """What to call a row in a message: its file, and its number in it."""
        file, row = self._locate(index)
        return file.name(row)

    def source(self, index: int) -> tuple[Path, int]:
        """File of a row and its number in it."""
        file, row = self._locate(index)
        return file.path, row

    def size(self, index: int) -> Size | None:
        """Words and images of a row; None if they cannot be counted."""
        if "sizes" in self.__dict__:
            return stored_size(self.sizes[index])
        file, row = self._locate(index)
        return file.size(row)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Words and images of all rows, `SIZES` (rows,), without opening an image; see `llava/data/sizes.py`."""
        found = np.concatenate([file.sizes for file in self.files])
        return found if self._chosen is None else found[self._chosen]

    @property
    def paths(self) -> str:
        """The files in a message."""
        return ", ".join(str(file.path) for file in self.files)

    def _locate(self, index: int) -> tuple[Rows, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if self._chosen is not None:
            index = int(self._chosen[index])
        number = bisect_right(self._ends, index)
        return self.files[number], index - (self._ends[number - 1] if number else 0)


def open_rows(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> RowFiles:
    """Open one data file or several.

    Raises:
        FlagError: a file is missing, empty, or a list that is no valid JSON; or there is none.
    """
    names = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not names:
        raise FlagError("--data_path is missing")
    return RowFiles([_open_file(Path(name)) for name in names])


def _open_file(path: Path) -> Rows:
    if not path.is_file():
        raise FlagError(f"--data_path {path}: there is no such file")
    rows = JsonRows(path)
    if not len(rows):
        raise FlagError(f"--data_path {path}: the file holds no rows")
    return rows
