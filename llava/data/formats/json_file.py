"""JSON lists and JSON lines, told apart by their first character: only the places of the rows are kept in memory.

Rows are parsed when they are asked for, so memory does not grow with the file, in no process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llava.data.formats.json_scan import BYTE_ORDER_MARK, Found, ListError, scan_lines, scan_list
from llava.data.formats.kept_index import KEPT_FROM, index_of, table_from
from llava.data.formats.reader import Rows, count_value
from llava.data.sizes import SIZES, UNCOUNTED
from llava.errors import BadSampleError, FlagError
from llava.runtime.files import refuse_pointer

HEAD = 1 << 16
"""Bytes in which the first character that is not blank is looked for at a time."""

COMMANDS = {
    b"\x1f\x8b": ("compressed by gzip", "gunzip -k '{path}'"),
    b"\xff\xfe": ("text in UTF-16", "iconv -f UTF-16 -t UTF-8 '{path}' > NEW_FILE"),
    b"\xfe\xff": ("text in UTF-16", "iconv -f UTF-16 -t UTF-8 '{path}' > NEW_FILE"),
    b"PK\x03\x04": ("a ZIP archive", "unzip '{path}'"),
    b"(\xb5/\xfd": ("compressed by zstd", "zstd -d '{path}'"),
    b"\xfd7zXZ": ("compressed by xz", "xz -dk '{path}'"),
}
"""First bytes of files that have rows, but not so that one can be found by its place; and what makes them readable."""


class JsonRows(Rows):
    """Rows of a JSON list or of JSON lines.

    Args:
        path: the file.
        kept_from: see `index_of`.

    Raises:
        FlagError: the file is compressed or not in UTF-8, or begins like a list and is not a valid one.
        BadSampleError: on access, the row is not a JSON object; the message names file and row.
    """

    def __init__(self, path: Path, kept_from: int = KEPT_FROM) -> None:
        refuse_pointer(path, FlagError)
        self.path = path
        scan = scan_list if _first_character(path) == b"[" else scan_lines
        try:
            self._index = index_of(path, partial(_table, scan), kept_from)
        except (ListError, RecursionError) as error:
            raise _no_list(path, error) from error

    def __len__(self) -> int:
        return len(self._index)

    def value(self, index: int) -> Any:
        """The JSON value of a row."""
        start, length, _, _ = self._index[index]
        with self.path.open("rb") as file:
            file.seek(int(start))
            text = file.read(int(length))
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadSampleError(f"{self.name(index)} is no JSON: {error}: {text!r:.80}") from error

    @cached_property
    def sizes(self) -> np.ndarray:
        """Words and images of all rows, found together with their places."""
        return self._index[list(SIZES.names or ())].astype(SIZES)


def read_values(path: Path) -> Iterator[Any]:
    """The rows of a file in their order, without a table of their places; None for a line that is not JSON.

    Raises:
        FlagError: as `JsonRows`, when the place of the problem is reached.
    """
    refuse_pointer(path, FlagError)
    scan = scan_list if _first_character(path) == b"[" else scan_lines
    try:
        with path.open("rb") as file:
            for found in scan(file):
                yield found.value
    except (ListError, RecursionError) as error:
        raise _no_list(path, error) from error


def _no_list(path: Path, error: Exception) -> FlagError:
    return FlagError(f"--data_path {path}: the file begins like a JSON list but is none: {error}")


def _table(scan: Callable[[BinaryIO], Iterator[Found]], file: BinaryIO) -> np.ndarray:
    return table_from((start, length, *(count_value(value) or (UNCOUNTED, 0))) for start, length, value in scan(file))


def _first_character(path: Path) -> bytes:
    """The first byte that is not blank; empty if there is none.

    Raises:
        FlagError: the file is compressed or in UTF-16; the message has the command that makes it readable.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
        for magic, (what, command) in COMMANDS.items():
            if head.startswith(magic):
                raise FlagError(
                    f"--data_path {path}: is {what}, and rows are read from text in UTF-8; run\n  "
                    f"{command.format(path=path)}\nand pass the file that it makes"
                )
        head = head.removeprefix(BYTE_ORDER_MARK)
        while head and not head.strip():
            head = file.read(HEAD)
    return head.lstrip()[:1]
