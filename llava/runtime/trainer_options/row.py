"""A row of the table: what becomes of one option of transformers' `TrainingArguments`.

A row that depends on the value has a check, which sees the options before transformers has read them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

Check = Callable[[Any], str | None]
"""Takes options; returns why the value of the row's option is refused and what to do instead, or None."""


class Kind(StrEnum):
    """What becomes of an option."""

    SUPPORTED = "supported"
    NO_EFFECT = "no effect"
    REFUSED = "refused"


@dataclass(frozen=True)
class Row:
    """One option.

    Attributes:
        name: of the field.
        kind: what becomes of it.
        text: by what it is supported, why it has no effect, or why it is refused.
        instead: of a refused one: what to do instead.
        check: of a supported one: refuses some values.
        limits: what `check` refuses, in words, for the document.
    """

    name: str
    kind: Kind
    text: str
    instead: str = ""
    check: Check | None = None
    limits: str = ""

    @property
    def words(self) -> str:
        """What the row says, in one sentence or two."""
        return "; ".join(part for part in (self.text, self.instead or self.limits) if part)


Table = Mapping[str, Row]
"""Rows by the name of their field."""


def supported(name: str, by: str, check: Check | None = None, limits: str = "") -> Row:
    """An option that does what transformers says; `by` says by what, or how it differs."""
    return Row(name, Kind.SUPPORTED, by, check=check, limits=limits)


def no_effect(name: str, why: str) -> Row:
    """An option that may be given and changes nothing."""
    return Row(name, Kind.NO_EFFECT, why)


def refused(name: str, why: str, instead: str) -> Row:
    """An option that only has its default, or a value that switches it off."""
    return Row(name, Kind.REFUSED, why, instead)


def table_of(*groups: tuple[Row, ...]) -> dict[str, Row]:
    """A table of rows.

    Raises:
        ValueError: an option has two rows, or a row does not say what a user needs to know.
    """
    rows = [row for group in groups for row in group]
    table, names = {row.name: row for row in rows}, [row.name for row in rows]
    if len(table) != len(rows):
        raise ValueError(f"options with two rows: {sorted(name for name in table if names.count(name) > 1)}")
    silent = [row.name for row in rows if not row.text or (row.kind is Kind.REFUSED and not row.instead)]
    if silent:
        raise ValueError(f"rows without a reason, or without what to do instead: {silent}")
    return table


def but(table: Table, *rows: Row) -> dict[str, Row]:
    """A table with other rows for some of its options, for a program that differs.

    Raises:
        ValueError: the table has no such option.
    """
    unknown = sorted({row.name for row in rows} - table.keys())
    if unknown:
        raise ValueError(f"rows for options that the table does not have: {unknown}")
    return {**table, **{row.name: row for row in rows}}


def renamed(row: Row, name: str) -> Row:
    """The same row under another name, for an option that has two."""
    return replace(row, name=name)
