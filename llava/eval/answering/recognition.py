"""Recognizing a file of answers before anything in it is repaired, continued or replaced.

A file holds rows of answers if every line is a JSON object with the keys of a program's rows; its last line may have
been torn by a kill. Everything else, a JSON list, a table, an image, is refused and not touched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import BadSampleError, FlagError
from llava.runtime.recognize import alike, describe, is_plain_file, keys_in_words

Row = dict[str, Any]
Shape = tuple[str, ...]
"""The keys of a program's rows, in the order in which they are written."""

QBENCH_SHAPE: Shape = ("img_path", "question", "response")
"""What the rows of Q-Bench have at least; the rest is that of the question file."""

ANSWER_SHAPES: tuple[Shape, ...] = (
    ("question_id", "prompt", "text", "answer_id", "model_id", "metadata"),
    (
        *("question_id", "round_id", "prompt", "text", "options", "option_char"),
        *("answer_id", "model_id", "metadata"),
    ),
    ("question_id", "prompt", "model_id", "turns", "positions"),
    QBENCH_SHAPE,
)
"""Rows that programs of this project write whatever they are asked; upstream's have the same keys."""

REVIEW_SHAPE: Shape = ("id", "question_id", "answer1_id", "answer2_id", "category", "content", "tuple")
"""Rows of `llava.eval.eval_gpt_review_bench`."""

ESSENTIAL = frozenset({"text", "response", "turns", "content"})
"""What a row is written for: one of these keys."""

WHAT_TO_DO = "It is left as it is; name another file, or move that one away"


@dataclass(frozen=True)
class Recognized:
    """What a file of rows holds.

    Attributes:
        rows: `(file:line, row)` of every whole row.
        end: size of the whole rows in bytes.
        torn: bytes behind them, of a row that a kill has cut off.
        lacks_line_feed: whether the last whole row does.
    """

    rows: list[tuple[str, Row]]
    end: int = 0
    torn: int = 0
    lacks_line_feed: bool = False


def recognize_rows(
    path: Path, shapes: Collection[Shape], *, what: str = "answers", damaged: bool = False
) -> Recognized:
    """The rows of a file, if it is a file of such rows; nothing is changed.

    Args:
        path: the file; one that does not exist, or holds nothing but blanks, has no rows.
        shapes: the rows that are accepted: each row has most of its keys in common with one of them.
        what: what the rows are, for messages.
        damaged: accept lines in the middle that are not whole, of a file that is going to be replaced.

    Raises:
        FlagError: it holds something else, or cannot be read.
        BadSampleError: it holds such rows and a line in the middle is broken; names file and line.
    """
    if not os.path.lexists(path) or not path.exists():
        return Recognized([])
    if not is_plain_file(path):
        raise _foreign(path, what)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FlagError(f"{path}: cannot be read ({error.strerror})") from error
    if not content.strip():
        return Recognized([], end=len(content))
    end = content.rfind(b"\n") + 1
    tail = content[end:]
    whole = _object(tail) if tail.strip() else None
    rows, broken = [], []
    for where, line in _lines(path, content if whole is not None else content[:end]):
        row = _object(line)
        if row is None:
            broken.append((where, line))
        elif any(_fits(row, shape) for shape in shapes):
            rows.append((where, row))
        else:
            raise _foreign(path, what, f"{where} has the keys {keys_in_words(row)}")
    # The rows of Q-Bench show what their question file has: a torn one begins as the others do.
    shapes = (*shapes, *(tuple(row) for _, row in rows[:1]))
    if (broken and not rows) or (tail.strip() and whole is None and not _is_torn(tail, shapes)):
        raise _foreign(path, what)
    if broken and not (damaged and all(_is_torn(line, shapes) for _, line in broken)):
        where, line = broken[0]
        raise BadSampleError(f"{where}: not valid JSON ({_why(line)}); fix or remove the line. {WHAT_TO_DO}")
    if whole is not None:
        return Recognized(rows, end=len(content), lacks_line_feed=True)
    return Recognized(rows, end=end, torn=len(tail))


def repair(path: Path, found: Recognized) -> None:
    """Cut off a torn last row, or give a whole one its missing line feed; only of a recognized file.

    Raises:
        FlagError: the file cannot be written.
    """
    if not found.torn and not found.lacks_line_feed:
        return
    try:
        with path.open("r+b") as file:
            if found.torn:
                file.truncate(found.end)
            else:
                file.seek(0, os.SEEK_END)
                file.write(b"\n")
    except OSError as error:
        raise FlagError(f"{path}: cannot be written ({error.strerror})") from error
    if found.torn:
        print(f"{path}: cut off an unfinished last line of {found.torn} bytes")


def refuse_unless_rows(path: Path, shapes: Collection[Shape], *, what: str = "answers") -> None:
    """Raise if a file is there that does not hold such rows, before it is replaced as a whole.

    Raises:
        FlagError: see `recognize_rows`.
    """
    recognize_rows(path, shapes, what=what, damaged=True)


def check_writable(path: Path, flag: str = "--answers-file") -> None:
    """Make the folder of a file, and see that the file can be written; an existing one is not changed.

    Raises:
        FlagError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FlagError(f"{flag} {path}: its folder cannot be made ({error.strerror}); name another file") from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise FlagError(f"{flag} {path}: cannot be written (permission denied); it is left as it is, name another file")


def _fits(row: Row, shape: Shape) -> bool:
    if shape == QBENCH_SHAPE:
        return row.keys() >= set(shape)
    essential = ESSENTIAL.intersection(shape)
    return bool(essential) and essential <= row.keys() and alike(row, shape)


def _lines(path: Path, content: bytes) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line


def _object(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _why(line: bytes) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return str(error)
    return f"expected a JSON object, found {type(row).__name__}"


def _foreign(path: Path, what: str, detail: str = "") -> FlagError:
    return FlagError(
        f"{path}: does not hold rows of {what}: it looks like {describe(path)}"
        f"{f' ({detail})' if detail else ''}. {WHAT_TO_DO}"
    )


def _is_torn(tail: bytes, shapes: Collection[Shape]) -> bool:
    """Whether bytes are the beginning of a row of one of the shapes."""
    try:
        text = tail.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            return False
        text = tail[: error.start].decode("utf-8")
    if any(ord(letter) < 0x20 and letter not in "\t\r" for letter in text):  # JSON escapes these
        return False
    return any(_begins(text.lstrip(), shape) for shape in shapes)


def _begins(text: str, shape: Sequence[str]) -> bool:
    """Whether a text is the beginning of a JSON object whose keys are those of `shape`, in order, some left out."""
    scan: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().scan_once  # type: ignore[attr-defined]
    if not text.startswith("{"):
        return False
    place, keys = 1, list(shape)
    while True:
        place = _skip(text, place)
        if place == len(text):
            return True
        if text[place] != '"':
            return False
        end = text.find('"', place + 1)
        name = text[place + 1 : end if end >= 0 else len(text)]
        while keys and not (keys[0] == name if end >= 0 else keys[0].startswith(name)):
            keys.pop(0)
        if not keys:
            return False
        if end < 0:
            return True
        keys.pop(0)
        place = _skip(text, end + 1)
        if place == len(text):
            return True
        if text[place] != ":":
            return False
        try:
            _, place = scan(text, _skip(text, place + 1))
        except (StopIteration, ValueError, RecursionError):
            return _is_unfinished(text, _skip(text, place + 1))
        place = _skip(text, place)
        if place == len(text):
            return True
        if text[place] != ",":
            return False
        place += 1


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r":
        place += 1
    return place


def _is_unfinished(text: str, place: int) -> bool:
    """Whether a JSON value that cannot be read is one that the text cuts off, not a wrong one."""
    value = text[place:]
    if not value or value[0] in '"[{-':
        return True
    return any(word.startswith(value) for word in ("true", "false", "null", "NaN", "Infinity"))
