"""What an existing file or folder holds, so that a program can tell its own earlier output from somebody else's.

`describe` names the content for a message. `refuse_foreign` is asked before a result replaces an older one: the older
one must be a result of the same kind. Nothing here needs torch.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava.errors import FlagError

POINTER = b"version https://git-lfs.github.com/spec/"
"""How the text of a Git LFS pointer begins."""

MAGIC = {
    b"\x89PNG\r\n\x1a\n": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"BM": "a BMP image",
    b"RIFF": "a WebP image or another RIFF file",
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a ZIP archive (a spreadsheet or weights of torch)",
    b"\x1f\x8b": "a gzip archive",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
    b"SQLite format 3": "an SQLite database",
    POINTER: "a Git LFS pointer, not the file itself (run `git lfs pull` in its repository)",
}
"""What the first bytes of a file say."""

SPECIAL = {
    stat.S_ISDIR: "a directory",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}
HEAD = 1 << 16
"""Bytes that `describe` reads."""

SHOWN_KEYS = 6


def is_plain_file(path: Path) -> bool:
    """True for a regular file or a link to one; a named pipe would block whoever opens it."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def describe(path: Path) -> str:
    """What is at `path`, in words: "a PNG image", "a JSON list", "text that begins with 'a,b,c'"."""
    mode = os.stat(path).st_mode
    for test, words in SPECIAL.items():
        if test(mode):
            return words
    with path.open("rb") as file:
        head = file.read(HEAD)
    known = next((words for magic, words in MAGIC.items() if head.startswith(magic)), None)
    if known is not None:
        return known
    if not head.strip():
        return "an empty file"
    if b"\0" in head:
        return "a binary file"
    try:
        text = head.decode("utf-8-sig", "strict" if len(head) < HEAD else "ignore")
    except UnicodeDecodeError:
        return "a file that is not UTF-8 text"
    return _describe_text(text)


def _describe_text(text: str) -> str:
    first = text.lstrip().splitlines()[0]
    row = _parsed(first)
    if isinstance(row, dict) and row:
        return f"JSON rows with the keys {keys_in_words(row)}"
    if text.lstrip().startswith("["):
        return "a JSON list"
    if text.lstrip().startswith("{"):
        return "a JSON object"
    if first.count(",") or first.count("\t"):
        return f"a table of comma- or tab-separated values that begins with {first[:40]!r}"
    return f"text that begins with {first[:40]!r}"


def keys_in_words(row: Iterable[str]) -> str:
    """The first keys of a row."""
    keys = list(row)
    return ", ".join(keys[:SHOWN_KEYS]) + (", ..." if len(keys) > SHOWN_KEYS else "")


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def alike(old: Iterable[str], new: Iterable[str]) -> bool:
    """True if two rows have most of their keys in common: a later version of a program may add some."""
    old, new = set(old), set(new)
    return 2 * len(old & new) >= len(old | new)


def _same_json(old: Any, new: Any) -> bool:
    """Whether two JSON values could have been written by the same program."""
    if isinstance(new, dict):
        if not isinstance(old, dict):
            return False
        smaller = min(len(old), len(new))  # a table by ids grows when more questions are asked
        return alike(old, new) or len(old.keys() & new.keys()) == smaller
    if isinstance(new, list):
        if not isinstance(old, list):
            return False
        if not old or not new:
            return True
        if isinstance(new[0], dict):
            return all(isinstance(row, dict) and alike(row, new[0]) for row in old)
        return isinstance(old[0], type(new[0]))
    return isinstance(old, type(new))


def _rows(text: str) -> list[dict[str, Any]] | None:
    """The objects of JSON lines; None if a line is something else."""
    rows = [_parsed(line) for line in text.splitlines() if line.strip()]
    return rows if rows and all(isinstance(row, dict) for row in rows) else None


def _beginning(text: str) -> str:
    """What a report begins with, whatever its numbers: the head of a page, else the first word."""
    text = text.lstrip()
    head, end, _ = text.partition("</title>")
    if end:
        fixed = head.partition("<title>")[0] if '<meta name="generator"' in head else head
        return " ".join(fixed.split())
    line = text.splitlines()[0] if text else ""
    if "\t" in line:
        return f"{line.count(chr(9))} tabs"
    return " ".join(line.split()[: 2 if line.startswith("#") else 1])


def same_kind(old: str, new: str) -> bool:
    """Whether `old` is an earlier result of the program that is about to write `new`."""
    if not old.strip():
        return True
    value = _parsed(new)
    if isinstance(value, dict | list) and not (isinstance(value, dict) and _rows(new) and new.count("\n") == 1):
        return _same_json(_parsed(old), value)
    rows = _rows(new)
    if rows is not None:
        before = _rows(old)
        return before is not None and all(alike(row, rows[0]) for row in before)
    return _parsed(old) is None and _rows(old) is None and _beginning(old) == _beginning(new)


def refuse_foreign(path: Path, text: str) -> None:
    """Raise if a file at `path` is not an earlier result of the kind of `text`; nothing is changed.

    Raises:
        FlagError: what is there holds something else; says what it looks like and what to do.
    """
    if not os.path.lexists(path) or not path.exists():
        return
    foreign = not is_plain_file(path)
    if not foreign:
        try:
            foreign = not same_kind(path.read_text(encoding="utf-8"), text)
        except UnicodeDecodeError:
            foreign = True
    if foreign:
        raise FlagError(foreign_message(path))


def refuse_foreign_bytes(path: Path, magic: bytes) -> None:
    """The same for a binary result, a figure or a spreadsheet, which begins with `magic`.

    Raises:
        FlagError: what is there is something else.
    """
    if not path.exists():
        return
    if is_plain_file(path):
        with path.open("rb") as file:
            head = file.read(len(magic))
        if not head or head == magic:
            return
    raise FlagError(foreign_message(path))


def foreign_message(path: Path) -> str:
    """What to say about a file that a program would have to replace and did not write."""
    return (
        f"{path}: already exists and is not an earlier result of this program: it looks like {describe(path)}. It is "
        "left as it is; choose another path, or move that file away"
    )
