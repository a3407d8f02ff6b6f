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
from llava.data.formats.reader import MemoryRows, Row, Rows, stored_size
from llava.data.formats.table import PARQUET, is_saved, open_hub, open_table, package_problem
from llava.data.sizes import Size
from llava.errors import FlagError
from llava.runtime.hub import is_hub_id
from llava.runtime.places import split_weight

__all__ = [
    "MemoryRows",
    "Row",
    "RowFiles",
    "Rows",
    "drawn_rows",
    "is_parquet",
    "open_rows",
    "source_problem",
]

FILE_SUFFIXES = frozenset({".json", ".jsonl", ".parquet", ".arrow", ".gz", ".txt", ".csv", ".tsv"})
"""Ends of names that are files, and not ids of data sets on a hub, even where they do not exist."""


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


def open_rows(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, seed: int = 0) -> RowFiles:
    """Open one data file or several, each with a weight where its name ends in `@WEIGHT`.

    The whole part of a weight repeats all rows of its file so many times; the rest is a share of them, drawn by `seed`
    without repetition, the same in every epoch.

    Raises:
        FlagError: a file is missing, empty, or cannot be read as what it is; or there is none.
    """
    names = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not names:
        raise FlagError("--data_path is missing")
    problem = next(filter(None, (source_problem(os.fspath(name)) for name in names)), None)
    if problem is not None:
        raise FlagError(problem)
    weighted = [split_weight(os.fspath(name)) for name in names]
    files = [_open_source(name) for name, _ in weighted]
    if all(weight == 1 for _, weight in weighted):
        return RowFiles(files)
    starts = np.cumsum([0, *map(len, files)])
    parts = [
        starts[number] + drawn_rows(len(files[number]), weight, seed + number)
        for number, (_, weight) in enumerate(weighted)
    ]
    chosen = np.concatenate(parts)
    if not len(chosen):
        raise FlagError(f"--data_path {' '.join(map(str, names))}: with these weights no row is left")
    return RowFiles(files, chosen)


def drawn_rows(count: int, weight: float, seed: int) -> np.ndarray:
    """Numbers of the rows of a file with a weight, int64 (rows,): whole repetitions, then the drawn ones in order."""
    whole = int(weight)
    share = np.sort(np.random.default_rng(seed).permutation(count)[: round((weight - whole) * count)])
    return np.concatenate([np.tile(np.arange(count), whole), share]).astype(np.int64)


def source_problem(name: str) -> str | None:
    """Why there is nothing to read under a name of `--data_path`, with its weight or without; None if there is."""
    name, weight = split_weight(name)
    if weight == 0:
        return f"--data_path {name}@0: a weight must be greater than 0; leave the file out"
    path = Path(name)
    of_hub = not path.exists() and is_hub_id(name) and path.suffix.lower() not in FILE_SUFFIXES
    if of_hub or is_saved(path) or (path.is_file() and is_parquet(path)):
        return package_problem(name)
    if path.is_file():
        return None
    if path.is_dir():
        return f"--data_path {name}: is a folder that `save_to_disk` of datasets did not write; name a file in it"
    return f"--data_path {name}: no such file"


def _open_source(name: str) -> Rows:
    path = Path(name)
    if path.is_dir() or (path.is_file() and is_parquet(path)):
        rows: Rows = open_table(path)
    else:
        rows = JsonRows(path) if path.is_file() else open_hub(name)
    if not len(rows):
        raise FlagError(f"--data_path {path}: the file holds no rows")
    return rows


def is_parquet(path: Path) -> bool:
    """Whether a file begins as Parquet does."""
    with path.open("rb") as file:
        return file.read(len(PARQUET)) == PARQUET
