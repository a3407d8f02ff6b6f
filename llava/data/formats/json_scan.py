"""Where the rows of a JSON list or of JSON lines are in their file, found in constant memory.

A list is read a stretch at a time by the parser of the standard library, so that rows, and the errors of a damaged
list with their line and column, are those of `json.load` on the whole file.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

BYTE_ORDER_MARK = codecs.BOM_UTF8

CHUNK = 1 << 20
"""Bytes that are read at a time."""

EDGE = 16
"""Characters before the end of a stretch in which an error may come from the cut: `-Infinity`, two escapes."""

BLANKS = re.compile(r"[ \t\n\r]*")


class Found(NamedTuple):
    """A row: its first byte, its number of bytes, and its value; None for a line that is not JSON."""

    start: int
    length: int
    value: Any


class ListError(ValueError):
    """A file that begins like a JSON list and is not one; says in which row, and what `json.load` would say."""


class _Stretch:
    """A part of a file as text, and where it is in the file.

    Attributes:
        text: the part.
        byte, char: place of its first character.
        lines: line feeds before it.
        line_start: place after the last of them, in characters.
        ended: nothing comes after it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._read = 0  # bytes
        self.text, self.byte, self.char, self.lines, self.line_start = "", 0, 0, 0, 0
        self.ended = False
        while not (self.text or self.ended):
            self._append()
        if self.text.startswith("\ufeff"):  # which `json.load` does not count as a character
            self.text, self.byte = self.text[1:], len(BYTE_ORDER_MARK)
        self._known = (0, self.byte)

    def _append(self) -> None:
        """Add as much as is there, and at least a chunk."""
        chunk = self._file.read(max(CHUNK, len(self.text)))
        pending = len(self._decoder.getstate()[0])
        try:
            self.text += self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            place = self._read - pending + error.start
            raise ListError(f"byte {place} is not UTF-8 ({error.reason})") from error
        self._read += len(chunk)
        self.ended = not chunk

    def more_from(self, position: int) -> None:
        """Forget what is before a position, and read on behind the end."""
        gone = self.text[:position]
        self.byte = self.byte_of(position)
        line_feeds = gone.count("\n")
        if line_feeds:
            self.line_start = self.char + gone.rindex("\n") + 1
        self.lines += line_feeds
        self.char += position
        self.text, self._known = self.text[position:], (0, self.byte)
        self._append()

    def byte_of(self, position: int) -> int:
        """Place of a character in bytes; asked for in ascending order, so that each is counted once."""
        known, byte = self._known
        if self.text.isascii():
            return byte + position - known
        byte += len(self.text[known:position].encode())
        self._known = (position, byte)
        return byte

    def error(self, row: int, message: str, position: int) -> ListError:
        """What `json.load` says of the whole file, with the row in front."""
        before = self.text[:position]
        start = self.char + before.rindex("\n") + 1 if "\n" in before else self.line_start
        line, place = self.lines + before.count("\n") + 1, self.char + position
        return ListError(f"row {row}: {message}: line {line} column {place - start + 1} (char {place})")


class _ListScanner:
    """Reads the elements of a list one by one."""

    def __init__(self, file: BinaryIO) -> None:
        self.stretch = _Stretch(file)
        self.position = 0  # in the stretch
        self.row = 0
        self._scan = json.JSONDecoder().scan_once

    def _more(self) -> None:
        self.stretch.more_from(self.position)
        self.position = 0

    def skip_blanks(self) -> str:
        """Go to the next character that is not blank and return it; empty at the end of the file."""
        while True:
            self.position = BLANKS.match(self.stretch.text, self.position).end()  # type: ignore[union-attr]
            if self.position < len(self.stretch.text):
                return self.stretch.text[self.position]
            if self.stretch.ended:
                return ""
            self._more()

    def element(self) -> Found:
        """The element that begins here."""
        while True:
            stretch, position = self.stretch, self.position
            text = stretch.text
            edge = len(text) - EDGE
            try:
                value, end = self._scan(text, position)
            except StopIteration as error:
                problem, place = "Expecting value", error.value
                certain = place < edge
            except json.JSONDecodeError as error:
                problem, place = error.msg, error.pos
                certain = place < edge and not problem.startswith("Unterminated string")
            else:
                if stretch.ended or end < edge:  # a number at the end of the stretch may have more digits
                    start, self.position = stretch.byte_of(position), end
                    return Found(start, stretch.byte_of(end) - start, value)
                self._more()
                continue
            if stretch.ended or certain:
                raise stretch.error(self.row, problem, place)
            self._more()

    def rows(self) -> Iterator[Found]:
        """All elements; see `scan_list`."""
        self.skip_blanks()
        self.position += 1  # the bracket
        if self.skip_blanks() != "]":
            while True:
                yield self.element()
                following = self.skip_blanks()
                if following == "]":
                    break
                if following != ",":
                    raise self.stretch.error(self.row, "Expecting ',' delimiter", self.position)
                self.position += 1
                self.row += 1
                self.skip_blanks()
        self.position += 1
        if self.skip_blanks():
            raise self.stretch.error(self.row, "Extra data", self.position)


def scan_list(file: BinaryIO) -> Iterator[Found]:
    """Rows of a JSON list.

    Args:
        file: at its beginning; its first character that is not blank is `[`.

    Raises:
        ListError: it is not a valid list.
        RecursionError: a row is nested too deeply.
    """
    return _ListScanner(file).rows()


def scan_lines(file: BinaryIO) -> Iterator[Found]:
    """Rows of JSON lines; blank ones are none.

    Args:
        file: at its beginning.
    """
    offset = 0
    for line in file:
        mark = len(BYTE_ORDER_MARK) if offset == 0 and line.startswith(BYTE_ORDER_MARK) else 0
        if line[mark:].strip():
            yield Found(offset + mark, len(line) - mark, _parsed(line[mark:]))
        offset += len(line)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
