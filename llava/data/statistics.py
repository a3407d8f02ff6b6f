"""Counts and percentiles of what was found in a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava.data.inspection import RowReport
from llava.data.kinds import Kind

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)


@dataclass(frozen=True)
class Distribution:
    """How a number is distributed over the rows.

    Attributes:
        count: rows that have it.
        total: their sum.
        percentiles: value at each of `PERCENTILES`, taken from the rows, not interpolated.
    """

    count: int
    total: int
    percentiles: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Average over the rows that have it."""
        return self.total / self.count if self.count else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON values; percentiles by `p0` to `p100`."""
        named = {f"p{name}": value for name, value in zip(PERCENTILES, self.percentiles, strict=True)}
        return {"rows": self.count, "total": self.total, "mean": round(self.mean, 3), **named}


def distribution(values: Sequence[int]) -> Distribution:
    """Distribution of some numbers; all zero if there are none."""
    if not values:
        return Distribution(0, 0, (0,) * len(PERCENTILES))
    found = np.percentile(np.asarray(values), PERCENTILES, method="inverted_cdf")
    return Distribution(len(values), int(sum(values)), tuple(int(value) for value in found))


@dataclass(frozen=True)
class DataSummary:
    """A data set as a whole.

    Attributes:
        rows: rows of each file.
        rows_with_problems: rows with at least one problem.
        problems: number of problems of each kind that occurs.
        with_image: rows with at least one image.
        cut: trained tokens that lie behind the longest length.
        numbers: distributions by name.
        answer_end: why no answer ends with one token, see `end_problem`; None if every one does.
    """

    rows: dict[str, int]
    rows_with_problems: int
    problems: dict[Kind, int]
    with_image: int
    cut: int
    numbers: dict[str, Distribution]
    answer_end: str | None = None

    @property
    def total(self) -> int:
        """Rows of all files."""
        return sum(self.rows.values())

    @property
    def trained_share(self) -> float:
        """Share of the text and image positions that are trained on."""
        positions = self.numbers["tokens per sample"].total
        return self.numbers["trained tokens per sample"].total / positions if positions else 0.0


def summarise(reports: Sequence[RowReport], answer_end: str | None = None) -> DataSummary:
    """Count everything.

    Args:
        reports: of all rows.
        answer_end: see `DataSummary`; counts as one problem.
    """
    measured = [report for report in reports if report.tokens is not None]
    found = Counter(problem.kind for report in reports for problem in report.problems)
    found[Kind.ANSWER_END] += answer_end is not None
    return DataSummary(
        rows=dict(Counter(report.file for report in reports)),
        rows_with_problems=sum(bool(report.problems) for report in reports),
        problems={kind: found[kind] for kind in Kind if found[kind]},
        with_image=sum(report.images > 0 for report in reports),
        cut=sum(report.cut for report in measured),
        numbers={
            "tokens per sample": distribution([report.tokens for report in measured if report.tokens is not None]),
            "trained tokens per sample": distribution([report.trained for report in measured]),
            "images per sample": distribution([report.images for report in reports]),
            "turns per sample": distribution([report.turns for report in reports]),
        },
        answer_end=answer_end,
    )
