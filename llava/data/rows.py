"""Rows of LLaVA data files: one JSON list, or one JSON object per line (JSONL), told apart by their first character.

A list is read once. Of a JSONL file only the byte offsets of its lines are kept, and rows are parsed when asked for, so
files of any size start at once.
"""

from __future__ import annotations

import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from llava.errors import BadSampleError, FlagError
from llava.runtime.files import refuse_pointer

Row = dict[str, Any]
"""`{"id": ..., "image": name or list of names, "conversations": [{"from": ..., "value": ...}, ...]}`."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Rows(Sequence[Row]):
    """Rows of one data file, parsed one at a time.

    Raises:
        BadSampleError: on access, the row is no JSON object; the message names file and row.
    """

    def __init__(self, path: Path, offsets: Sequence[int] | None, values: list[Any] | None) -> None:
        self.path = path
        self._offsets = offsets  # of a JSONL file
        self._values = values  # of a JSON list

    def __len__(self) -> int:
        return len(self._offsets if self._values is None else self._values)

    def __getitem__(self, index: int) -> Row:
        value = self._parse_line(index) if self._values is None else self._values[index]
        if not isinstance(value, dict):
            raise BadSampleError(f"{self.name(index)} is no JSON object but {value!r:.80}")
        return value

    def name(self, index: int) -> str:
        """What to call a row in a message; rows are counted from 0 and blank lines are not."""
        return f"{self.path}, row {index}"

    def _parse_line(self, index: int) -> Any:
        with self.path.open("rb") as file:
            file.seek(self._offsets[index])
            line = file.readline()
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadSampleError(f"{self.name(index)} is no JSON: {error}: {line!r:.80}") from error


class RowFiles(Sequence[Row]):
    """Rows of several data files, one file after the other.

    Raises:
        BadSampleError: on access, the row is no JSON object; the message names file and row.
    """

    def __init__(self, files: Sequence[Rows], chosen: Sequence[int] | None = None) -> None:
        self.files = list(files)
        self._ends = list(accumulate(map(len, self.files)))
        self._chosen = None if chosen is None else array("Q", chosen)

    def select(self, rows: Sequence[int]) -> RowFiles:
        """Some of the rows as rows of their own; messages keep naming each by file and number in it."""
        return RowFiles(self.files, rows if self._chosen is None else [self._chosen[row] for row in rows])

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

    @property
    def paths(self) -> str:
        """The files in a message."""
        return ", ".join(str(file.path) for file in self.files)

    def _locate(self, index: int) -> tuple[Rows, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if self._chosen is not None:
            index = self._chosen[index]
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
    refuse_pointer(path, FlagError)
    with path.open("rb") as file:
        first = next((line for line in file if line.removeprefix(BYTE_ORDER_MARK).strip()), b"")
    if first.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"["):
        rows = Rows(path, None, _read_list(path))
    else:
        rows = Rows(path, array("Q", _line_offsets(path)), None)
    if not len(rows):
        raise FlagError(f"--data_path {path}: the file holds no rows")
    return rows


def _read_list(path: Path) -> list[Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise FlagError(f"--data_path {path}: the file begins like a JSON list but is none: {error}") from error


def _line_offsets(path: Path) -> Iterator[int]:
    """Byte offset of each line that is not blank."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            mark = len(BYTE_ORDER_MARK) if offset == 0 and line.startswith(BYTE_ORDER_MARK) else 0
            if line[mark:].strip():
                yield offset + mark
            offset += len(line)
