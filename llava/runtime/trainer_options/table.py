"""The whole table, and which rows the installed transformers has no field for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import transformers

from llava.runtime.trainer_options import machine, optimization, results
from llava.runtime.trainer_options.row import Table, table_of

TABLE: Table = table_of(optimization.ROWS, machine.ROWS, results.ROWS)
"""Of the union of the fields of all tested versions of transformers."""

SINCE = {"activation_checkpointing": "5.24", "activation_checkpointing_kwargs": "5.24"}
"""Fields that the lowest tested version does not have, and the first one that has them."""


def fields_of_transformers() -> tuple[str, ...]:
    """Names of the fields of the installed `TrainingArguments` that can be given on a command line."""
    return tuple(field.name for field in dataclasses.fields(transformers.TrainingArguments) if field.init)


def unknown_fields(table: Table = TABLE, fields: Iterable[str] | None = None) -> list[str]:
    """Fields without a row, as those of a version that is newer than every tested one."""
    return sorted(set(fields_of_transformers() if fields is None else fields) - table.keys())
