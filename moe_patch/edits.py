"""An edit: where something is inserted into a file of the checkout, and what.

Edits only insert; what upstream wrote stays as it is, byte for byte. Inserted lines end with `# moe_patch`, so that a
reader of the checkout sees where they come from, and so that they can be taken out again without any record.
"""

from __future__ import annotations

import ast
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moe_patch.errors import PatchError
from moe_patch.syntax import Finder

MARK = "# moe_patch"

EXPRESSION = "extensions_moe.Flags, "
"""The one text that is inserted within a line, which has no room for the mark."""

Place = Literal["before", "after", "expression", "branch"]


@dataclass(frozen=True)
class Edit:
    """One insertion.

    Attributes:
        file: path within the checkout.
        anchor: what is looked for, in words, for messages.
        find: finds it; exactly one node must be found.
        place: `before` or `after` a statement, as lines of its indentation; before an `expression`, within its line;
            or as a `branch`: an `if` with its body in front of a found `if`, which becomes an `elif`.
        text: what is inserted: lines, or the text before an expression.
    """

    file: str
    anchor: str
    find: Finder
    place: Place
    text: tuple[str, ...]


@dataclass(frozen=True)
class Located:
    """An edit with its place: `line` for people, `offset` in bytes."""

    edit: Edit
    line: int
    offset: int
    inserted: bytes


def locate(edits: Sequence[Edit], source: bytes, path: str) -> tuple[list[Located], list[str]]:
    """The places of the edits of one file, and one message for each edit that has none.

    Raises:
        PatchError: the file is no Python.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise PatchError(f"{path}: is no Python that version {platform.python_version()} can read ({error})") from error
    lines = source.splitlines(keepends=True)
    found: list[Located] = []
    problems: list[str] = []
    for edit in edits:
        nodes = edit.find(tree)
        if len(nodes) != 1:
            places = f" (lines {', '.join(str(_line(node)) for node in nodes)})" if nodes else ""
            problems.append(f"{path}: anchor '{edit.anchor}' fits {len(nodes)} times{places}, expected once")
            continue
        try:
            found.append(_located(edit, nodes[0], lines))
        except ValueError as error:
            problems.append(f"{path}: anchor '{edit.anchor}', line {_line(nodes[0])}: {error}")
    return found, problems


def insert(located: Sequence[Located], source: bytes, path: str) -> bytes:
    """The file with all insertions; those at one place stand in the given order.

    Raises:
        PatchError: the result is no valid Python.
    """
    result, last = b"", 0
    for place in sorted(located, key=lambda place: place.offset):  # a stable sort
        result += source[last : place.offset] + place.inserted
        last = place.offset
    result += source[last:]
    try:
        compile(result, path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise PatchError(f"{path}: the edits would make it invalid ({error}); please report this file") from error
    return result


def without_edits(content: bytes) -> bytes:
    """The file without what edits have inserted: marked lines, the `el` after a branch, and our name within a line."""
    kept: list[bytes] = []
    branch = False
    for line in content.splitlines(keepends=True):
        text = line.strip()
        if text.endswith(MARK.encode()):
            # Lines of a branch follow its `if`; any other marked line is a statement by itself.
            branch = text.startswith(b"if ") or (branch and line[:1].isspace())
            continue
        indent = line[: len(line) - len(line.lstrip())]
        if branch and text.startswith(b"elif "):
            line = indent + line[len(indent) + len(b"el") :]
        branch = False
        kept.append(line.replace(EXPRESSION.encode(), b""))
    return b"".join(kept)


def _located(edit: Edit, node: ast.AST, lines: list[bytes]) -> Located:
    """Offset and bytes of one insertion.

    Raises:
        ValueError: the statement shares its line with another one.
    """
    row, column = _line(node) - 1, _column(node)
    newline = b"\r\n" if lines[row].endswith(b"\r\n") else b"\n"
    indent = lines[row][:column]
    if edit.place == "expression":
        return Located(edit, row + 1, _offset(lines, row, column), "".join(edit.text).encode())
    if indent.strip():
        raise ValueError("another statement stands before it on its line")
    if edit.place == "branch" and lines[row][column : column + 2] != b"if":
        raise ValueError("it is an 'elif', expected an 'if'")
    marked = [indent + f"{line}  {MARK}".encode() + newline for line in edit.text]
    if edit.place == "branch":
        body = b"".join(marked)[len(indent) :]
        return Located(edit, row + 1, _offset(lines, row, column), body + indent + b"el")
    if edit.place == "before":
        return Located(edit, row + 1, _offset(lines, row, 0), b"".join(marked))
    end, behind = node.end_lineno - 1, node.end_col_offset  # type: ignore[attr-defined]
    rest = lines[end][behind:].strip()
    if rest and not rest.startswith(b"#"):
        raise ValueError("another statement stands behind it on its line")
    if not lines[end].endswith((b"\n", b"\r")):
        raise ValueError("the file ends with it, without a line break")
    return Located(edit, row + 1, _offset(lines, end + 1, 0), b"".join(marked))


def _offset(lines: list[bytes], row: int, column: int) -> int:
    return sum(map(len, lines[:row])) + column


def _line(node: ast.AST) -> int:
    return node.lineno  # type: ignore[attr-defined]


def _column(node: ast.AST) -> int:
    return node.col_offset  # type: ignore[attr-defined]
