"""`docs/options.md`, written from the tables of the training programs."""

from __future__ import annotations

from collections.abc import Mapping

from llava.runtime.trainer_options.row import Kind, Row, Table
from llava.runtime.trainer_options.table import SINCE, TABLE

HEAD = """\
# Options of transformers' Trainer

The training programs take every option of transformers' `TrainingArguments`. This page says what becomes of each: it is
supported, it has no effect on the result, or it is refused before anything is loaded, with the reason and what to do
instead. `--help` of a program explains its own options, `--help-all` transformers' as well. `--learning_rate` and
`--learning-rate` are the same.

A refused option may be given with its default value. An option of a newer transformers that has no row here is passed
on to transformers, and a warning says so.

This page is written from the table in `llava/runtime/trainer_options/` by `python -m tests.options_page`.
"""

TITLES = {
    Kind.SUPPORTED: "Supported",
    Kind.NO_EFFECT: "No effect",
    Kind.REFUSED: "Refused",
}
COLUMNS = {
    Kind.SUPPORTED: ("by", "limits"),
    Kind.NO_EFFECT: ("why",),
    Kind.REFUSED: ("why", "instead"),
}


def _cells(row: Row) -> tuple[str, ...]:
    return (row.text,) if row.kind is Kind.NO_EFFECT else (row.text, row.instead or row.limits)


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _name(name: str) -> str:
    return f"`--{name}`" + (f" (transformers {SINCE[name]})" if name in SINCE else "")


def _block(rows: list[Row], kind: Kind) -> list[str]:
    titles = ("option", *COLUMNS[kind])
    lines = [_line(titles), _line(("---",) * len(titles))]
    return lines + [_line((_name(row.name), *_cells(row))) for row in rows if row.kind is kind]


def document(programs: Mapping[str, Table]) -> str:
    """The page.

    Args:
        programs: table of each program by its command; where it differs from the common one, it has a section.
    """
    lines = [HEAD.rstrip(), ""]
    for kind in Kind:
        lines += [f"## {TITLES[kind]}", "", *_block(list(TABLE.values()), kind), ""]
    for program, table in programs.items():
        other = [row for name, row in table.items() if row != TABLE[name]]
        if not other:
            continue
        lines += [f"## What differs in `{program}`", ""]
        for kind in Kind:
            if any(row.kind is kind for row in other):
                lines += [f"{TITLES[kind]}:", "", *_block(other, kind), ""]
    return "\n".join(lines).rstrip() + "\n"
