"""Values out of range, by kind, and what the tests of options make of a table of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

NAN, INF = float("nan"), float("inf")
ABSENT = "/nonexistent/base"

RATE = ("-1e-4", "nan", "inf", "-inf")
COUNTED = ("0", "-1")
SHARE = ("-0.1", "1", "1.5", "nan", "inf")
POSITIVE_VALUES = ("0", "-1", "nan", "inf")
SIGNLESS = ("-1", "nan", "inf")


def rows(table: dict[str, dict[str, Sequence[str]]]) -> list[Any]:
    found = [(program, flag, value) for program, own in table.items() for flag in own for value in own[flag]]
    return [pytest.param(*row, id=" ".join(row)) for row in found]
